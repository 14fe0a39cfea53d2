"""Edgeworth accounting against numbers that were computed elsewhere.

Cumulants: 30-digit quadrature (mpmath). Exact epsilons: contour integration. Estimates: an independent
prototype of the published formulas, checked against the authors' program; the noise multipliers are
those of the training logs released with EW-Tune (arXiv 2210.15042). Bounds: the published values of
the R package BoundEdgeworth 0.1.3.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_dp.accounting import EdgeworthAccountant, PLDAccountant, flatten
from hf_dp.accounting._losses import SampledGaussian
from hf_dp.accounting.edgeworth.characteristic import CharacteristicFunction
from hf_dp.accounting.edgeworth.cumulants import LossNodes, absolute_moments, of_sum, one_release
from hf_dp.accounting.edgeworth.series import (
    ORDERS,
    Order,
    estimated_delta,
    estimated_epsilon,
    looks_converged,
)
from hf_dp.accounting.edgeworth.theorems import (
    Standardised,
    bound_with_continuity,
    bound_without_regularity,
    frequencies_that_matter,
)
from hf_dp.events import Gaussian, PoissonSampled, PrivacyEvent, SelfComposed

pytestmark = pytest.mark.reference

CUMULANTS = [
    (0.01, 1.0, True, 8.38122076508e-5, 1.71630506247e-4, 1.25317964498e-5, 2.1832594681e-6),
    (0.01, 1.0, False, -8.18897691406e-5, 1.60086647696e-4, 1.06483852594e-5, 1.62580743916e-6),
    (0.05, 0.8, True, 3.79505630267e-3, 8.93693692192e-3, 5.01184495382e-3, 4.93572635332e-3),
    (0.05, 0.8, False, -3.24938424235e-3, 5.60954288961e-3, 2.18650823489e-3, 1.53256299073e-3),
    (0.01, 0.6, True, 5.72079110331e-4, 1.38318046398e-3, 9.48176123747e-4, 1.26886716065e-3),
    (0.01, 0.6, False, -4.80749403685e-4, 8.2029107448e-4, 3.31596530876e-4, 2.74404421291e-4),
]

# Sampling probability, noise, steps, delta; exact epsilon when one is removed; estimates of order 0 to 3.
ESTIMATES = [
    (0.01, 1.0, 1000, 1e-5, 1.828237, 1.794148, 1.894776, 1.931549, 1.921037),
    (0.01, 1.0, 1000, 1e-6, 2.124515, 2.012270, 2.130356, 2.196056, 2.227564),
    (0.01, 1.0, 10000, 1e-5, 6.187712, 6.308529, 6.380762, 6.301175, 6.224469),
    (0.01, 0.6, 1000, 1e-5, 7.433614, 5.587889, 6.197180, 6.675467, 7.084451),
    (0.01, 0.6, 100, 1e-5, 3.815599, 1.643294, 1.926235, 2.169124, 2.391778),
    (0.05, 0.8, 1000, 1e-5, 17.580738, 16.544791, 17.433614, 17.923955, 18.169546),
    (0.05, 2.0, 100, 1e-5, 1.097231, 1.108876, 1.159177, 1.155268, 1.115206),
    (0.01, 2.0, 1000, 1e-6, 0.720916, 0.739648, 0.740087, 0.726776, 0.721567),
    (0.001, 2.0, 10000, 1e-5, 0.173308, 0.176257, 0.173613, 0.173314, 0.173308),
    (0.001, 0.8, 10000, 1e-5, 0.782388, 0.778000, 0.805716, 0.812388, 0.819184),
    (0.001, 1.0, 10000, 1e-6, 0.555140, 0.567818, 0.571117, 0.562633, 0.557729),
    (0.05, 0.6, 100, 1e-5, 11.506409, 8.214544, 9.199640, 9.985408, 10.664404),
    (0.05, 1.0, 100, 1e-5, 3.502148, 2.963186, 3.258524, 3.475520, 3.647044),
    (2000 / 392702, 0.573, 3920, 1e-6, 9.599783, 7.341057, 7.986994, 8.489489, 8.916014),
]
ROWS = pytest.mark.parametrize("row", ESTIMATES, ids=lambda row: f"q{row[0]:.3g}-{row[1]}-{row[2]}")

# Sampling probability, noise, steps, epsilon; delta by orders 0 to 3.
DELTAS = [
    (0.01, 1.0, 1000, 1.8, 9.43590e-6, 2.28043e-5, 2.64339e-5, 2.15041e-5),
    (0.01, 1.0, 10000, 6.2, 1.41679e-5, 1.69655e-5, 1.32896e-5, 1.07369e-5),
    (0.01, 0.6, 1000, 7.4, 3.20629e-9, 6.40107e-8, 5.85039e-7, 3.20816e-6),
    (0.05, 0.8, 1000, 17.6, 1.93861e-6, 7.87305e-6, 1.53101e-5, 1.99214e-5),
    (0.05, 2.0, 100, 1.1, 1.14036e-5, 2.12032e-5, 1.79724e-5, 1.17205e-5),
    (0.01, 2.0, 1000, 0.7, 2.66080e-6, 2.47903e-6, 1.85218e-6, 1.67894e-6),
    (0.05, 0.8, 100, 2.5, 0.011459, 0.019768, 0.012397, 0.006029),
    (0.01, 1.0, 100, 0.15, 0.017156, 0.010171, 0.009656, 0.010254),
]


def sgd(probability: float, noise: float, num_steps: int) -> PrivacyEvent:
    return SelfComposed(PoissonSampled(probability, Gaussian(noise)), num_steps)


def estimate(
    probability: float, noise: float, num_steps: int, delta: float, order: Order
) -> float | None:
    releases = {SampledGaussian(probability, noise): num_steps}
    large, small = (of_sum(releases, "remove", large=large) for large in (True, False))
    return estimated_epsilon(large, small, delta, order)


@pytest.mark.parametrize("row", CUMULANTS, ids=str)
def test_cumulants_have_nine_digits(row: tuple[float, ...]) -> None:
    probability, noise, large, *expected = row
    found = one_release(SampledGaussian(probability, noise), "remove", large=bool(large))
    values = (found.mean, found.variance, found.third, found.fourth)
    assert values == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("probability", "noise", "skewness", "kurtosis", "third_plus_first"),
    [
        (0.01, 1.0, 5.5734, 74.117, 6.3367),
        (0.05, 2.0, 1.6017, 4.7035, 2.9667),
        (0.001, 0.6, 42.800, 6541.4, 43.126),
    ],
)
def test_standardised_moments(
    probability: float, noise: float, skewness: float, kurtosis: float, third_plus_first: float
) -> None:
    release = SampledGaussian(probability, noise)
    found = one_release(release, "remove", large=True)
    assert found.skewness == pytest.approx(skewness, rel=1e-4)
    assert found.excess_kurtosis == pytest.approx(kurtosis, rel=1e-4)
    standardised = Standardised.of(absolute_moments(release, "remove", large=True), 1)
    assert standardised.third_plus_first == pytest.approx(third_plus_first, rel=1e-4)
    assert standardised.fourth == pytest.approx(kurtosis + 3, rel=1e-4)


@pytest.mark.parametrize("probability", [1e-4, 0.01, 0.3, 0.9])
@pytest.mark.parametrize("noise", [0.3, 1.0, 5.0])
def test_the_loss_turns_each_world_into_the_other(probability: float, noise: float) -> None:
    nodes = LossNodes.of(SampledGaussian(probability, noise))
    assert nodes.absent @ np.exp(nodes.losses) == pytest.approx(1.0, abs=1e-10)
    assert nodes.present @ np.exp(-nodes.losses) == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_unsampled_noise_needs_no_correction(order: Order) -> None:
    releases = {SampledGaussian(1.0, 10.0): 100}
    large, small = (of_sum(releases, "remove", large=large) for large in (True, False))
    found = estimated_delta(large, small, np.array([1.0]), order)
    assert found[0] == pytest.approx(0.126936737507, abs=1e-9)


@ROWS
@pytest.mark.parametrize("order", ORDERS)
def test_estimates_of_every_order(row: tuple[float, ...], order: Order) -> None:
    probability, noise, num_steps, delta, _, *expected = row
    found = estimate(probability, noise, int(num_steps), delta, order)
    assert found == pytest.approx(expected[order], abs=1e-5)


@pytest.mark.parametrize("row", DELTAS, ids=lambda row: f"q{row[0]}-{row[1]}-{row[2]}")
@pytest.mark.parametrize("order", ORDERS)
def test_deltas_of_every_order(row: tuple[float, ...], order: Order) -> None:
    probability, noise, num_steps, epsilon, *expected = row
    releases = {SampledGaussian(probability, noise): int(num_steps)}
    large, small = (of_sum(releases, "remove", large=large) for large in (True, False))
    found = estimated_delta(large, small, np.array([epsilon]), order)[0]
    assert found == pytest.approx(expected[order], rel=1e-4)


@pytest.mark.parametrize(
    ("batch", "num_examples", "noise", "num_steps", "delta", "expected"),
    [
        (2000, 67349, 0.7865, 660, 1e-5, 7.99290),
        (2000, 104743, 0.711, 1040, 1e-5, 7.99797),
        (4000, 104743, 0.842, 520, 1e-5, 7.99999),
        (2000, 392702, 0.573, 3920, 1e-6, 7.98699),
    ],
)
def test_the_published_program_says_the_same(
    batch: int, num_examples: int, noise: float, num_steps: int, delta: float, expected: float
) -> None:
    found = estimate(batch / num_examples, noise, num_steps, delta, 1)
    assert found == pytest.approx(expected, abs=1e-4)


@ROWS
def test_epsilon_is_never_below_the_exact_one(row: tuple[float, ...]) -> None:
    probability, noise, num_steps, delta, exact, *_ = row
    event = sgd(probability, noise, int(num_steps))
    found = EdgeworthAccountant().guarantee(event, delta=delta)
    rounding = 0.5e-6
    assert exact - rounding <= found.epsilon <= exact * (1 + 4e-5) + rounding
    assert found.is_upper_bound
    assert found.lower is None or found.lower <= exact + rounding
    assert found.epsilon <= PLDAccountant().guarantee(event, delta=delta).epsilon


def test_the_first_order_reports_too_little_and_is_never_epsilon() -> None:
    low = estimate(0.01, 0.6, 100, 1e-5, 1)
    assert low is not None
    assert low < 0.51 * 3.815599
    found = EdgeworthAccountant().guarantee(sgd(0.01, 0.6, 100), delta=1e-5)
    assert found.epsilon >= 3.815598
    assert found.estimate is not None
    assert found.estimate < 0.6 * found.epsilon


@pytest.mark.parametrize(
    ("event", "delta", "converged"),
    [
        (sgd(0.01, 2.0, 10000), 1e-5, True),
        (sgd(0.01, 0.6, 100), 1e-5, False),
        (sgd(2000 / 392702, 0.573, 3920), 1e-6, False),
        (sgd(2000 / 363849, 0.58, 3620), 1e-6, False),
        (sgd(2000 / 104743, 0.7395, 1040), 1e-6, False),
        (sgd(2000 / 67349, 0.8215, 660), 1e-6, False),
    ],
)
def test_orders_that_disagree_are_seen(event: PrivacyEvent, delta: float, converged: bool) -> None:
    found = EdgeworthAccountant().estimates(flatten(event), delta)
    assert found.looks_converged is looks_converged(found.by_order) is converged


def test_explicit_bounds_have_their_published_values() -> None:
    third = 9.0**0.75
    loss = Standardised(0.621 * third, third, third + 1, 9.0, 1000)
    # Published: 0.1626857 and 0.1214038; the safe variants here must not be below them.
    assert bound_without_regularity(loss, 0.1) == pytest.approx(0.1756826, rel=1e-6)
    start, end = frequencies_that_matter(loss)
    with_continuity = bound_with_continuity(loss, 0.99**1000 * math.log(end / start), 0.1)
    assert 0.1214038 <= with_continuity <= 0.1214038 * 1.12


@pytest.mark.parametrize(
    ("count", "expected"),
    [(100, 1.064), (1000, 0.2899), (10**4, 0.0528), (10**6, 1.356e-3), (10**8, 1.27e-4)],
)
def test_the_bound_without_regularity_by_number_of_steps(count: int, expected: float) -> None:
    moments = absolute_moments(SampledGaussian(0.01, 1.0), "remove", large=True)
    found = bound_without_regularity(Standardised.of(moments, count))
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("noise", "count", "expected"),
    [
        (1.0, 100, (8.64e-3, 4.5e-3)),
        (1.0, 1000, (1.004e-3, 1.9e-4)),
        (1.0, 10000, (1.035e-4, 6.5e-6)),
        (2.0, 10000, (7.4e-6, 8e-8)),
    ],
)
def test_the_numeric_bound_is_nearly_the_sharpest(
    noise: float, count: int, expected: tuple[float, float]
) -> None:
    function = CharacteristicFunction({SampledGaussian(0.01, noise): count}, large=True)
    found = function.error_bounds()
    for order, value in zip((1, 2), expected, strict=True):
        # Theirs are quadratures of the integral that ours bounds; the second has two digits.
        assert value * 0.94 <= found[order] <= value * (1.025 if order == 1 else 1.07)


def test_the_interval_at_a_large_delta() -> None:
    probability = 0.08 * math.sqrt(math.log(1e6) / 1e6)
    found = EdgeworthAccountant().interval(flatten(sgd(probability, 0.8, 10**6)), 0.1)
    # The exact value is 0.3982; the published theorems alone give [0.340, 0.460].
    assert 0.39820 < found.lower < found.upper < 0.39825


def test_the_interval_says_nothing_above_where_delta_is_smaller_than_its_error() -> None:
    found = EdgeworthAccountant().interval(flatten(sgd(2000 / 392702, 0.573, 3920)), 1e-6)
    assert found.upper == math.inf
    assert 5.8 < found.lower < 9.599784


@pytest.mark.parametrize(
    ("num_examples", "num_steps", "delta", "published", "exact"),
    [(392702, 3920, 1e-6, 0.573, 0.6045), (67349, 660, 1e-5, 0.7865, 0.7982)],
)
def test_published_noise_is_rejected_and_calibration_finds_enough(
    num_examples: int, num_steps: int, delta: float, published: float, exact: float
) -> None:
    from hf_dp.cli.run import PoissonRun

    run = PoissonRun(2000 / num_examples, num_steps)
    accountant = EdgeworthAccountant()
    claimed = accountant.guarantee(
        run.with_noise_multiplier(published).event(), delta=delta
    ).epsilon
    assert claimed > 8.2
    found = accountant.calibrate(run, target_epsilon=8.0, target_delta=delta)
    assert exact - 1e-4 <= found.noise_multiplier <= exact * 1.001
    assert PLDAccountant().guarantee(found.event(), delta=delta).epsilon <= 8.0 * (1 + 3e-5)
