"""Many random runs against dp-accounting, and a few against simulated losses."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent, pld

from hf_dp.accounting import EdgeworthAccountant, PLDAccountant, RDPAccountant
from hf_dp.accounting import pld as pld_module
from hf_dp.accounting._losses import SampledGaussian
from hf_dp.cli.run import PoissonRun

Point = tuple[float, float, int, float]


def random_runs(count: int) -> list[Point]:
    """Sampling probability, noise, steps, delta; each log-uniform over what people train with."""
    generator = np.random.default_rng(20240517)
    runs = []
    while len(runs) < count:
        probability = math.exp(generator.uniform(math.log(1e-3), math.log(0.5)))
        noise = math.exp(generator.uniform(math.log(0.5), math.log(6.0)))
        num_steps = int(math.exp(generator.uniform(math.log(5), math.log(3000))))
        delta = 10 ** generator.uniform(-7, -4)
        if probability * math.sqrt(num_steps) / noise < 5:  # else nothing is protected
            runs.append((probability, noise, num_steps, delta))
    return runs


@pytest.mark.slow
@pytest.mark.reference
def test_two_hundred_random_runs_agree_with_dp_accounting() -> None:
    apart = []
    for probability, noise, num_steps, delta in random_runs(200):
        interval = 2e-3
        theirs = pld.PLDAccountant(value_discretization_interval=interval)
        step = PoissonSampledDpEvent(probability, GaussianDpEvent(noise))
        theirs.compose(SelfComposedDpEvent(step, num_steps))
        bound = theirs.get_epsilon(delta)
        releases = {SampledGaussian(probability, noise): num_steps}
        same_grid = pld_module._epsilon_on_grid(releases, delta, interval)
        event = PoissonRun(probability, num_steps, noise).event()
        fine = PLDAccountant().guarantee(event, delta=delta).epsilon
        # On one grid both compute the same number, but for the mass that each leaves out; on the finer
        # one of our own choice the bound is the sharper.
        if abs(same_grid - bound) > 1e-5 * bound + 1e-9 or fine > bound * (1 + 1e-6) + 1e-9:
            apart.append((probability, noise, num_steps, delta, bound, same_grid, fine))
    assert apart == []


@pytest.mark.slow
def test_bounds_of_random_runs_are_in_order() -> None:
    for probability, noise, num_steps, delta in random_runs(30):
        event = PoissonRun(probability, num_steps, noise).event()
        found = EdgeworthAccountant().guarantee(event, delta=delta)
        certified = PLDAccountant().guarantee(event, delta=delta).epsilon
        assert (found.lower or 0.0) <= found.epsilon <= certified
        assert certified <= RDPAccountant().guarantee(event, delta=delta).epsilon
        assert found.estimate is None or 0 <= found.estimate < math.inf


POINTS: list[Point] = [(0.05, 0.8, 100, 1e-2), (0.01, 0.7, 200, 5e-3), (0.2, 2.0, 50, 1e-2)]
NUM_RUNS = 200_000


@cache
def simulated_losses(probability: float, noise: float, num_steps: int) -> np.ndarray:
    """Losses of whole runs that hold the unit, ``(NUM_RUNS,)``: drawn, not computed."""
    generator = np.random.default_rng(7)
    total = np.zeros(NUM_RUNS)
    for _ in range(num_steps):
        drawn = generator.random(NUM_RUNS) < probability
        output = drawn + noise * generator.standard_normal(NUM_RUNS)
        total += np.log1p(probability * np.expm1((2 * output - 1) / (2 * noise**2)))
    return total


def looks_right(point: Point, epsilon: float) -> bool:
    """Whether the simulated delta at `epsilon` is that of the point, within five deviations."""
    probability, noise, num_steps, delta = point
    gains = np.maximum(-np.expm1(epsilon - simulated_losses(probability, noise, num_steps)), 0.0)
    deviation = float(np.std(gains)) / math.sqrt(NUM_RUNS)
    return abs(float(np.mean(gains)) - delta) <= 5 * deviation


@pytest.mark.statistical
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_simulated_runs_lose_what_is_claimed(point: Point) -> None:
    """Chance of a false alarm: 6e-7 per point (five standard deviations, two-sided)."""
    probability, noise, num_steps, delta = point
    event = PoissonRun(probability, num_steps, noise).event()
    for accountant in (PLDAccountant(), EdgeworthAccountant()):
        epsilon = accountant.guarantee(event, delta=delta).epsilon
        assert looks_right(point, epsilon)
        # An error of 5% in epsilon, either way, is seen.
        assert not looks_right(point, 0.95 * epsilon)
        assert not looks_right(point, 1.05 * epsilon)
