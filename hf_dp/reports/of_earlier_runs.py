"""Words for runs that trained the same model before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_dp.accounting.shown import rounded_up

TRAINED_BEFORE = "trained_before"  # the header's list of them


def in_words(runs: Sequence[Mapping[str, Any]]) -> str:
    """That a model was trained before, and what follows from it."""
    return (
        f"The model was trained before, under {'; '.join(map(_one, runs))}. If that was on the same people's "
        "data, what it cost counts as well: epsilons and deltas add up."
    )


def _one(run: Mapping[str, Any]) -> str:
    epsilon, delta = run.get("epsilon"), run.get("delta")
    cost = "unknown epsilon"
    if epsilon is not None and delta is not None:
        cost = f"epsilon <= {rounded_up(epsilon)} at delta = {rounded_up(delta)}"
    name = str(run.get("run_id"))
    return f"run {name if ' ' in name else name[:8]} ({cost}, per {run.get('unit')})"
