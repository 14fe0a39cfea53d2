"""How a guarantee is printed: for people as a table and a sentence, for programs as one JSON object."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from hf_dp.accounting.shown import rounded_up
from hf_dp.cli.run import PoissonRun

if TYPE_CHECKING:
    from hf_dp.accounting import Guarantee


def show(run: PoissonRun, guarantee: Guarantee, *, as_json: bool) -> None:
    """Print what a run guarantees."""
    facts = {
        "epsilon": guarantee.epsilon,
        "delta": guarantee.delta,
        "noise_multiplier": run.noise_multiplier,
        "sampling_probability": run.sampling_probability,
        "num_steps": run.num_steps,
        "accountant": guarantee.accountant,
        "is_upper_bound": guarantee.is_upper_bound,
        "unit": guarantee.unit,
        "relation": str(guarantee.relation),
    }
    if as_json:
        show_json(facts)
    else:
        _show_table(facts)


def show_json(facts: Mapping[str, Any]) -> None:
    """Print one JSON object; JSON has no infinity, so an infinite number becomes null."""
    finite = {
        name: None if isinstance(value, float) and math.isinf(value) else value
        for name, value in facts.items()
    }
    typer.echo(json.dumps(finite, allow_nan=False))


def _show_table(facts: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        if name not in ("is_upper_bound", "unit", "relation"):
            table.add_row(
                name.replace("_", " "),
                rounded_up(value, digits=5) if name == "epsilon" else str(value),
            )
    kind = "a proven upper bound" if facts["is_upper_bound"] else "not proven to be an upper bound"
    relation = str(facts["relation"]).replace("_", " ")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"Epsilon is {kind}, by accountant {facts['accountant']!r}, for neighbouring datasets that "
        f"differ in one {facts['unit']} ({relation}), under Poisson sampling.",
        soft_wrap=True,
    )
