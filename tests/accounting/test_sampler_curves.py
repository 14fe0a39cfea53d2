"""Curves and extremes of every sampler: cheap, never decreasing, never below the exact epsilon."""

from __future__ import annotations

import math
import time

import pytest

from hf_dp.accounting import accountant_named
from hf_dp.events import (
    BallsInBins,
    Gaussian,
    NeighboringRelation,
    PrivacyEvent,
    SampledWithoutReplacement,
    SelfComposed,
    Shuffled,
    TruncatedPoissonSampled,
)

SPECIAL, ONE = NeighboringRelation.REPLACE_SPECIAL, NeighboringRelation.REPLACE_ONE
STEPS = 10_000
CASES: list[tuple[PrivacyEvent, int, NeighboringRelation]] = [
    (BallsInBins(100, Gaussian(1.0)), 100, SPECIAL),
    (BallsInBins(2, Gaussian(40.0)), 2, SPECIAL),
    (Shuffled(10, Gaussian(10.0)), 10, SPECIAL),
    (SampledWithoutReplacement(10_000, 100, Gaussian(2.0)), 1, ONE),
    (TruncatedPoissonSampled(10_000, 0.01, 130, Gaussian(1.0)), 1, SPECIAL),
]


@pytest.mark.parametrize(("event", "length", "relation"), CASES, ids=lambda case: str(case)[:40])
def test_ten_thousand_steps_take_less_than_three_seconds(
    event: PrivacyEvent, length: int, relation: NeighboringRelation
) -> None:
    pld = accountant_named("pld")
    passes = STEPS // length
    began = time.process_time()
    curve = pld.curve(event, num_steps=passes, delta=1e-6, relation=relation)
    assert time.process_time() - began < 3
    values = [curve.epsilon(count) for count in range(passes + 1)]
    assert values[0] == 0
    assert values == sorted(values)
    for count in {1, passes // 3, passes}:
        exact = pld.guarantee(SelfComposed(event, count), delta=1e-6, relation=relation).epsilon
        assert exact * (1 - 1e-9) <= curve.epsilon(count) <= exact * 1.08


def of_kind(kind: str, noise: float) -> tuple[PrivacyEvent, NeighboringRelation]:
    inner = Gaussian(noise)
    return {
        "balls_in_bins": (BallsInBins(7, inner), SPECIAL),
        "shuffled": (Shuffled(7, inner), SPECIAL),
        "fixed_size": (SampledWithoutReplacement(1000, 10, inner), ONE),
        "truncated_poisson": (TruncatedPoissonSampled(1000, 0.01, 12, inner), SPECIAL),
    }[kind]


@pytest.mark.parametrize("kind", ["balls_in_bins", "shuffled", "fixed_size", "truncated_poisson"])
def test_epsilon_falls_with_the_noise_from_useless_to_nothing(kind: str) -> None:
    """Where losses of hundreds are likely the bound is that of no sampling; it never is nan."""
    found = []
    for noise in (0.01, 0.03, 0.1, 0.4, 1.0, 5.0, 50.0, 1e6):
        event, relation = of_kind(kind, noise)
        whole = SelfComposed(event, 3)
        bound = accountant_named("pld").guarantee(whole, delta=1e-5, relation=relation).epsilon
        sensitivity = 1.0 if kind in ("balls_in_bins", "shuffled") else 2.0
        plain = SelfComposed(Gaussian(noise / sensitivity), 3)
        assert bound <= accountant_named("rdp").guarantee(plain, delta=1e-5).epsilon * 1.001
        found.append(bound)
    assert all(math.isfinite(epsilon) for epsilon in found)
    assert found == sorted(found, reverse=True)
    assert found[0] > 1000
    assert found[-1] == 0
