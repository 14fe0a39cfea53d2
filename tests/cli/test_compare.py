"""``hf-dp compare``: bounds are called bounds, estimates estimates."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_dp.cli.compare import _counts

WORDS = ["compare", "--sampling-probability", "0.01", "--noise-multiplier", "1.0"]
WORDS += ["--num-steps", "300", "--delta", "1e-5"]
Program = Callable[..., Any]


def test_every_line_says_what_it_is(hf_dp_program: Program) -> None:
    answer = hf_dp_program(*WORDS, "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    lines = {(one["accountant"], one["kind"]): one["epsilons"] for one in found["lines"]}
    assert {kind for _, kind in lines} == {"upper bound", "lower bound", "estimate"}
    assert ("gdp", "upper bound") not in lines
    assert ("gdp", "estimate") in lines
    assert found["num_steps"][-1] == 300
    for low, tight, loose in zip(
        lines["edgeworth", "lower bound"],
        lines["pld", "upper bound"],
        lines["rdp", "upper bound"],
        strict=True,
    ):
        assert (low or 0.0) <= tight <= loose


def test_the_table_marks_estimates(hf_dp_program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    answer = hf_dp_program(*WORDS)
    assert (answer.code, answer.err) == (0, "")
    assert "≈" in answer.out
    assert "bound nothing" in answer.out


def test_the_plot_is_drawn(hf_dp_program: Program, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("epsilon.png", "epsilon.svg"):
        assert hf_dp_program(*WORDS, "--plot", tmp_path / name).code == 0
        assert (tmp_path / name).stat().st_size > 1000


def test_a_missing_library_is_named(
    hf_dp_program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    answer = hf_dp_program(*WORDS, "--plot", tmp_path / "epsilon.png")
    assert answer.code == 2
    assert "pip install matplotlib" in answer.err
    assert answer.out == ""


def test_unknown_formats_are_refused(hf_dp_program: Program) -> None:
    answer = hf_dp_program(*WORDS, "--plot", "epsilon.doc")
    assert answer.code == 2
    assert ".svg" in answer.err


@pytest.mark.parametrize("num_steps", [1, 2, 7, 300, 10**6])
def test_counts_rise_to_the_last(num_steps: int) -> None:
    counts = _counts(num_steps)
    assert counts[-1] == num_steps
    assert counts == sorted(set(counts))
    assert counts[0] >= 1


def test_a_plot_in_a_folder_that_is_not_there_is_refused_before_work(
    hf_dp_program: Program, tmp_path: Path
) -> None:
    answer = hf_dp_program(*WORDS, "--plot", tmp_path / "none" / "e.svg")
    assert (answer.code, answer.out) == (2, "")
    assert "folder that exists" in answer.err
