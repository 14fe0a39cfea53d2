"""``hf-dp search-noise``: which noise is least for a guarantee."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_dp.cli.options import (
    AccountantName,
    AsJson,
    Delta,
    NumSteps,
    SamplingProbability,
    TargetEpsilon,
)
from hf_dp.cli.paper import paper

if TYPE_CHECKING:
    from hf_dp.noise.candidates import Candidate
    from hf_dp.noise.search import NoiseSearch


def search_noise(
    *,
    target_epsilon: TargetEpsilon,
    delta: Delta,
    sampling_probability: SamplingProbability = 1.0,
    num_steps: NumSteps = 1,
    dimension: Annotated[
        int,
        typer.Option(help="Numbers that are noised: trainable parameters (+ 1 for the loss), > 0."),
    ] = 1,
    norm: Annotated[
        str, typer.Option(help="In which each unit's share is clipped: 'l2' or 'l1'.")
    ] = "l2",
    clipping_norm: Annotated[float, typer.Option(help="Scales the figures, > 0.")] = 1.0,
    objective: Annotated[
        str,
        typer.Option(
            help="What to make least: 'variance', 'mean_absolute', 'entropy', or the chance of more noise "
            "than --radius ('usefulness')."
        ),
    ] = "variance",
    radius: Annotated[
        float | None, typer.Option(help="For 'usefulness', in the units of the clipping norm.")
    ] = None,
    family: Annotated[
        list[str] | None,
        typer.Option(help="May be repeated: 'gaussian', 'laplace', 'lmo'. Default: all three."),
    ] = None,
    draw: Annotated[
        str,
        typer.Option(
            help="How 'lmo' draws its scale: 'iid', for every number, or 'shared', once a release."
        ),
    ] = "iid",
    shapes: Annotated[int, typer.Option(help="Mixtures to try, > 0; 60 take up to a minute.")] = 60,
    cache: Annotated[
        bool, typer.Option(help="Keep the shape that was found, and look for it first.")
    ] = True,
    accountant: AccountantName = "pld",
    as_json: AsJson = False,
) -> None:
    """Search Gaussian, Laplace and scale-mixture (LMO) noise for the least at a guarantee."""
    from hf_dp.accounting import accountant_named
    from hf_dp.events import PoissonSampled
    from hf_dp.noise.candidates import FAMILIES
    from hf_dp.noise.search import search_noise as searched

    chosen = accountant_named(accountant)
    with _bar(shown=not as_json) as progress:
        found = searched(
            target_epsilon=target_epsilon,
            target_delta=delta,
            step=lambda event: PoissonSampled(sampling_probability, event),
            num_steps=num_steps,
            norm=norm,  # type: ignore[arg-type]  # checked there, with its message
            dimension=dimension,
            accountant=chosen,
            objective=objective,  # type: ignore[arg-type]
            families=family or FAMILIES,  # type: ignore[arg-type]
            clipping_norm=clipping_norm,
            radius=radius,
            draw=draw,  # type: ignore[arg-type]
            budget=shapes,
            progress=progress,
            cached=cache,
        )
    if as_json:
        typer.echo(json.dumps(_facts(found), allow_nan=False))
    else:
        _show(found)


@contextmanager
def _bar(*, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    from rich.console import Console
    from rich.progress import Progress

    if not shown:
        yield None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Trying mixtures", total=None)
        yield lambda done, planned: bar.update(task, completed=done, total=planned)


def _facts(found: NoiseSearch) -> dict[str, Any]:
    from hf_dp.cli.lmo_dp import without_infinities

    facts: dict[str, Any] = without_infinities(
        {
            "question": found.question,
            "accountant": found.accountant,
            "winner": found.winner.family,
            "candidates": [_candidate(one) for one in found.candidates],
            "refused": found.refused,
            "shapes_tried": found.shapes_tried,
            "from_cache": found.from_cache,
            "why": found.why(),
        }
    )
    return facts


def _candidate(one: Candidate) -> dict[str, Any]:
    from hf_dp.events import to_json

    return {
        "family": one.family,
        "epsilon": one.epsilon,
        "noise_multiplier": one.mechanism.noise_multiplier,
        "event": to_json(one.mechanism.event()),
        **dataclasses.asdict(one.figures),
    }


def _show(found: NoiseSearch) -> None:
    from rich.table import Table

    from hf_dp.accounting.shown import rounded_up
    from hf_dp.noise.why import NAMES

    asked = found.question
    table = Table(box=None, pad_edge=False)
    for head in ("", "noise"):
        table.add_column(head)
    heads = ["noise multiplier", "standard deviation", "mean |noise|", "entropy", "epsilon"]
    if asked.radius is not None:
        heads.insert(4, f"P(|noise| <= {asked.radius:g})")
    for head in heads:
        table.add_column(head, justify="right")
    for one in found.candidates:
        figures = one.figures
        cells = [
            f"{one.mechanism.noise_multiplier:.5g}",
            f"{figures.deviation:.4g}",
            f"{figures.mean_absolute:.4g}",
            f"{figures.entropy:.4g}",
            rounded_up(one.epsilon, digits=5),
        ]
        if figures.usefulness is not None:
            cells.insert(4, f"{figures.usefulness:.4g}")
        table.add_row("->" if one is found.winner else "", NAMES[one.family], *cells)
    console = paper()
    console.print(table)
    for sentence in found.why():
        console.print(sentence, soft_wrap=True)
    console.print(f"Mechanism: {found.mechanism}", soft_wrap=True)
    tried = "kept from an earlier search" if found.from_cache else f"{found.shapes_tried} tried"
    console.print(
        f"Shapes of mixtures: {tried}. Every epsilon is a proven upper bound, by accountant "
        f"{found.accountant!r}.",
        soft_wrap=True,
    )
