"""Why a search's winner won, and where noise other than Gaussian wins, in sentences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_dp.noise.candidates import Candidate
    from hf_dp.noise.search import NoiseSearch

NAMES = {"gaussian": "Gaussian", "laplace": "Laplace", "lmo": "scale-mixture (LMO)"}
OBJECTIVES = {
    "variance": "standard deviation",
    "mean_absolute": "mean absolute value",
    "usefulness": "chance to be larger than the radius",
    "entropy": "entropy (nats)",
}

REGIME_EPSILONS = (0.1, 0.3, 1.0, 3.0)
REGIMES: tuple[tuple[float, float, int, tuple[float, float, float, float]], ...] = (
    (1e-5, 1.0, 1, (2.17, 2.38, 2.64, 2.95)),
    (1e-5, 1.0, 10, (0.76, 0.78, 0.84, 0.94)),
    (1e-5, 0.01, 100, (0.79, 0.96, 1.45, 1.79)),
    (1e-5, 0.01, 1000, (0.72, 0.76, 0.9, 1.24)),
    (1e-10, 1.0, 1, (3.83, 3.97, 4.15, 4.38)),
    (1e-10, 1.0, 10, (1.21, 1.26, 1.31, 1.38)),
    (1e-10, 0.01, 100, (0.77, 0.89, 1.42, 1.93)),
    (1e-10, 0.01, 1000, (0.72, 0.74, 0.83, 1.13)),
)
"""Delta, sampling probability, steps, and the Gaussian's standard deviation over Laplace noise's at each of
`REGIME_EPSILONS`, for one coordinate or l1 clipping of both (`benchmarks/noise.py`)."""


MIXTURE_EPSILONS = (1.0, 3.0, 6.0, 10.0)
MIXTURES = (1.0, 1.0, 0.96, 0.61)
"""The standard deviation of the best mixture found over plain Laplace noise's, at each of
`MIXTURE_EPSILONS`, for one number released once at delta 1e-5 (`benchmarks/noise.py`)."""


def explained(search: NoiseSearch) -> tuple[str, ...]:
    """What was chosen, why, and where the family wins."""
    return (_sizes(search), *_reasons(search), *_not_had(search), *_regimes(search))


def value_of(candidate: Candidate, objective: str) -> float:
    """The objective's own figure, not its logarithm."""
    figures = candidate.figures
    match objective:
        case "variance":
            return figures.deviation
        case "mean_absolute":
            return figures.mean_absolute
        case "usefulness":
            return math.nan if figures.beyond is None else figures.beyond
        case _:
            return figures.entropy


def _sizes(search: NoiseSearch) -> str:
    asked, winner = search.question, search.winner
    what = OBJECTIVES[asked.objective]
    others = ", ".join(
        f"{NAMES[one.family]} {value_of(one, asked.objective):.4g}"
        for one in search.candidates
        if one is not winner
    )
    found = f"{NAMES[winner.family]} noise has the least {what}: {value_of(winner, asked.objective):.4g}"
    beside = f"; {others} at the same guarantee" if others else ", the only candidate"
    return f"{found}{beside} (epsilon <= {asked.target_epsilon:g}, delta = {asked.target_delta:g})."


def _reasons(search: NoiseSearch) -> tuple[str, ...]:
    asked, winner = search.question, search.winner
    match winner.family:
        case "gaussian" if asked.norm == "l2" and asked.dimension > 1:
            return (
                f"Clipped in the l2 norm, a gradient may spread over all {asked.dimension} coordinates. "
                "Spread over many, Laplace noise protects as Gaussian noise of 1 / 1.41 of its standard "
                "deviation does, and a random scale only loses: Fisher information times variance is at "
                "least 2 for every member of the family, and 1 for the Gaussian.",
            )
        case "gaussian":
            return (
                f"What {asked.num_steps} releases tell together tends to what Gaussian noise of the same "
                "Fisher information tells; of all noise of one variance the Gaussian has the least.",
            )
        case "laplace":
            return (
                "The privacy loss of Laplace noise is bounded, so a small delta costs it little; a "
                "Gaussian's is not, and it pays for delta with a larger standard deviation.",
            )
        case _:
            return _mixture(search)


def _mixture(search: NoiseSearch) -> tuple[str, ...]:
    winner, plain = search.winner, search.of("laplace")
    if plain is None:
        return (
            "No plain Laplace noise was asked for; it is rarely more than a few percent worse.",
        )
    objective = search.question.objective
    return (
        "Mixing scales gives a sharper peak at 0 and longer tails than one Laplace scale: "
        f"{value_of(winner, objective):.4g} instead of {value_of(plain, objective):.4g}.",
    )


def _not_had(search: NoiseSearch) -> tuple[str, ...]:
    return tuple(
        f"{NAMES[family]} noise is no candidate: {reason}"
        for family, reason in search.refused.items()
    )


def _regimes(search: NoiseSearch) -> tuple[str, ...]:
    """The rows of the table at the nearest delta."""
    if search.question.objective != "variance":
        return ()
    delta = search.question.target_delta
    nearest = min({row[0] for row in REGIMES}, key=lambda one: abs(math.log(one / delta)))
    lines = [
        "Where Laplace noise wins, for one coordinate or l1 clipping (the Gaussian's standard deviation over "
        f"its own, above 1 where it wins; delta = {nearest:g}):"
    ]
    for _, probability, steps, ratios in (row for row in REGIMES if row[0] == nearest):
        run = "one release" if (probability, steps) == (1.0, 1) else f"{steps} releases"
        if probability < 1:
            run += f" at sampling probability {probability:g}"
        cells = ", ".join(
            f"{ratio:.2f} at epsilon {epsilon:g}"
            for epsilon, ratio in zip(REGIME_EPSILONS, ratios, strict=True)
        )
        lines.append(f"  {run}: {cells}")
    lines.append(
        "With l2 clipping nothing is left of it for 8 coordinates in training, and for 64 anywhere."
    )
    gains = ", ".join(
        f"{ratio:.2f} at epsilon {epsilon:g}"
        for epsilon, ratio in zip(MIXTURE_EPSILONS, MIXTURES, strict=True)
    )
    lines.append(
        "Mixtures gain on plain Laplace noise at large epsilon, for one number released once: their standard "
        f"deviation over its own is {gains} (delta = 1e-05)."
    )
    return tuple(lines)
