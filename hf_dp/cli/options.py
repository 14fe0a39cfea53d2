"""Options that several subcommands share, each with its one wording."""

from __future__ import annotations

from typing import Annotated

import typer

SamplingProbability = Annotated[
    float,
    typer.Option(
        help="Chance that an example is in a batch, in (0, 1]: "
        "expected batch size / number of examples."
    ),
]
NoiseMultiplier = Annotated[
    float, typer.Option(help="Standard deviation of the noise / clipping norm, > 0.")
]
NumSteps = Annotated[int, typer.Option(help="Optimizer steps, > 0; each is a release.")]
Delta = Annotated[
    float,
    typer.Option(
        help="Chance with which epsilon may fail to hold; less than 1 / number of examples."
    ),
]
TargetEpsilon = Annotated[float, typer.Option(help="The most to spend, > 0.")]
AccountantName = Annotated[
    str,
    typer.Option(
        help="Who computes epsilon: 'pld' (tight), 'edgeworth' (the same, with a lower bound and an "
        "estimate beside it) or 'rdp' (looser, for any delta)."
    ),
]
AnyAccountantName = Annotated[
    str,
    typer.Option(
        help="Who computes epsilon: 'pld' (tight), 'edgeworth' (the same, with a lower bound and an "
        "estimate beside it) or 'rdp' (looser, for any delta); 'gdp' only estimates."
    ),
]
SamplingName = Annotated[
    str,
    typer.Option(
        help="How batches are drawn: 'poisson', 'balls_in_bins', 'truncated_poisson', 'fixed_size' or "
        "'shuffled' (from which privacy gains nothing)."
    ),
]
NumExamples = Annotated[
    int | None,
    typer.Option(help="Examples in the data; for 'fixed_size' and 'truncated_poisson' only."),
]
MaxBatchSize = Annotated[
    int | None,
    typer.Option(
        help="Cap of 'truncated_poisson'. Default: the expected batch size + 10 times its square root."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
