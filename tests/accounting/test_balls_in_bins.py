"""One pass of balls in bins: a bound from above at any size, close to quadrature and to simulation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.special import ndtr

from hf_dp.accounting import _balls_in_bins, accountant_named
from hf_dp.accounting._balls_in_bins import (
    BallsInBinsPass,
    GridSum,
    added,
    doubled,
    lognormal,
    sum_of_lognormals,
)
from hf_dp.accounting._losses import DIRECTIONS
from hf_dp.events import BallsInBins, Gaussian, NeighboringRelation, PoissonSampled, SelfComposed

Floats = NDArray[np.float64]
EPSILONS = np.array([0.0, 0.05, 0.3, 1.0, 2.0, 4.0])


def lognormal_call(strikes: Floats, sigma: float) -> Floats:
    """E max(s - k, 0) of one lognormal of mean 1: the formula of Black and Scholes."""
    low = strikes <= 0
    logs = np.log(np.where(low, 1.0, strikes))
    calls = ndtr(0.5 / sigma - logs * sigma) - strikes * ndtr(-0.5 / sigma - logs * sigma)
    exact: Floats = np.where(low, 1.0 - strikes, calls)
    return exact


def exact_call(level: float, sigma: float, count: int) -> float:
    """E max(S - level, 0) for the mean S of two or three lognormals, by quadrature over all but one."""

    def call_after(output: float, left: float, count: int) -> float:
        """The density at one output, times the call on the others."""
        density = math.exp(-(output**2) / 2) / math.sqrt(2 * math.pi)
        return density * call(left - math.exp(output / sigma - 0.5 / sigma**2), count - 1)

    def call(level: float, count: int) -> float:
        """E max(sum - level, 0)."""
        if count == 1:
            return float(lognormal_call(np.array([level]), sigma)[0])
        if level <= 0:
            return count - level
        kink = sigma * (math.log(level) + 0.5 / sigma**2)  # beyond it this one lognormal is enough
        accuracy = {"epsabs": 1e-10, "epsrel": 1e-8, "limit": 200}
        ends = [(-12, kink), (kink, 12)] if abs(kink) < 12 else [(-12, 12)]
        return sum(
            quad(call_after, low, high, args=(level, count), **accuracy)[0] for low, high in ends
        )

    return call(count * level, count) / count


def delta_of(law: BallsInBinsPass, epsilon: float, direction: str, interval: float) -> float:
    loss = law.discretised(direction, interval)  # type: ignore[arg-type]
    losses = (loss.lowest + np.arange(len(loss.probabilities))) * loss.interval
    rest = np.maximum(-np.expm1(epsilon - losses), 0.0)
    return float(np.dot(loss.probabilities, rest) + loss.infinity_mass)


@pytest.mark.parametrize(
    ("sigma", "count", "epsilons"),
    [
        (0.4, 2, [0.0, 1.0, 4.0]),
        (1.0, 2, [0.0, 0.05, 0.3, 1.0, 2.0]),
        (3.0, 2, [0.0, 0.05, 0.3]),
        (1.0, 3, [0.3]),
    ],
)
def test_small_passes_agree_with_quadrature_from_above(
    sigma: float, count: int, epsilons: list[float]
) -> None:
    law = BallsInBinsPass(count, sigma)
    for epsilon in epsilons:
        removed = exact_call(math.exp(epsilon), sigma, count)
        # E max(1 - e^eps S, 0) is a call on S, plus 1 - e^eps as S has mean 1.
        gone = math.exp(epsilon) * exact_call(math.exp(-epsilon), sigma, count) - math.expm1(
            epsilon
        )
        for direction, exact in (("remove", removed), ("add", gone)):
            bound = delta_of(law, epsilon, direction, 1e-3)
            assert exact - 1e-9 <= bound <= exact * 1.003 + 1e-9, (epsilon, direction)


@pytest.mark.parametrize("interval", [0.3, 0.03])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_coarser_grid_only_raises_the_bound(direction: str, interval: float) -> None:
    law = BallsInBinsPass(37, 0.8)
    for epsilon in EPSILONS:
        fine = delta_of(law, epsilon, direction, 1e-3)
        assert delta_of(law, epsilon, direction, interval) >= fine * (1 - 1e-9)


def test_a_coarser_grid_of_sums_only_raises_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = BallsInBinsPass(37, 0.8)
    wanted = {e: delta_of(fine, e, "remove", 1e-3) for e in EPSILONS}
    sum_of_lognormals.cache_clear()
    monkeypatch.setattr(_balls_in_bins, "_FINENESS", 0.1)
    monkeypatch.setattr(_balls_in_bins, "_COARSEST", 0.2)
    coarse = BallsInBinsPass(37, 0.8)
    assert all(delta_of(coarse, e, "remove", 1e-3) > wanted[e] for e in EPSILONS)
    sum_of_lognormals.cache_clear()


def mean_and_mass(law: GridSum) -> tuple[float, float]:
    mean = float(np.dot(law.probabilities, np.exp(law.logs)) + law.lost)
    return mean, float(law.probabilities.sum() + law.zero)


@pytest.mark.parametrize(
    ("sigma", "count"),
    [*itertools.product([0.3, 0.7, 2.0, 20.0], [1, 2, 3, 7]), (0.3, 1001), (0.7, 101), (2.0, 300)],
)
def test_rounding_changes_neither_mean_nor_mass(sigma: float, count: int) -> None:
    """Both by less than the slack that is added for it."""
    mean, mass = mean_and_mass(sum_of_lognormals(sigma, count))
    assert mean / count == pytest.approx(1, abs=0.9 * _balls_in_bins._VALUE_SLACK)
    assert mass == pytest.approx(1, abs=_balls_in_bins._PROBABILITY_SLACK / 10)


def test_doubling_is_adding_to_itself() -> None:
    law = lognormal(0.9, 0.02)
    one, other = doubled(law), added(law, law)
    assert one.first == other.first
    np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=1e-9, atol=1e-22)


def test_cutting_moves_values_without_a_change_of_mean() -> None:
    law = lognormal(0.5, 0.05)
    cut = law.cut(100, 300)
    assert len(cut.probabilities) == 200
    assert cut.zero > law.zero
    assert cut.lost > law.lost
    assert mean_and_mass(cut) == pytest.approx(mean_and_mass(law), abs=1e-13)


def test_a_pair_that_gains_mean_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: values rounded down instead of spread, which would look more private."""
    real = _balls_in_bins._add_pairs

    def lossy(sums: Floats, *args: Any, **options: Any) -> None:
        scratch = np.zeros_like(sums)
        real(scratch, *args, **options)
        sums[:-1] += scratch[1:]

    sum_of_lognormals.cache_clear()
    monkeypatch.setattr(_balls_in_bins, "_add_pairs", lossy)
    mean, _ = mean_and_mass(sum_of_lognormals(1.0, 100))
    sum_of_lognormals.cache_clear()
    assert abs(mean / 100 - 1) > 1e-3


@pytest.mark.parametrize(
    ("sigma", "count", "delta", "published"),
    [
        (0.5, 1000, 1e-6, 4.1061),
        (0.7, 1000, 1e-5, 0.5840),
        (0.8, 250, 1e-5, 0.7886),
        (1.0, 100, 1e-5, 0.6209),
    ],
)
@pytest.mark.reference
def test_one_pass_has_the_epsilon_of_an_extrapolated_grid(
    sigma: float, count: int, delta: float, published: float
) -> None:
    """Values of an independent program, its grid refined by Richardson's method."""
    found = accountant_named("pld").guarantee(BallsInBins(count, Gaussian(sigma)), delta=delta)
    assert published * (1 - 5e-4) <= found.epsilon <= published * (1 + 5e-4)


@pytest.mark.parametrize(("passes", "published"), [(1, 0.622), (10, 1.709), (50, 4.083)])
@pytest.mark.reference
def test_passes_compose_to_the_published_epsilon(passes: int, published: float) -> None:
    """Bounds of an independent program on a coarser grid, 0.5% above."""
    event = SelfComposed(BallsInBins(100, Gaussian(1.0)), passes)
    found = accountant_named("pld").guarantee(event, delta=1e-5).epsilon
    assert published * 0.99 <= found <= published


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_special"])
def test_passes_are_more_private_than_shuffling_and_about_as_private_as_poisson(
    relation: str,
) -> None:
    pld = accountant_named("pld")
    neighbours = NeighboringRelation(relation)

    def epsilon(event: PoissonSampled | BallsInBins | Gaussian, count: int) -> float:
        return pld.guarantee(SelfComposed(event, count), delta=1e-6, relation=neighbours).epsilon

    noise = Gaussian(0.8)
    bins, poisson = BallsInBins(200, noise), PoissonSampled(1 / 200, noise)
    assert 0.7 * epsilon(poisson, 600) < epsilon(bins, 3) < 1.1 * epsilon(poisson, 600)
    assert epsilon(bins, 3) < 0.5 * epsilon(noise, 3)
