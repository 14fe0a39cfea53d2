"""The benchmark of user-level training runs every setting as often as it says, and tables what came out."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import pytest

from benchmarks import user_level
from benchmarks.user_level import HEAD, Setting, measure, settings, table


def test_every_setting_is_run_as_often_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(HEAD, runs=2, groups=(1, 4), epsilons=(8.0,))
    monkeypatch.setattr(user_level, "shrinkage", lambda material, group: 1 / group)
    norms: dict[Setting, float] = {}

    def run(setting: Setting, recipe: Any, material: Any, norm: float) -> dict[str, Any]:
        norms[setting] = norm
        return {**asdict(setting), "accuracy": 0.5, "noise_multiplier": 1.0}

    monkeypatch.setattr(user_level, "run", run)
    rows = [{**asdict(Setting("head", "users", 8.0, 4)), "accuracy": 0.7, "noise_multiplier": 1.0}]
    for found in measure(recipe, None, rows):  # type: ignore[arg-type]
        rows = found
    ran = Counter(Setting(r["model"], r["sampling"], r["epsilon"], r["group"]) for r in rows)
    assert ran == Counter(settings(recipe))
    assert norms[Setting("head", "users", 8.0, 4)] == recipe.clipping_norm / 4
    assert norms[Setting("head", "examples", 8.0, 4)] == recipe.clipping_norm
    assert "| head | users | 8 | 4 | 1 | 60.0 (50.0 to 70.0) |" in table(rows)
