"""Epsilon after every step: a bound everywhere, free to read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import ndtr

from hf_dp.accounting import (
    Accountant,
    EdgeworthAccountant,
    EpsilonCurve,
    PLDAccountant,
    RDPAccountant,
)
from hf_dp.accounting import pld as pld_module
from hf_dp.errors import ConfigurationError
from hf_dp.events import Composed, Gaussian, PoissonSampled, PrivacyEvent, SelfComposed

STEP = PoissonSampled(0.01, Gaussian(1.0))
PAIR = Composed((PoissonSampled(0.01, Gaussian(10.0)), PoissonSampled(0.01, Gaussian(1.2))))
EACH = pytest.mark.parametrize(
    "accountant",
    [PLDAccountant(), EdgeworthAccountant(), RDPAccountant()],
    ids=lambda a: a.name,
)
Exact = Callable[..., float]


@pytest.fixture(scope="module")
def curve() -> EpsilonCurve:
    return PLDAccountant().curve(STEP, num_steps=1000, delta=1e-6)


@EACH
@pytest.mark.parametrize("step", [STEP, PAIR, Gaussian(20.0)], ids=["sampled", "pair", "unsampled"])
def test_curve_never_decreases(accountant: Accountant, step: PrivacyEvent) -> None:
    curve = accountant.curve(step, num_steps=150, delta=1e-5)
    values = [curve.epsilon(count) for count in range(700)]
    assert values[0] == 0.0
    assert values[1] > 0.0
    assert np.all(np.diff(values) >= 0)


@EACH
@pytest.mark.parametrize("step", [STEP, PAIR, Gaussian(20.0)], ids=["sampled", "pair", "unsampled"])
@pytest.mark.parametrize("num_steps", [1, 2, 150, 1000])
def test_curve_ends_at_the_guarantee(
    accountant: Accountant, step: PrivacyEvent, num_steps: int
) -> None:
    whole = accountant.guarantee(SelfComposed(step, num_steps), delta=1e-5).epsilon
    curve = accountant.curve(step, num_steps=num_steps, delta=1e-5)
    assert curve.num_steps == num_steps
    assert curve.epsilon(num_steps) == whole
    assert max(curve.epsilon(count) for count in range(num_steps)) <= whole


@pytest.mark.parametrize("count", [40, 100, 333, 334, 777, 999, 1000, 1001, 1700, 3000])
def test_curve_is_never_below_the_exact_epsilon(
    curve: EpsilonCurve, count: int, exact_delta: Exact, sgd: Callable[..., PrivacyEvent]
) -> None:
    assert exact_delta(sgd(0.01, 1.0, count), curve.epsilon(count)) <= 1e-6


def test_curve_starts_above_the_exact_epsilon(curve: EpsilonCurve) -> None:
    def delta_of_one(epsilon: np.ndarray) -> np.ndarray:
        output = 0.5 + np.log(np.maximum(1 + np.expm1(epsilon) / 0.01, 1e-300))
        absent, present = ndtr(-output), ndtr(1 - output)
        return 0.99 * absent + 0.01 * present - np.exp(epsilon) * absent

    assert delta_of_one(np.array([curve.epsilon(1)])) <= 1e-6
    # After two: the expectation of the second's delta at what the first's loss leaves.
    output, step = np.linspace(-12, 13, 100_001, retstep=True)
    density = (0.99 * np.exp(-(output**2) / 2) + 0.01 * np.exp(-((output - 1) ** 2) / 2)) * (
        step / math.sqrt(2 * math.pi)
    )
    left = curve.epsilon(2) - np.log(0.99 + 0.01 * np.exp(output - 0.5))
    assert density @ delta_of_one(left) <= 1e-6


@pytest.mark.parametrize("count", [50, 149, 150, 400])
def test_curve_of_several_releases_a_step_is_a_bound(count: int, exact_delta: Exact) -> None:
    curve = PLDAccountant().curve(PAIR, num_steps=150, delta=1e-5)
    assert exact_delta(SelfComposed(PAIR, count), curve.epsilon(count)) <= 1e-5


def test_curve_is_close_to_the_exact_epsilon(
    curve: EpsilonCurve, exact_epsilon: Exact, sgd: Callable[..., PrivacyEvent]
) -> None:
    for count in (333, 999):
        exact = exact_epsilon(sgd(0.01, 1.0, count), 1e-6, near=curve.epsilon(count))
        assert curve.epsilon(count) <= exact * 1.06


def test_curve_of_unsampled_noise_is_close_to_the_closed_form(
    gaussian_epsilon: Callable[[float, float], float],
) -> None:
    curve = PLDAccountant().curve(Gaussian(30.0), num_steps=1000, delta=1e-5)
    for count in (10, 100, 500, 1000):
        exact = gaussian_epsilon(30.0 / math.sqrt(count), 1e-5)
        assert exact <= curve.epsilon(count) <= exact * 1.08


def test_stairs_that_round_the_count_down_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, exact_delta: Exact, sgd: Callable[..., PrivacyEvent]
) -> None:
    def previous(counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return np.maximum(original(counts, wanted) - 1, 0)

    original = np.searchsorted
    monkeypatch.setattr(pld_module.np, "searchsorted", previous)
    faulty = PLDAccountant().curve(STEP, num_steps=1000, delta=1e-6)
    monkeypatch.undo()
    assert exact_delta(sgd(0.01, 1.0, 777), faulty.epsilon(777)) > 1e-6


def test_rdp_curve_is_the_renyi_bound_of_every_step() -> None:
    curve = RDPAccountant().curve(STEP, num_steps=300, delta=1e-6)
    for count in (1, 2, 77, 299, 300, 301, 1200):
        each = RDPAccountant().guarantee(SelfComposed(STEP, count), delta=1e-6).epsilon
        assert curve.epsilon(count) == pytest.approx(each, rel=1e-12)


def test_pld_curve_is_nowhere_above_the_renyi_bound(curve: EpsilonCurve) -> None:
    renyi = RDPAccountant().curve(STEP, num_steps=1000, delta=1e-6)
    assert all(curve.epsilon(count) <= renyi.epsilon(count) for count in range(1001))


def test_reading_the_curve_computes_nothing() -> None:
    calls = []

    def bounds(first: int, last: int) -> np.ndarray:
        calls.append((first, last))
        return np.arange(first, last + 1, dtype=float)

    curve = EpsilonCurve(bounds, 100, 100.0)
    for _ in range(3):
        assert [curve.epsilon(count) for count in range(101)] == list(range(101))
    assert calls == [(1, 100)]
    assert curve.epsilon(250) == 250.0
    assert calls == [(1, 100), (101, 200), (201, 400)]


def test_looser_bounds_later_do_not_take_back_what_was_said() -> None:
    values = {1: 5.0, 2: 1.0, 3: 9.0, 4: 2.0, 5: 0.5, 6: 0.7, 7: 6.0, 8: 3.0}
    curve = EpsilonCurve(
        lambda first, last: np.array([values[count] for count in range(first, last + 1)]), 4, 2.5
    )
    # Epsilon grows with the count, so a bound for a later count is one for every earlier count.
    assert [curve.epsilon(count) for count in range(5)] == [0.0, 1.0, 1.0, 2.5, 2.5]
    assert [curve.epsilon(count) for count in range(5, 9)] == [2.5, 2.5, 3.0, 3.0]


def test_curve_is_drawn_and_read_in_time() -> None:
    start = time.process_time()
    curve = PLDAccountant().curve(
        PoissonSampled(0.001, Gaussian(0.9)), num_steps=10_000, delta=1e-6
    )
    drawn = time.process_time()
    for count in range(10_000):
        curve.epsilon(count)
    # Measured 1 s and 2 ms; the limits leave room for slow machines.
    assert drawn - start < 6
    assert time.process_time() - drawn < 1


@pytest.mark.parametrize("count", [-1, 1.0, True, "3", None])
def test_counts_are_whole_numbers(curve: EpsilonCurve, count: int) -> None:
    with pytest.raises(ConfigurationError, match=r"EpsilonCurve\.num_releases"):
        curve.epsilon(count)
