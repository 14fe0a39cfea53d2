"""Epsilon of every sampler against simulation: enough runs to see an error of five percent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from hf_dp.accounting import accountant_named
from hf_dp.accounting._losses import SampledGaussian
from hf_dp.accounting._profiles import SampledSwap, TruncatedSample
from hf_dp.accounting._releases import release_of
from hf_dp.events import (
    BallsInBins,
    Gaussian,
    NeighboringRelation,
    PoissonSampled,
    PrivacyEvent,
    SampledWithoutReplacement,
    SelfComposed,
    Shuffled,
    TruncatedPoissonSampled,
)

Floats = NDArray[np.float64]

RUNS = 200_000
DELTA = 0.01
SIGMAS = 5.0  # of a simulation's own error: each comparison fails by chance once in 3 million times
LOOSENESS = 1.01  # the bounds are within a tenth of a percent of epsilon, which moves delta by less


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng()


# Each of these draws the loss of one release (or pass) under the larger dataset, ``(RUNS,)``.


def of_a_mean(count: int, sigma: float, generator: np.random.Generator) -> Floats:
    """Balls in bins: the unit is in the first of `count` batches, by symmetry."""
    outputs = generator.normal(0.0, sigma, (RUNS, count))
    outputs[:, 0] += 1
    losses: Floats = np.log(np.exp((2 * outputs - 1) / (2 * sigma**2)).mean(1))
    return losses


def of_a_sample(q: float, sigma: float, generator: np.random.Generator) -> Floats:
    """Poisson: the unit is there with probability `q`."""
    outputs = generator.normal(0.0, sigma, RUNS) + (generator.random(RUNS) < q)
    losses: Floats = np.log1p(q * np.expm1((2 * outputs - 1) / (2 * sigma**2)))
    return losses


def of_a_swap(q: float, sigma: float, generator: np.random.Generator) -> Floats:
    """Fixed size: losses above zero as if the unit moved the sum by two, those below their mirror.

    A loss of -l has e^-l times the chance that the other dataset gives to its mirror image; what is left
    is a loss of zero.
    """
    moved = np.where(generator.random(RUNS) < q, 2.0, 0.0)
    positive = loss_of_two(generator.normal(0.0, sigma, RUNS) + moved, q, sigma)
    left = positive <= 0
    chance_left = (1 - q) * ndtr(1 / sigma) + q * ndtr(-1 / sigma)
    mirrored = left & (generator.random(RUNS) < ndtr(-1 / sigma) / chance_left)
    outputs = -sigma * ndtri(generator.random(RUNS) * ndtr(-1 / sigma))  # normal, given above 1
    negative = -loss_of_two(outputs, q, sigma)
    return np.where(left, np.where(mirrored, negative, 0.0), positive)


def loss_of_two(outputs: Floats, q: float, sigma: float) -> Floats:
    losses: Floats = np.log1p(q * np.expm1((4 * outputs - 4) / (2 * sigma**2)))
    return losses


def of_a_cut(truncated: TruncatedSample, generator: np.random.Generator) -> Floats:
    """A Poisson sample, or one of fixed size where the others fill the batch, seen by the observer."""
    sigma = truncated.noise_multiplier
    return np.where(
        generator.random(RUNS) < truncated.full_probability,
        of_a_swap(truncated.place_probability, sigma, generator),
        of_a_sample(truncated.sampling_probability, sigma, generator),
    )


def losses_of(event: PrivacyEvent, generator: np.random.Generator) -> Floats:
    match event:
        case BallsInBins(count, Gaussian(sigma)):
            return of_a_mean(count, sigma, generator)
        case Shuffled(_, Gaussian(sigma)):
            return generator.normal(0.5 / sigma**2, 1 / sigma, RUNS)
        case PoissonSampled(q, Gaussian(sigma)):
            return of_a_sample(q, sigma, generator)
        case SampledWithoutReplacement(units, size, Gaussian(sigma)):
            return of_a_swap(size / units, sigma, generator)
        case TruncatedPoissonSampled():
            truncated = release_of(event)
            assert isinstance(truncated, TruncatedSample)
            return of_a_cut(truncated, generator)
    raise AssertionError(event)


@dataclass
class Simulated:
    """Losses of many runs, and the delta that they show."""

    losses: Floats

    def delta(self, epsilon: float) -> tuple[float, float]:
        """Mean and its standard error."""
        parts = np.maximum(-np.expm1(epsilon - self.losses), 0.0)
        return float(parts.mean()), float(parts.std() / math.sqrt(RUNS))


def simulated(event: PrivacyEvent, count: int, generator: np.random.Generator) -> Simulated:
    return Simulated(sum((losses_of(event, generator) for _ in range(count)), np.zeros(RUNS)))


def agrees(simulation: Simulated, epsilon: float) -> bool:
    """Whether `DELTA` is what the runs show at `epsilon`, as far as they can tell."""
    found, error = simulation.delta(epsilon)
    return DELTA / LOOSENESS - SIGMAS * error <= found <= DELTA * LOOSENESS + SIGMAS * error


SPECIAL, ONE = NeighboringRelation.REPLACE_SPECIAL, NeighboringRelation.REPLACE_ONE
POINTS: list[tuple[PrivacyEvent, int, NeighboringRelation]] = [
    (Shuffled(7, Gaussian(1.0)), 1, SPECIAL),
    (Shuffled(100, Gaussian(4.0)), 9, SPECIAL),
    (Shuffled(100, Gaussian(2.0)), 20, SPECIAL),
    (BallsInBins(4, Gaussian(0.7)), 3, SPECIAL),
    (BallsInBins(20, Gaussian(0.6)), 2, SPECIAL),
    (BallsInBins(50, Gaussian(0.5)), 2, SPECIAL),
    (SampledWithoutReplacement(100, 10, Gaussian(2.0)), 20, ONE),
    (SampledWithoutReplacement(20, 10, Gaussian(4.0)), 10, ONE),
    (SampledWithoutReplacement(30, 6, Gaussian(2.5)), 15, ONE),
    (TruncatedPoissonSampled(100, 0.2, 20, Gaussian(2.0)), 20, SPECIAL),
    (TruncatedPoissonSampled(50, 0.3, 12, Gaussian(2.0)), 10, SPECIAL),
    (TruncatedPoissonSampled(100, 0.2, 27, Gaussian(1.5)), 20, SPECIAL),
]


@pytest.mark.statistical
@pytest.mark.parametrize(("event", "count", "relation"), POINTS, ids=str)
def test_simulation_sees_no_error_and_would_see_one_of_five_percent(
    event: PrivacyEvent,
    count: int,
    relation: NeighboringRelation,
    generator: np.random.Generator,
) -> None:
    whole = SelfComposed(event, count)
    found = accountant_named("pld").guarantee(whole, delta=DELTA, relation=relation)
    simulation = simulated(event, count, generator)
    assert 0.3 < found.epsilon < 12
    assert agrees(simulation, found.epsilon)
    assert not agrees(simulation, 0.95 * found.epsilon)
    assert not agrees(simulation, 1.05 * found.epsilon)


class Undoubled(SampledSwap):
    """The planted fault: a place in a full batch is never given to somebody else."""

    @property
    def _of_a_member(self) -> SampledGaussian:
        return SampledGaussian(self.sampling_probability, self.noise_multiplier)


def faults() -> Iterator[tuple[PrivacyEvent, int, Callable[[PrivacyEvent], object]]]:
    swapped, cut = POINTS[6][0], POINTS[9][0]
    yield swapped, POINTS[6][1], lambda _: Undoubled(0.1, 2.0)
    yield cut, POINTS[9][1], lambda _: SampledGaussian(0.2, 2.0)
    yield POINTS[3][0], POINTS[3][1], lambda _: release_of(BallsInBins(5, Gaussian(0.7)))


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("event", "count", "wrong"),
    list(faults()),
    ids=lambda value: getattr(value, "__qualname__", str(value)),
)
def test_planted_faults_are_seen(
    event: PrivacyEvent,
    count: int,
    wrong: Callable[[PrivacyEvent], object],
    generator: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hf_dp.accounting.pld.release_of", wrong)
    relation = next(relation for point, _, relation in POINTS if point == event)
    whole = SelfComposed(event, count)
    claimed = accountant_named("pld").guarantee(whole, delta=DELTA, relation=relation).epsilon
    found, error = simulated(event, count, generator).delta(claimed)
    assert found > DELTA * LOOSENESS + SIGMAS * error
