"""Small searches, and what their candidates really spend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_dp.accounting import accountant_named
from hf_dp.accounting.pld import PLDAccountant
from hf_dp.events import PoissonSampled, PrivacyEvent, SelfComposed
from hf_dp.noise.search import NoiseSearch, search_noise

FEW = 7  # and two coordinates where it does not matter: their mixtures take milliseconds


def sampled(probability: float) -> Callable[[PrivacyEvent], PrivacyEvent]:
    return lambda event: PoissonSampled(probability, event)


def searched(
    epsilon: float = 1.0,
    delta: float = 1e-5,
    probability: float = 1.0,
    num_steps: int = 1,
    **more: Any,
) -> NoiseSearch:
    asked = {"norm": "l1", "dimension": 2, "budget": FEW, "accountant": PLDAccountant()} | more
    return search_noise(
        target_epsilon=epsilon,
        target_delta=delta,
        step=sampled(probability),
        num_steps=num_steps,
        **asked,
    )


def spent(found: NoiseSearch, probability: float, family: str) -> float:
    """Epsilon of a candidate, from its mechanism and nothing else that the search says."""
    candidate = found.of(family)  # type: ignore[arg-type]
    assert candidate is not None
    asked = found.question
    event = SelfComposed(sampled(probability)(candidate.mechanism.event()), asked.num_steps)
    return accountant_named("pld").guarantee(event, delta=asked.target_delta).epsilon
