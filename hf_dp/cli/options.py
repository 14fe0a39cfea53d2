"""Options that several subcommands share, each with its one wording."""

from __future__ import annotations

from typing import Annotated

import typer

SamplingProbability = Annotated[
    float,
    typer.Option(
        help="Chance that an example is in a batch, in (0, 1]: expected batch size / number of "
        "examples. With --privacy-unit user: chance that a user is in a batch, expected users in a "
        "batch / number of users; with --user-sampling examples as well: chance that an example is, "
        "expected batch size / examples kept of all users."
    ),
]
NoiseMultiplier = Annotated[
    float, typer.Option(help="Standard deviation of the noise / clipping norm, > 0.")
]
NoiseName = Annotated[
    str,
    typer.Option(
        help="'gaussian', or 'laplace' (less noise only for one or a few numbers and few releases)."
    ),
]
NormName = Annotated[
    str | None,
    typer.Option(
        help="With --noise laplace: the norm in which one unit is clipped, 'l1' (default) or 'l2'."
    ),
]
Dimension = Annotated[
    int | None,
    typer.Option(
        help="With --norm l2: how many numbers are noised, at most. Default: any number, which costs "
        "most; with --norm l1 it changes nothing."
    ),
]
NumSteps = Annotated[int, typer.Option(help="Optimizer steps, > 0; each is a release.")]
Delta = Annotated[
    float,
    typer.Option(
        help="Chance with which epsilon may fail to hold; less than 1 / number of examples, or of users."
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
    typer.Option(
        help="Examples in the data, or users with --privacy-unit user; for 'fixed_size' and "
        "'truncated_poisson' only."
    ),
]
MaxBatchSize = Annotated[
    int | None,
    typer.Option(
        help="Cap of 'truncated_poisson'. Default: the expected batch size + 10 times its square root."
    ),
]
PrivacyUnitName = Annotated[
    str,
    typer.Option(help="Whose data is protected together: 'example', or all examples of a 'user'."),
]
UserSamplingName = Annotated[
    str | None,
    typer.Option(
        help="With --privacy-unit user: 'users' are drawn, each clipped as one (default), or 'examples' "
        "are, each clipped for itself, by Poisson sampling."
    ),
]
MaxExamplesPerUser = Annotated[
    int | None,
    typer.Option(
        help="Examples kept of each user; needed with --user-sampling examples, and of no effect on "
        "epsilon where users are drawn."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
