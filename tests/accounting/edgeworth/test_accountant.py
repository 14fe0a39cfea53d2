"""The Edgeworth accountant: an estimate that is called one, an interval and an epsilon that hold."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from hf_dp.accounting import EdgeworthAccountant, PLDAccountant, flatten
from hf_dp.accounting._losses import SampledGaussian
from hf_dp.accounting.edgeworth import interval as interval_module
from hf_dp.accounting.edgeworth.cumulants import Cumulants, LossNodes, of_sum, one_release
from hf_dp.accounting.edgeworth.series import (
    ORDERS,
    estimated_delta,
    estimated_epsilon,
    looks_converged,
)
from hf_dp.accounting.pld import PLDAccountant as Certificate
from hf_dp.cli.run import PoissonRun
from hf_dp.errors import PrivacyError
from hf_dp.events import (
    Composed,
    Gaussian,
    NeighboringRelation,
    NonPrivate,
    PoissonSampled,
    PrivacyEvent,
    SelfComposed,
    Shuffled,
)

Exact = Callable[..., float]

MIXED = Composed(
    (
        SelfComposed(PoissonSampled(0.01, Gaussian(0.9)), 400),
        SelfComposed(PoissonSampled(0.05, Gaussian(2.0)), 100),
        SelfComposed(Gaussian(30.0), 20),
    )
)
RUNS = [
    (PoissonRun(0.01, 2000, 2.0).event(), 1e-5),
    (PoissonRun(0.01, 10000, 1.0).event(), 1e-5),
    (PoissonRun(0.01, 10000, 1.0).event(), 1e-2),
    (PoissonRun(0.05, 1000, 1.0).event(), 1e-5),
    (PoissonRun(0.05, 10000, 1.0).event(), 1e-6),
    (PoissonRun(0.001, 10000, 1.0).event(), 1e-4),
    (PoissonRun(0.3, 200, 3.0).event(), 1e-7),
    (MIXED, 1e-3),
]


@pytest.mark.parametrize(("event", "delta"), RUNS, ids=lambda value: str(value)[:60])
def test_the_interval_holds_the_exact_epsilon(
    event: PrivacyEvent, delta: float, exact_epsilon: Exact
) -> None:
    accountant = EdgeworthAccountant()
    found = accountant.interval(flatten(event), delta)
    assert 0 < found.lower < found.upper < math.inf
    near = accountant.guarantee(event, delta=delta).epsilon
    exact = exact_epsilon(event, delta, near=near)
    assert found.lower <= exact * (1 + 1e-9)
    assert found.upper >= exact * (1 - 1e-9)
    assert near >= exact * (1 - 1e-9)


@pytest.mark.parametrize("fault", ["shrunk", "one direction"])
def test_an_interval_that_is_too_narrow_would_be_seen(
    fault: str, exact_epsilon: Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    event, delta = RUNS[3]
    exact = exact_epsilon(event, delta, near=11.0)
    if fault == "shrunk":
        original = interval_module._distances
        monkeypatch.setattr(
            interval_module,
            "_distances",
            lambda releases, large: {
                order: 1e-3 * bound for order, bound in original(releases, large=large).items()
            },
        )
    else:
        monkeypatch.setattr(interval_module, "DIRECTIONS", ("add",))
    releases = ((SampledGaussian(0.05, 1.0), 1000),)
    found = interval_module.interval.__wrapped__(releases, delta)
    assert not found.lower <= exact <= found.upper


def test_the_lower_end_is_an_epsilon_that_does_not_hold(exact_delta: Exact) -> None:
    event, delta = RUNS[1]
    lower = EdgeworthAccountant().guarantee(event, delta=delta).lower
    assert lower is not None
    assert exact_delta(event, lower) >= delta


def test_epsilon_is_the_certificate_where_the_interval_is_open() -> None:
    event = PoissonRun(0.01, 1000, 0.6).event()
    accountant = EdgeworthAccountant()
    assert accountant.interval(flatten(event), 1e-5).upper == math.inf
    certified = PLDAccountant().guarantee(event, delta=1e-5).epsilon
    assert accountant.guarantee(event, delta=1e-5).epsilon == certified


def test_epsilon_is_the_interval_s_end_where_that_is_sharper(exact_delta: Exact) -> None:
    event = PoissonRun(0.05, 10000, 2.0).event()
    found = EdgeworthAccountant().guarantee(event, delta=1e-3)
    assert found.epsilon < PLDAccountant().guarantee(event, delta=1e-3).epsilon
    assert exact_delta(event, found.epsilon) <= 1e-3


def test_losses_that_nothing_samples_are_exact(
    gaussian_epsilon: Callable[[float, float], float],
) -> None:
    found = EdgeworthAccountant().guarantee(SelfComposed(Gaussian(10.0), 100), delta=1e-5)
    exact = gaussian_epsilon(1.0, 1e-5)
    assert found.estimate == pytest.approx(exact, rel=1e-9)
    assert found.lower is not None
    assert found.lower <= exact <= found.epsilon <= exact * (1 + 1e-6)


def test_two_proofs_that_contradict_each_other_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Certificate, "_epsilon", lambda self, leaves, delta: 0.5)
    with pytest.raises(PrivacyError, match=r"EdgeworthAccountant\.lower=.*contradict"):
        EdgeworthAccountant().guarantee(RUNS[0][0], delta=1e-5)


def test_the_estimate_is_only_beside_epsilon() -> None:
    found = EdgeworthAccountant().guarantee(PoissonRun(0.01, 1000, 1.0).event(), delta=1e-5)
    assert (found.accountant, found.is_upper_bound) == ("edgeworth", True)
    assert found.estimate == pytest.approx(1.931549, abs=1e-5)
    exact_run = EdgeworthAccountant().guarantee(
        [RUNS[0][0], NonPrivate("the exact loss")], delta=1e-5
    )
    assert (exact_run.epsilon, exact_run.lower, exact_run.estimate) == (math.inf, None, None)


def test_nothing_is_said_to_be_too_small_for_a_shuffled_run() -> None:
    """Its epsilon is that of the worst order, which is not the one that was drawn."""
    shuffled = SelfComposed(Shuffled(100, Gaussian(3.0)), 4)
    found = EdgeworthAccountant().guarantee(
        shuffled, delta=1e-5, relation=NeighboringRelation.REPLACE_SPECIAL
    )
    known = EdgeworthAccountant().guarantee(SelfComposed(Gaussian(3.0), 4), delta=1e-5)
    assert found.lower is None
    assert known.lower == pytest.approx(found.epsilon, rel=1e-4)


def test_a_series_without_a_crossing_is_no_number() -> None:
    # delta(0) estimated below zero and never above delta.
    odd = Cumulants(0.01, 0.01, -0.02, 0.5, -3.0)
    negative = estimated_delta(odd.mirrored(), odd, np.linspace(0, 1.3, 99), 0)
    assert np.all(negative < 0)
    assert estimated_epsilon(odd.mirrored(), odd, 1e-9, 0) is None
    assert estimated_epsilon(odd, odd, 1e-5, 0) == 0.0  # both worlds are one: delta is 0
    far = Cumulants(1e9, 1e9, 0.0, 0.0, 0.0)
    assert estimated_epsilon(far, Cumulants(-1e9, 1e9, 1e300, 1e300, 1e300), 1e-5, 3) is None


@pytest.mark.parametrize("num_steps", [1, 3, 30])
@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0, 20.0])
def test_estimates_are_numbers_or_nothing(num_steps: int, noise: float) -> None:
    run = PoissonRun(0.001, num_steps, noise)
    found = EdgeworthAccountant().guarantee(run.event(), delta=1e-6)
    assert found.estimate is None or 0 <= found.estimate < math.inf
    assert found.lower is None or 0 < found.lower <= found.epsilon


@pytest.mark.parametrize("noise", [0.01, 0.06, 0.08])
@pytest.mark.parametrize("q", [1e-12, 0.5, 0.999])
def test_hardly_any_noise_is_answered_in_little_memory(
    q: float, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the unit the sum hardly varies then, so a fraction of its deviation is a short panel."""
    real = interval_module.composite_rule

    def few(panels: int) -> tuple[np.ndarray, np.ndarray]:
        assert panels <= 2100
        return real(panels)

    monkeypatch.setattr(interval_module, "composite_rule", few)
    run = PoissonRun(q, 10, noise).event()
    found = EdgeworthAccountant().guarantee(run, delta=1e-6)
    assert found.epsilon <= Certificate().guarantee(run, delta=1e-6).epsilon
    assert (found.lower or 0.0) <= found.epsilon


def test_convergence_needs_all_three_orders() -> None:
    agreeing = dict.fromkeys(ORDERS, 1.0)
    assert looks_converged(agreeing)
    for order in (1, 2, 3):
        assert not looks_converged({**agreeing, order: None})
        assert not looks_converged({**agreeing, order: 1.05})


def test_cumulants_of_independent_losses_add_up() -> None:
    first, second = SampledGaussian(0.01, 1.0), SampledGaussian(0.2, 3.0)
    total = of_sum({first: 30, second: 7}, "remove", large=True)
    parts = [one_release(one, "remove", large=True) for one in (first, second)]
    assert total.third == pytest.approx(30 * parts[0].third + 7 * parts[1].third, rel=1e-14)
    assert total.fifth == pytest.approx(30 * parts[0].fifth + 7 * parts[1].fifth, rel=1e-14)


@pytest.mark.parametrize("large", [True, False])
def test_adding_exchanges_the_worlds_and_turns_the_loss(large: bool) -> None:
    release = SampledGaussian(0.05, 0.8)
    added = one_release(release, "add", large=large)
    assert added == one_release(release, "remove", large=not large).mirrored()
    nodes = LossNodes.of(release)
    masses = nodes.masses("add", large=large)
    assert added.mean == pytest.approx(-float(masses @ nodes.losses), rel=1e-12)


def test_a_rough_epsilon_starts_a_search_and_does_not_end_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # An estimate of a tenth of the truth must not lead to a tenth of the noise.
    accountant = EdgeworthAccountant()
    run = PoissonRun(0.05, 1000)
    right = accountant.calibrate(run, target_epsilon=4.0, target_delta=1e-5).noise_multiplier
    original = EdgeworthAccountant._quick_epsilon
    monkeypatch.setattr(EdgeworthAccountant, "_quick_epsilon", lambda *args: 0.1 * original(*args))
    found = accountant.calibrate(run, target_epsilon=4.0, target_delta=1e-5).noise_multiplier
    assert right * (1 - 2e-4) <= found <= right * (1 + 1e-3)


def test_calibration_asks_for_two_to_four_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    original = Certificate._epsilon

    def counting(self: Certificate, leaves: object, delta: float) -> float:
        asked.append(delta)
        return original(self, leaves, delta)  # type: ignore[arg-type]

    monkeypatch.setattr(Certificate, "_epsilon", counting)
    for probability, num_steps, target in (
        (0.01, 10000, 2.0),
        (0.05, 1000, 4.0),
        (0.01, 1000, 8.0),
    ):
        asked.clear()
        EdgeworthAccountant().calibrate(
            PoissonRun(probability, num_steps), target_epsilon=target, target_delta=1e-5
        )
        assert 1 <= len(asked) <= 4
