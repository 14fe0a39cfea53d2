"""Noise for a target: never less privacy than asked, hardly more noise than needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from hf_dp.accounting import Accountant, EdgeworthAccountant, PLDAccountant, RDPAccountant
from hf_dp.accounting.calibrate import LEAST_NOISE, smallest_noise
from hf_dp.errors import ConfigurationError, UnsupportedEventError
from hf_dp.events import (
    Composed,
    Gaussian,
    NeighboringRelation,
    NonPrivate,
    PoissonSampled,
    PrivacyEvent,
    PrivacyUnit,
    SelfComposed,
)

EACH = pytest.mark.parametrize(
    "accountant",
    [PLDAccountant(), EdgeworthAccountant(), RDPAccountant()],
    ids=lambda a: a.name,
)


@dataclass(frozen=True)
class Run:
    """A plan that needs no torch."""

    sampling_probability: float = 0.01
    num_steps: int = 1000
    noise_multiplier: float = 1.0
    also: tuple[PrivacyEvent, ...] = ()
    relation: NeighboringRelation = NeighboringRelation.REPLACE_SPECIAL
    unit: PrivacyUnit = "example"

    def event(self) -> PrivacyEvent:
        step = PoissonSampled(self.sampling_probability, Gaussian(self.noise_multiplier))
        return SelfComposed(Composed((step, *self.also)), self.num_steps)

    def with_noise_multiplier(self, noise_multiplier: float) -> Run:
        return dataclasses.replace(self, noise_multiplier=noise_multiplier)


def epsilon(accountant: Accountant, run: Run, delta: float) -> float:
    return accountant.guarantee(run.event(), delta=delta).epsilon


# Sampling probability, steps; noise multipliers for epsilon 1, 4, 8 at delta 1e-6 (research notes on
# user-level privacy, section 2.2, group size 1; checked there against an FFT and Monte Carlo).
GOLDEN = [
    (0.01, 1000, (1.5627, 0.7785, 0.6167)),
    (0.001, 1000, (0.6972, 0.5085, 0.4096)),
    (0.001, 10000, (0.7877, 0.5644, 0.4710)),
    (0.0005, 1000, (0.6291, 0.4704, 0.3782)),
    (0.002, 1000, (0.7849, 0.5562, 0.4500)),
    (0.005, 1000, (1.0117, 0.6504, 0.5262)),
    (0.02, 1000, (2.8220, 1.0554, 0.7728)),
    (0.05, 1000, (6.7752, 2.0621, 1.2721)),
]


@pytest.mark.reference
@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"q{row[0]}-T{row[1]}")
def test_noise_agrees_with_reference_values(row: tuple[float, int, tuple[float, ...]]) -> None:
    probability, num_steps, expected = row
    for target, noise in zip((1.0, 4.0, 8.0), expected, strict=True):
        found = PLDAccountant().calibrate(
            Run(probability, num_steps), target_epsilon=target, target_delta=1e-6
        )
        # Four digits after the point and the reference's own grid, together.
        assert found.noise_multiplier == pytest.approx(noise, rel=1.2e-4)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("run", "target", "delta", "exact"),
    [
        # Exact noise by contour integration, four digits (research notes on Edgeworth, tables 3.3, 6).
        (Run(2000 / 392702, 3920), 8.0, 1e-6, 0.6045),
        (Run(2000 / 67349, 660), 8.0, 1e-5, 0.7982),
        (Run(0.01, 1000), 8.0, 1e-5, 0.5863),
        (Run(0.05, 100), 3.0, 1e-5, 1.0788),
    ],
    ids=["MNLI", "SST-2", "q0.01", "q0.05"],
)
def test_noise_agrees_with_exact_noise(run: Run, target: float, delta: float, exact: float) -> None:
    found = PLDAccountant().calibrate(run, target_epsilon=target, target_delta=delta)
    assert found.noise_multiplier == pytest.approx(exact, rel=2e-4)
    assert found.noise_multiplier > exact - 1e-4


@EACH
@pytest.mark.parametrize("target", [0.05, 1.0, 3.0, 30.0])
def test_calibrated_noise_meets_the_target(accountant: Accountant, target: float) -> None:
    found = accountant.calibrate(Run(), target_epsilon=target, target_delta=1e-5)
    assert epsilon(accountant, found, 1e-5) <= target
    assert found.noise_multiplier == float(f"{found.noise_multiplier:.5g}")
    assert dataclasses.replace(found, noise_multiplier=1.0) == Run()


@EACH
@pytest.mark.parametrize("target", [0.05, 1.0, 3.0, 30.0])
def test_slightly_less_noise_misses_the_target(accountant: Accountant, target: float) -> None:
    found = accountant.calibrate(Run(), target_epsilon=target, target_delta=1e-5)
    less = found.with_noise_multiplier(found.noise_multiplier * (1 - 2e-4))
    assert epsilon(accountant, less, 1e-5) > target


@EACH
def test_the_other_releases_of_the_plan_are_paid_first(accountant: Accountant) -> None:
    extra = Run(also=(PoissonSampled(0.01, Gaussian(2.0)),))
    alone = accountant.calibrate(Run(), target_epsilon=2.0, target_delta=1e-5)
    found = accountant.calibrate(extra, target_epsilon=2.0, target_delta=1e-5)
    assert found.noise_multiplier > alone.noise_multiplier
    assert epsilon(accountant, found, 1e-5) <= 2.0


@EACH
def test_calibrated_noise_gives_a_curve_within_the_target(accountant: Accountant) -> None:
    found = accountant.calibrate(Run(), target_epsilon=2.0, target_delta=1e-5)
    step = PoissonSampled(found.sampling_probability, Gaussian(found.noise_multiplier))
    curve = accountant.curve(step, num_steps=found.num_steps, delta=1e-5)
    assert curve.epsilon(found.num_steps) <= 2.0
    assert curve.epsilon(found.num_steps + 1) > 2.0 * 0.99


@EACH
def test_targets_out_of_reach_are_refused(accountant: Accountant) -> None:
    fixed_cost = Run(also=(PoissonSampled(0.01, Gaussian(0.5)),))
    exact = Run(also=(NonPrivate("the exact loss"),))
    for run, target in ((fixed_cost, 1.0), (exact, 1e3)):
        with pytest.raises(ConfigurationError, match=r"target_epsilon=.*larger epsilon"):
            accountant.calibrate(run, target_epsilon=target, target_delta=1e-9)


@EACH
@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf, True, "3", None])
def test_targets_that_are_no_positive_number_are_refused(
    accountant: Accountant, target: float
) -> None:
    with pytest.raises(ConfigurationError, match=r"Accountant\.target_epsilon"):
        accountant.calibrate(Run(), target_epsilon=target, target_delta=1e-5)


@EACH
def test_a_bad_delta_or_event_is_refused_before_the_search(accountant: Accountant) -> None:
    with pytest.raises(ConfigurationError, match=r"Accountant\.delta"):
        accountant.calibrate(Run(), target_epsilon=1.0, target_delta=0.0)
    nested = PoissonSampled(0.1, PoissonSampled(0.1, Gaussian(1.0)))
    with pytest.raises(UnsupportedEventError):
        accountant.calibrate(Run(also=(nested,)), target_epsilon=1.0, target_delta=1e-5)
    with pytest.raises(UnsupportedEventError, match="replace_one"):
        accountant.calibrate(
            Run(relation=NeighboringRelation.REPLACE_ONE), target_epsilon=1.0, target_delta=1e-5
        )


def law(factor: float, power: float) -> Callable[[float], float]:
    return lambda noise: factor / noise**power


@pytest.mark.parametrize("factor", [1e-4, 0.37, 1.0, 9.99995, 5e4])
@pytest.mark.parametrize("power", [0.8, 1.0, 2.0, 4.0])
def test_search_finds_the_smallest_number_of_five_digits(factor: float, power: float) -> None:
    certified = law(factor, power)
    found = smallest_noise(lambda noise: 1.004 * certified(noise), certified, 1.0)
    exact = factor ** (1 / power)
    if exact < LEAST_NOISE:
        assert found == LEAST_NOISE
    else:
        assert exact * (1 - 1e-12) <= found <= exact * (1 + 1e-4)
        assert found == float(f"{found:.5g}")
        assert certified(found) <= 1.0


@pytest.mark.parametrize("power", [0.8, 2.0, 4.0])
def test_search_needs_few_certificates(power: float) -> None:
    asked = []

    def certified(noise: float) -> float:
        asked.append(noise)
        return law(2.0, power)(noise)

    smallest_noise(lambda noise: 1.005 * law(2.0, power)(noise), certified, 1.0)
    assert len(asked) <= 6


def test_only_the_certificate_decides() -> None:
    # A search function that promises far too much must not lead below the target.
    certified = law(2.0, 2.0)
    found = smallest_noise(lambda noise: 0.1 * certified(noise), certified, 1.0)
    assert certified(found) <= 1.0


def test_a_certificate_that_is_never_reached_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="target_epsilon"):
        smallest_noise(law(1.0, 2.0), lambda noise: 2.0, 1.0)


def test_targets_beyond_any_noise_worth_searching_get_the_least_noise() -> None:
    found = RDPAccountant().calibrate(Run(0.01, 1), target_epsilon=1e7, target_delta=1e-5)
    assert found.noise_multiplier == LEAST_NOISE
