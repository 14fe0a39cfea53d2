"""The benchmark of conversions to groups finds the least noise, and the README says what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import user_groups

ROOT = Path(__file__).parents[2]


@pytest.fixture
def kept() -> dict[str, Any]:
    return json.loads((user_groups.RESULTS / "user_groups.json").read_text(encoding="utf-8"))


def test_the_least_noise_is_found_from_either_side() -> None:
    for start in (0.1, 1.0, 1.5, 40.0):
        found = user_groups.least_noise(lambda noise: 3 / noise, 2.0, start)
        assert 1.5 <= found <= 1.5 * (1 + user_groups.ACCURACY)


@pytest.mark.slow
def test_both_need_the_noise_that_they_are_said_to(kept: dict[str, Any]) -> None:
    """One point of each kind, by what was kept: noise that just meets the target."""
    for row in (kept["at_equal_epsilon"][2], kept["at_equal_epsilon"][-1]):
        point = row["sampling_probability"], row["max_contributions"]
        for way, noise in (
            (user_groups.by_mixture, row["mixture_noise"]),
            (user_groups.by_conversion, row["conversion_noise"]),
        ):
            assert way(*point, noise) <= row["target_epsilon"] < way(*point, 0.999 * noise)


def test_the_conversion_is_worse_by_what_the_readme_says(kept: dict[str, Any]) -> None:
    more = [row["more_noise"] for row in kept["at_equal_epsilon"]]
    assert (min(more), max(more)) == (kept["more_noise"]["least"], kept["more_noise"]["most"])
    assert min(more) > 0
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"needs {min(more):.1%} to {max(more):.0%} more noise" in text
    four, eight = kept["at_equal_noise"][:2]
    assert (
        f"users of 4 examples have epsilon {four['mixture_epsilon']:.1f} instead of "
        f"{four['conversion_epsilon']:.1f}, users of 8 have {eight['mixture_epsilon']:.1f} instead of none"
    ) in text
    assert eight["conversion_epsilon"] is None
