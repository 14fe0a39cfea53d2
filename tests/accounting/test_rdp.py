"""RDP: an upper bound for every delta, silent about the orders that it leaves out."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable

import numpy as np
import pytest

from hf_dp.accounting import PLDAccountant, RDPAccountant
from hf_dp.accounting.rdp import ORDERS, epsilon_bounds, renyi_divergences
from hf_dp.events import Composed, Gaussian, PoissonSampled, PrivacyEvent, SelfComposed

Sgd = Callable[[float, float, int], PrivacyEvent]


def epsilon(event: PrivacyEvent, delta: float) -> float:
    return RDPAccountant().guarantee(event, delta=delta).epsilon


def divergence_by_quadrature(
    probability: float, noise: float, order: float, direction: str
) -> float:
    z, step = np.linspace(-40 * noise, 1 + 40 * noise + order, 400_001, retstep=True)
    absent = -((z / noise) ** 2) / 2 - math.log(noise * math.sqrt(2 * math.pi))
    ratio = np.logaddexp(
        math.log1p(-probability), math.log(probability) + (2 * z - 1) / (2 * noise**2)
    )
    exponent = order * ratio if direction == "remove" else (1 - order) * ratio
    return float(np.log(np.sum(np.exp(absent + exponent)) * step) / (order - 1))


@pytest.mark.reference
@pytest.mark.parametrize(
    ("event", "value"),
    [
        (SelfComposed(PoissonSampled(0.01, Gaussian(1.0)), 1000), 2.4367),
        (Gaussian(2.0), 2.419),
    ],
)
def test_epsilon_agrees_with_published_orders(event: PrivacyEvent, value: float) -> None:
    # Their orders are coarser, so theirs may be slightly larger, never ours.
    assert value * (1 - 2e-3) <= epsilon(event, 1e-6) <= value * (1 + 5e-5)


@pytest.mark.parametrize(("probability", "noise"), [(0.01, 1.0), (0.1, 2.0), (0.5, 4.0)])
def test_divergences_bound_both_directions(probability: float, noise: float) -> None:
    found = dict(
        zip(ORDERS, renyi_divergences(PoissonSampled(probability, Gaussian(noise))), strict=True)
    )
    for order in (1.5, 2.0, 3.7, 8.0, 16.0):
        removed = divergence_by_quadrature(probability, noise, order, "remove")
        added = divergence_by_quadrature(probability, noise, order, "add")
        assert found[order] >= max(removed, added) * (1 - 1e-9)
        if order.is_integer():  # at fractions dp-accounting's series is an upper bound itself
            assert found[order] == pytest.approx(removed, rel=1e-6)


@pytest.mark.parametrize("noise", [0.5, 1.0, 5.0])
def test_unsampled_divergences_have_their_closed_form(noise: float) -> None:
    expected = np.array(ORDERS) / (2 * noise**2)
    np.testing.assert_allclose(renyi_divergences(Gaussian(noise)), expected, rtol=1e-9)


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("noise", [0.6, 2.0])
def test_rdp_is_never_below_pld(probability: float, noise: float, sgd: Sgd) -> None:
    for num_steps, delta in ((1, 1e-5), (100, 1e-7), (3000, 1e-5)):
        event = sgd(probability, noise, num_steps)
        tight = PLDAccountant().guarantee(event, delta=delta).epsilon
        assert epsilon(event, delta) >= tight * (1 - 1e-9)


def test_divergences_of_different_releases_add_up() -> None:
    first, second = PoissonSampled(0.01, Gaussian(1.0)), Gaussian(20.0)
    total = 300 * renyi_divergences(first) + 7 * renyi_divergences(second)
    orders = np.array(ORDERS)
    expected = np.min(total + np.log1p(-1 / orders) - np.log(1e-6 * orders) / (orders - 1))
    event = Composed((SelfComposed(first, 300), SelfComposed(second, 7)))
    assert epsilon(event, 1e-6) == pytest.approx(expected, rel=1e-12)


def test_bounds_for_many_steps_are_those_of_each() -> None:
    leaf = PoissonSampled(0.02, Gaussian(1.1))
    many = epsilon_bounds({leaf: 2}, 1e-5, 3, 50)
    each = [epsilon(SelfComposed(leaf, 2 * steps), 1e-5) for steps in range(3, 51)]
    np.testing.assert_allclose(many, each, rtol=1e-12)


@pytest.mark.parametrize(("probability", "noise"), [(0.5, 5.0), (0.2, 0.6), (0.05, 0.4)])
def test_orders_that_do_not_converge_are_left_out_silently(
    probability: float, noise: float, sgd: Sgd, caplog: pytest.LogCaptureFixture
) -> None:
    renyi = renyi_divergences(PoissonSampled(probability, Gaussian(noise * 1.000001)))
    assert np.isinf(renyi).any(), "a setting that does not show the fault"
    assert 0 < epsilon(sgd(probability, noise * 1.000001, 100), 1e-5) < math.inf
    assert caplog.records == []
    assert logging.getLogger("absl").filters == []


def test_rounding_never_reads_as_perfect_privacy() -> None:
    # The true divergences are below the rounding of the sums that they come from: some come out < 0.
    release = PoissonSampled(1e-9, Gaussian(1e4))
    assert np.all(renyi_divergences(release) >= np.array(ORDERS) * 1e-18 * 1e-8 / 2)


def test_delta_above_the_total_variation_needs_no_epsilon(sgd: Sgd) -> None:
    assert epsilon(sgd(1e-4, 5.0, 1), 0.01) == 0.0
    assert epsilon(sgd(1e-4, 5.0, 1), 1e-12) > 0.0


def test_more_noise_fewer_steps_and_larger_delta_cost_less(sgd: Sgd) -> None:
    noises = [epsilon(sgd(0.01, noise, 500), 1e-6) for noise in (0.5, 0.8, 0.81, 1.0, 2.0, 8.0)]
    steps = [epsilon(sgd(0.01, 1.0, steps), 1e-6) for steps in (5000, 1000, 999, 100, 10, 1)]
    deltas = [epsilon(sgd(0.01, 1.0, 500), delta) for delta in (1e-300, 1e-30, 1e-6, 1e-3)]
    for falling in (noises, steps, deltas):
        assert all(a > b for a, b in itertools.pairwise(falling)), falling
