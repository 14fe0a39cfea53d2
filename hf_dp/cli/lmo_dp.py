"""``hf-dp lmo-dp``: LMO-DP's published labels, each beside the epsilon that holds for its noise."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_dp.cli.options import AsJson
from hf_dp.cli.paper import paper

if TYPE_CHECKING:
    from hf_dp.accounting.as_published.report import Holds, Size, Step, Total


def lmo_dp(
    *,
    task: Annotated[
        str, typer.Option(help="Whose whole runs: 'SST-2', 'MNLI', 'QNLI', 'QQP' or 'E2E'.")
    ] = "SST-2",
    as_json: AsJson = False,
) -> None:
    """Reproduce LMO-DP's published labels (arXiv 2405.18776), and say what its noise guarantees."""
    from hf_dp.accounting.as_published import lmo_published
    from hf_dp.accounting.as_published.report import Step, Total

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same words are printed below the tables
        labelled = lmo_published(report_as_published=True, task=task)
        rows = list(labelled if as_json else _tracked(labelled))
    steps = [row for row in rows if isinstance(row, Step)]
    totals = [row for row in rows if isinstance(row, Total)]
    if as_json:
        facts = {"task": task, "steps": steps, "totals": totals}
        typer.echo(json.dumps(without_infinities(facts), allow_nan=False))
    else:
        _show(task, steps, totals)


def without_infinities(value: Any) -> Any:
    """Plain JSON of nested dataclasses; JSON has no infinity, so an infinite number becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: without_infinities(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(one) for one in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def _tracked(rows: Iterable[Step | Total]) -> Iterable[Step | Total]:
    from rich.console import Console
    from rich.progress import track

    return track(rows, "Accounting", console=Console(stderr=True), transient=True)


def _show(task: str, steps: Sequence[Step], totals: Sequence[Total]) -> None:

    from hf_dp.accounting.as_published.report import WORDING

    console = paper()
    console.print(_steps_table(steps))
    console.print()
    console.print(_totals_table(task, totals))
    console.print()
    console.print(_sizes_table(steps))
    console.print()
    for sentence in (WORDING, _HOLDS, *_example(task, totals)):
        console.print(sentence, soft_wrap=True)


_HOLDS = (
    "Beside each label is the epsilon that holds, of noise as the released sampler draws it / as the "
    "released accountant reads it, with Poisson sampling: proven and exact to 0.01% for a model of ONE "
    "parameter; proven for l2-clipped gradients of all parameters, where a finite bound is known; and the "
    "limit for many parameters, along the direction that spreads a gradient evenly: with more and more "
    "parameters the true epsilon is not below that limit. Only figures headed 'epsilon' are guarantees."
)


def _example(task: str, totals: Sequence[Total]) -> Iterable[str]:
    from hf_dp.accounting.shown import rounded_down, rounded_up

    for row in totals[:1]:
        proven = " / ".join(rounded_up(one.epsilon_all_coordinates, digits=2) for one in row.holds)
        limits = " / ".join(rounded_down(one.high_dimension_limit, digits=2) for one in row.holds)
        gaussian = rounded_up(row.epsilon_of_matched_gaussian, digits=2)
        yield (
            f"{task}, set {row.name}: label {row.as_published_total_label:.2f} at delta = {row.delta:g}; our "
            f"accounting proves epsilon {proven} for all parameters, with the released sampler / with the "
            f"accountant's reading, and with many parameters the true one is not below {limits}; the "
            f"Gaussian that the label is about has epsilon {gaussian}."
        )


def _steps_table(rows: Sequence[Step]) -> Any:
    table = _table(
        "One step",
        ("set", "as_published_label", "at order", "orders valid to", "formula where valid"),
    )
    for row in rows:
        table.add_row(
            row.name,
            f"{row.as_published_label:.5g}",
            str(row.order),
            str(row.largest_valid_order),
            f"{row.label_inside_domain:.4g}",
            *_holding(row.holds),
        )
    return table


def _totals_table(task: str, rows: Sequence[Total]) -> Any:
    from hf_dp.accounting.shown import rounded_up

    heads = ("set", "as_published_total_label", "matched Gaussian", "epsilon of that Gaussian")
    table = _table(f"Whole run: {task}", heads)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.as_published_total_label:.3f}",
            f"{row.matched_gaussian:.3f}",
            rounded_up(row.epsilon_of_matched_gaussian, digits=3),
            *_holding(row.holds),
        )
    return table


def _holding(holds: Sequence[Holds]) -> tuple[str, str, str]:
    from hf_dp.accounting.shown import rounded_up

    def both(show: Callable[[Holds], str]) -> str:
        return " / ".join(show(one) for one in holds)

    return (
        both(lambda one: rounded_up(one.epsilon_one_coordinate, digits=3)),
        both(lambda one: rounded_up(one.epsilon_all_coordinates, digits=3)),
        both(lambda one: f"{one.high_dimension_limit:.3g}"),
    )


def _table(title: str, heads: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column(heads[0])
    held = ("epsilon, 1 parameter", "epsilon, all parameters", "limit, many parameters")
    for head in (*heads[1:], *held):
        table.add_column(head, justify="right")
    return table


def _sizes_table(rows: Sequence[Step]) -> Any:
    from rich.table import Table

    table = Table(
        title="Noise at clipping norm 1, as sampled / as accounted",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("set")
    heads = (
        "std",
        "mean |noise|",
        "P(|noise| <= 0.9)",
        "information x variance",
        "matched Gaussian",
    )
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:

        def both(show: Callable[[Size], float], row: Step = row) -> str:
            return " / ".join(f"{show(one):.3f}" for one in row.sizes)

        table.add_row(
            row.name,
            both(lambda one: one.deviation),
            both(lambda one: one.mean_absolute),
            both(lambda one: one.usefulness),
            both(lambda one: one.information * one.deviation**2),
            f"{row.matched_gaussian:.3f}",
        )
    return table
