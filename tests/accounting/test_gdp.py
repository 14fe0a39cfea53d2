"""GDP's central limit theorem: a number to look at, which decides nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from hf_dp.accounting import (
    ACCOUNTANTS,
    ESTIMATORS,
    GDPAccountant,
    PLDAccountant,
    accountant_named,
    accountant_or_estimator_named,
)
from hf_dp.accounting.gdp import estimated_epsilon
from hf_dp.cli.run import PoissonRun
from hf_dp.errors import ConfigurationError, UnsupportedEventError
from hf_dp.events import Gaussian, NonPrivate, PoissonSampled, SelfComposed

# Ratios to PLD at delta 1e-5 (an independent implementation, three digits).
RATIOS = [
    (0.001, 0.6, 100, 0.7796, 0.156),
    (0.01, 0.6, 10000, 23.0176, 1.018),
    (0.01, 1.0, 1000, 1.8282, 0.885),
    (0.05, 0.6, 10000, 175.4068, 1.542),
    (0.05, 2.0, 10000, 14.3840, 0.996),
]


@pytest.mark.reference
@pytest.mark.parametrize("row", RATIOS, ids=str)
def test_the_estimate_has_its_reference_values(row: tuple[float, float, int, float, float]) -> None:
    probability, noise, num_steps, exact, ratio = row
    found = GDPAccountant().guarantee(PoissonRun(probability, num_steps, noise).event(), delta=1e-5)
    assert found.estimate is not None
    assert found.estimate / exact == pytest.approx(ratio, abs=6e-4)


def test_the_estimate_is_no_epsilon() -> None:
    event = PoissonRun(0.01, 1000, 1.0).event()
    found = GDPAccountant().guarantee(event, delta=1e-5)
    assert (found.epsilon, found.is_upper_bound, found.lower) == (math.inf, False, None)
    assert found.estimate is not None
    assert found.estimate < 0.9 * PLDAccountant().guarantee(event, delta=1e-5).epsilon


def test_an_estimate_neither_chooses_noise_nor_draws_curves() -> None:
    run = PoissonRun(0.01, 1000)
    for decide in (
        lambda: GDPAccountant().calibrate(run, target_epsilon=1.0, target_delta=1e-5),
        lambda: GDPAccountant().curve(run.event(), num_steps=3, delta=1e-5),
        lambda: accountant_named("gdp"),
    ):
        with pytest.raises(ConfigurationError, match=r"name='gdp'.*Use accountant='pld'"):
            decide()


def test_estimators_are_not_among_the_accountants() -> None:
    assert not set(ESTIMATORS) & set(ACCOUNTANTS)
    assert accountant_or_estimator_named("gdp").name == "gdp"
    assert accountant_or_estimator_named("rdp").name == "rdp"
    with pytest.raises(ConfigurationError, match="Did you mean 'pld'"):
        accountant_or_estimator_named("pdl")


def test_unsampled_noise_is_exact(gaussian_epsilon: Callable[[float, float], float]) -> None:
    found = GDPAccountant().guarantee(SelfComposed(Gaussian(10.0), 25), delta=1e-5)
    assert found.estimate == pytest.approx(gaussian_epsilon(2.0, 1e-5), rel=1e-9)


def test_extremes_are_a_number_or_nothing() -> None:
    assert estimated_epsilon({Gaussian(1e9): 1}, 1e-5) == 0.0
    assert estimated_epsilon({PoissonSampled(0.5, Gaussian(0.01)): 1000}, 1e-5) is None
    found = GDPAccountant().guarantee(NonPrivate("no noise"), delta=1e-5)
    assert (found.epsilon, found.estimate) == (math.inf, None)


def test_what_has_no_limit_theorem_is_refused() -> None:
    with pytest.raises(UnsupportedEventError, match="gdp"):
        GDPAccountant().guarantee(PoissonSampled(0.1, NonPrivate("x")), delta=1e-5)


def test_training_refuses_an_estimator_by_name() -> None:
    from hf_dp.training.arguments import DPArguments

    for name in ACCOUNTANTS:
        assert DPArguments(target_epsilon=1.0, accountant=name).accountant == name
    with pytest.raises(
        ConfigurationError, match=r"accountant='gdp': expected one of \['edgeworth'"
    ):
        DPArguments(target_epsilon=1.0, accountant="gdp")
