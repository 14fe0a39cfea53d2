"""The price of the best of several runs, against the theorems' formulas written out again."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_dp.accounting import RDPAccountant
from hf_dp.accounting.rdp import ORDERS, renyi_divergences
from hf_dp.accounting.tuning import Distribution, RandomRepeats, guarantee_of_best
from hf_dp.cli.run import PoissonRun
from hf_dp.errors import ConfigurationError, UnsupportedEventError
from hf_dp.events import Composed, Gaussian, NonPrivate, PoissonSampled, SelfComposed

RUN = PoissonRun(0.01, 1000, 1.0).event()

# Mean number of runs; epsilon at delta 1e-6 (an independent implementation of the formulas).
VALUES: dict[Distribution, dict[float, float]] = {
    "poisson": {3: 3.1659, 10: 4.6705, 30: 8.5640},
    "geometric": {3: 3.6681, 10: 4.4312, 30: 5.0148},
    "logarithmic": {3: 3.3388, 10: 3.8506, 30: 4.2382},
}


@pytest.mark.reference
@pytest.mark.parametrize("distribution", VALUES)
def test_the_price_of_selection_has_its_reference_values(distribution: Distribution) -> None:
    for mean, value in VALUES[distribution].items():
        found = guarantee_of_best(RUN, RandomRepeats(mean, distribution), delta=1e-6)
        # Their orders are coarser, so theirs may be slightly larger.
        assert value * (1 - 3e-3) <= found.epsilon <= value * (1 + 1e-4)
        assert (found.accountant, found.is_upper_bound, found.delta) == ("rdp", True, 1e-6)


@pytest.mark.parametrize("mean", [1.5, 4.0, 25.0])
def test_a_geometric_number_of_runs_follows_the_theorem(mean: float) -> None:
    # Theorem 2 with eta = 1: two more terms with the best of all orders.
    orders = np.array(ORDERS)
    one = 1000 * renyi_divergences(PoissonSampled(0.01, Gaussian(1.0)))
    gamma = 1 / mean
    extra = 2 * np.min((1 - 1 / orders) * one + math.log(1 / gamma) / orders)
    best = one + extra + math.log(mean) / (orders - 1)
    conversion = np.log1p(-1 / orders) - np.log(1e-6 * orders) / (orders - 1)
    expected = float(np.min(best + conversion))
    found = guarantee_of_best(RUN, RandomRepeats(mean, "geometric"), delta=1e-6)
    assert found.epsilon == pytest.approx(expected, rel=1e-6)


def test_the_best_costs_more_than_one_run_and_many_less_than_all() -> None:
    one = RDPAccountant().guarantee(RUN, delta=1e-6).epsilon
    every = RDPAccountant().guarantee([RUN] * 30, delta=1e-6).epsilon
    costs = [
        guarantee_of_best(RUN, RandomRepeats(mean), delta=1e-6).epsilon for mean in (2, 10, 30)
    ]
    assert one < costs[0] < costs[1] < costs[2] < every / 3


@pytest.mark.parametrize("distribution", VALUES)
def test_runs_that_cost_nothing_by_themselves_have_a_best_that_does(
    distribution: Distribution,
) -> None:
    """One run fails with a chance below delta; the best of a thousand fails much more often."""
    run = PoissonSampled(1e-5, Gaussian(1.0))
    assert RDPAccountant().guarantee(run, delta=1e-4).epsilon == 0.0
    found = guarantee_of_best(run, RandomRepeats(1000.0, distribution), delta=1e-4).epsilon
    assert found > 0.5


def test_releases_that_can_be_read_only_once_are_counted() -> None:
    repeats = RandomRepeats(5.0)
    found = guarantee_of_best(iter([RUN, RUN]), repeats, delta=1e-6)
    assert found == guarantee_of_best([RUN, RUN], repeats, delta=1e-6)


def test_runs_of_several_releases_are_composed_first() -> None:
    twice = Composed((RUN, SelfComposed(Gaussian(20.0), 4)))
    repeats = RandomRepeats(5.0)
    assert (
        guarantee_of_best(twice, repeats, delta=1e-6).epsilon
        > guarantee_of_best(RUN, repeats, delta=1e-6).epsilon
    )


def test_nothing_and_everything() -> None:
    repeats = RandomRepeats(5.0)
    assert guarantee_of_best(Composed(()), repeats, delta=1e-6).epsilon == 0.0
    assert guarantee_of_best(NonPrivate("no noise"), repeats, delta=1e-6).epsilon == math.inf
    with pytest.raises(UnsupportedEventError):
        guarantee_of_best(PoissonSampled(0.1, NonPrivate("x")), repeats, delta=1e-6)


@pytest.mark.parametrize("mean", [0.0, 1.0, -3.0, math.nan, math.inf])
def test_numbers_of_runs_out_of_range_are_refused(mean: float) -> None:
    with pytest.raises(ConfigurationError, match=r"RandomRepeats\.mean"):
        RandomRepeats(mean)


def test_less_than_one_run_in_the_mean_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"RandomRepeats\.mean=0\.4: expected at least 1"):
        RandomRepeats(0.4, "poisson")


def test_a_poisson_number_of_runs_may_be_one_in_the_mean() -> None:
    assert guarantee_of_best(RUN, RandomRepeats(1.0, "poisson"), delta=1e-6).epsilon > 2.4


def test_unknown_distributions_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'poisson'"):
        RandomRepeats(3.0, "poison")  # type: ignore[arg-type]
