"""How a guarantee is printed: for people as a table and a sentence, for programs as one JSON object."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from hf_dp.accounting.shown import rounded_down, rounded_up
from hf_dp.cli.paper import paper
from hf_dp.cli.run import PoissonRun
from hf_dp.cli.sampled import SampledRun
from hf_dp.cli.users import UserRun
from hf_dp.events import Laplace

if TYPE_CHECKING:
    from hf_dp.accounting import Guarantee

_SAMPLINGS = {
    "poisson": "Poisson sampling",
    "truncated_poisson": "Poisson sampling with a cap",
    "balls_in_bins": "balls in bins: each once in a pass, in a batch drawn for it alone",
    "shuffled": "shuffled passes, from which privacy gains nothing",
    "fixed_size": "sampling without replacement",
}


_NEIGHBORS = {
    "add_or_remove_one": "by one {unit}, there or not ({counted} not being used to plan the run)",
    "replace_special": "in one {unit}, replaced by one that contributes nothing",
    "replace_one": "in one {unit}, replaced by any other: a stronger claim than the other samplers', and not "
    "to be compared figure by figure",
}
_LARGE_DELTA = 1e-3


def show(
    run: PoissonRun | SampledRun | UserRun,
    guarantee: Guarantee,
    *,
    as_json: bool,
    **more: float,
) -> None:
    """Print what a run guarantees, and `more` facts about it."""
    facts = {
        "epsilon": guarantee.epsilon,
        "delta": guarantee.delta,
        "noise_multiplier": run.noise_multiplier,
        "sampling": run.sampling,
        "sampling_probability": run.sampling_probability,
        "num_steps": run.num_steps,
        "accountant": guarantee.accountant,
        "is_upper_bound": guarantee.is_upper_bound,
        "unit": guarantee.unit,
        "relation": str(guarantee.relation),
    }
    if isinstance(run.kind, Laplace):
        facts |= {"noise": "laplace", "norm": run.kind.norm}
        if run.kind.dimension is not None:
            facts["dimension"] = run.kind.dimension
    if isinstance(run, UserRun):
        facts["user_sampling"] = run.user_sampling
        if run.max_examples_per_user is not None:
            facts["max_examples_per_user"] = run.max_examples_per_user
    beside = {"lower": guarantee.lower, "estimate": guarantee.estimate}
    facts |= {name: value for name, value in beside.items() if value is not None} | more
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
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("epsilon", rounded_up(facts["epsilon"], digits=5))
    if "lower" in facts:
        down = rounded_down(facts["lower"], digits=5)
        table.add_row("lower", f"{down} (proven: no smaller epsilon holds)")
    if "estimate" in facts:
        table.add_row("estimate", f"{facts['estimate']:.5g} (bounds nothing)")
    for name in (
        "delta",
        "noise_multiplier",
        "noise",
        "norm",
        "dimension",
        "sampling",
        "sampling_probability",
        "num_steps",
        "user_sampling",
        "max_examples_per_user",
        "expected_batch_size",
        "accountant",
    ):
        if name in facts:
            table.add_row(name.replace("_", " "), str(facts[name]))
    console = paper()
    console.print(table)
    console.print(_sentence(facts), soft_wrap=True)
    if facts["delta"] > _LARGE_DELTA:
        console.print(
            f"With chance delta = {facts['delta']:g} anything may be revealed: use less than 1 / number of "
            f"{facts['unit']}s.",
            soft_wrap=True,
        )


def _sentence(facts: Mapping[str, Any]) -> str:
    counted = f"the number of {facts['unit']}s"
    if facts.get("user_sampling") == "examples":
        counted = "the numbers of users and of the examples that they keep"
    differ = _NEIGHBORS[facts["relation"]].format(unit=facts["unit"], counted=counted)
    about = f"neighbouring datasets that differ {differ}"
    if not facts["is_upper_bound"] and math.isinf(facts["epsilon"]):
        return (
            f"Accountant {facts['accountant']!r} only estimates, so no epsilon is guaranteed; the estimate "
            f"is about {about}, under {_drawn(facts)}."
        )
    kind = "a proven upper bound" if facts["is_upper_bound"] else "not proven to be an upper bound"
    by = f"by accountant {facts['accountant']!r}"
    return f"Epsilon is {kind}, {by}, for {about}, under {_drawn(facts)}."


def _drawn(facts: Mapping[str, Any]) -> str:
    """How batches are drawn, and whose they are."""
    drawn = _SAMPLINGS[facts["sampling"]]
    if facts.get("user_sampling") == "examples":
        most = facts["max_examples_per_user"]
        return (
            f"{drawn} of examples, of which one user owns at most {most}, each clipped for itself"
        )
    return f"{drawn}, users being drawn" if "user_sampling" in facts else drawn
