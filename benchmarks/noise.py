"""Which noise is least at the same guarantee, and how fast is it drawn?

    OMP_NUM_THREADS=1 python -m benchmarks.noise    # some ten minutes on one core; keeps the result

Standard deviations of Gaussian, Laplace and scale-mixture (LMO) noise, each sized by the accountant "pld"
for the same epsilon and delta, for single releases and for training schedules. Then the other objectives
of the search for one released number, and the time that draws take next to `torch.randn`.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_time import machine
from hf_dp.accounting import accountant_named
from hf_dp.coins import SecretCoins
from hf_dp.events import Norm, PoissonSampled
from hf_dp.noise import GaussianNoise, LaplaceNoise, NoiseMechanism, NoiseSearch, ScaleMixtureNoise
from hf_dp.noise.figures import Objective
from hf_dp.noise.search import search_noise
from hf_dp.noise.why import value_of
from hf_dp.scale_law import ScaleLaw
from hf_dp.sums import ClippedSum

RESULTS = Path(__file__).parent / "results"

DELTAS = (1e-5, 1e-10)
EPSILONS = (0.1, 0.3, 1.0, 3.0)
Schedule = tuple[float, int]  # sampling probability, steps
SCHEDULES: tuple[Schedule, ...] = ((1.0, 1), (1.0, 10), (0.01, 100), (0.01, 1000), (0.03, 192))
SPACES: tuple[tuple[Norm, int], ...] = (
    ("l2", 1),
    ("l2", 2),
    ("l2", 8),
    ("l2", 64),
    ("l2", 1024),
    ("l2", 1_000_000),
    ("l1", 1024),  # of Gaussian and Laplace noise the same for every dimension
)
SHAPES_AT_ONE, SHAPES = 25, 6
OBJECTIVES: tuple[Objective, ...] = ("variance", "mean_absolute", "usefulness", "entropy")
DRAWS = 4_000_000

Row = dict[str, Any]


def answer(
    epsilon: float, delta: float, schedule: Schedule, space: tuple[Norm, int], **more: Any
) -> NoiseSearch:
    """One search, not from the cache."""
    norm, dimension = space
    probability, num_steps = schedule
    settings = {"budget": SHAPES_AT_ONE if dimension == 1 else SHAPES} | more
    return search_noise(
        target_epsilon=epsilon,
        target_delta=delta,
        step=lambda event: PoissonSampled(probability, event),
        num_steps=num_steps,
        norm=norm,
        dimension=dimension,
        accountant=accountant_named("pld"),
        cached=False,
        **settings,
    )


def deviations(
    deltas: tuple[float, ...] = DELTAS,
    schedules: tuple[Schedule, ...] = SCHEDULES,
    epsilons: tuple[float, ...] = EPSILONS,
    spaces: tuple[tuple[Norm, int], ...] = SPACES,
) -> Iterator[Row]:
    """The standard deviation of every family at every point, and the Gaussian's over the others'."""
    for delta, schedule, epsilon, space in itertools.product(deltas, schedules, epsilons, spaces):
        found = answer(epsilon, delta, schedule, space)
        sizes: Row = {one.family: one.figures.deviation for one in found.candidates}
        yield {
            "delta": delta,
            "sampling_probability": schedule[0],
            "num_steps": schedule[1],
            "epsilon": epsilon,
            "norm": space[0],
            "dimension": space[1],
            **sizes,
            "gaussian_over_laplace": sizes["gaussian"] / sizes["laplace"],
            "gaussian_over_lmo": sizes["gaussian"] / sizes["lmo"],
            "winner": found.winner.family,
        }


def objectives(
    epsilons: tuple[float, ...] = (1.0, 3.0, 6.0, 10.0), shapes: int = 60
) -> Iterator[Row]:
    """What one released number gains from the family by each objective, delta = 1e-5."""
    for epsilon, objective in itertools.product(epsilons, OBJECTIVES):
        radius = 0.5 / epsilon if objective == "usefulness" else None
        found = answer(
            epsilon, 1e-5, (1.0, 1), ("l1", 1), objective=objective, radius=radius, budget=shapes
        )
        yield {
            "epsilon": epsilon,
            "objective": objective,
            "radius": radius,
            **{one.family: value_of(one, objective) for one in found.candidates},
            "winner": found.winner.family,
        }


def throughput(draws: int = DRAWS, rounds: int = 5) -> list[Row]:
    """Seconds to add noise to that many float32 numbers, one thread, the least of some rounds."""
    published = ScaleLaw(1.0, 0.05, 0.5, 0.1, 0.2)  # LMO-DP's set "0.3" as its sampler draws it
    tensor = torch.zeros(draws)
    ways: dict[str, Callable[[], object]] = {
        "torch.randn": lambda: tensor.add_(torch.randn(draws)),
        "Gaussian, secret coins": adding(GaussianNoise(1.0), tensor),
        "Laplace, secret coins": adding(LaplaceNoise(1.0), tensor),
        "mixture, Gamma part alone, secret coins": adding(
            ScaleMixtureNoise(ScaleLaw(gamma_shape=4.0, gamma_scale=0.25)), tensor
        ),
        "mixture, all parts, secret coins": adding(ScaleMixtureNoise(published), tensor),
        "mixture, shared scale, secret coins": adding(
            ScaleMixtureNoise(published, draw="shared"), tensor
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    plain = min(seconds["torch.randn"])
    return [
        {
            "way": name,
            "numbers": draws,
            "seconds": min(all_of_it),
            "median_seconds": statistics.median(all_of_it),
            "times_torch_randn": min(all_of_it) / plain,
        }
        for name, all_of_it in seconds.items()
    ]


def adding(noise: NoiseMechanism, tensor: torch.Tensor) -> Callable[[], object]:
    """A release of one large sum."""
    coins, none = SecretCoins(), torch.empty(0)
    return lambda: noise.release(
        ClippedSum({"weight": tensor}, norms=none, losses=none), sensitivity=1.0, coins=coins
    )


def main() -> None:
    """Search, time, print, keep."""
    torch.set_num_threads(1)
    start = time.monotonic()
    rows: list[Row] = []
    for row in deviations():
        rows.append(row)
        print(
            " ".join(
                f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()
            )
        )
    others = list(objectives())
    for row in others:
        print(row)
    drawn = throughput()
    for row in drawn:
        print(f"{row['way']}: {row['seconds']:.3f} s, {row['times_torch_randn']:.1f} x")
    report = {
        "machine": machine(),
        "accountant": "pld",
        "seconds": time.monotonic() - start,
        "deviations": rows,
        "objectives": others,
        "throughput": drawn,
    }
    text = json.dumps(report, indent=1, allow_nan=False)
    (RESULTS / "noise.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
