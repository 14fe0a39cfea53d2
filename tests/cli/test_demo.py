"""``hf-dp demo``: the options; what it runs is tested beside the demo itself."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[float, Path | None]]:
    """The demo replaced by one that only notes its arguments."""
    made: list[tuple[float, Path | None]] = []

    def main(target_epsilon: float, output_dir: Path | None) -> types.SimpleNamespace:
        made.append((target_epsilon, output_dir))
        return types.SimpleNamespace(
            accuracy=0.75, majority_share=0.5, epsilon=7.9, seconds=3.0, output_dir=tmp_path
        )

    module = types.ModuleType("hf_dp.demo.run")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hf_dp.demo.run", module)
    return made


def test_defaults_are_left_to_the_demo(
    hf_dp_program: Callable[..., Any], calls: list[tuple[float, Path | None]]
) -> None:
    assert hf_dp_program("demo").code == 0
    assert calls == [(8.0, None)]


def test_options_reach_the_demo_and_the_outcome_reaches_the_file(
    hf_dp_program: Callable[..., Any], calls: list[tuple[float, Path | None]], tmp_path: Path
) -> None:
    out = tmp_path / "demo.json"
    answer = hf_dp_program(
        "demo", "--target-epsilon", 3, "--output-dir", tmp_path / "run", "--json-out", out
    )
    assert answer.code == 0
    assert calls == [(3.0, tmp_path / "run")]
    assert json.loads(out.read_text()) == {
        "accuracy": 0.75,
        "majority_share": 0.5,
        "epsilon": 7.9,
        "seconds": 3.0,
        "output_dir": str(tmp_path),
    }
