"""Releases in dp-accounting's own terms, so that a ledger can be checked by somebody else's program."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hf_dp.accounting._leaves import flatten
from hf_dp.errors import UnsupportedEventError, explain
from hf_dp.events import (
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
    PoissonSampledContributions,
    PrivacyEvent,
    SampledWithoutReplacement,
    Shuffled,
    TruncatedPoissonSampled,
)

if TYPE_CHECKING:
    from dp_accounting import DpEvent


def as_dp_event(event: PrivacyEvent | Iterable[PrivacyEvent]) -> DpEvent:
    """The same releases as one ``dp_accounting.DpEvent``, under the same neighbouring relation.

    Sampling without replacement is the exception to equal numbers: there the noise multiplier is
    halved, because dp-accounting's RDP accountant takes it relative to what one unit can move, which is
    two clipping norms; passing it on as it is would claim far too little.

    Args:
        event: One event, or several made one after another; a ledger's ``event()``.

    Raises:
        UnsupportedEventError: dp-accounting has no such event (balls in bins, mixtures of
            scales, Laplace noise where the l2 norm is bounded).
    """
    import dp_accounting

    composed = [
        dp_accounting.SelfComposedDpEvent(_leaf(leaf), count)
        for leaf, count in flatten(event).items()
    ]
    return dp_accounting.ComposedDpEvent(composed)


def _leaf(leaf: PrivacyEvent) -> DpEvent:
    import dp_accounting

    match leaf:
        case Gaussian(noise) | Shuffled(_, Gaussian(noise)):
            return dp_accounting.GaussianDpEvent(noise)
        case Laplace(noise, "l1") | Shuffled(_, Laplace(noise, "l1")):
            return dp_accounting.LaplaceDpEvent(noise / math.sqrt(2))  # there it is the scale b
        case PoissonSampled(probability, inner):
            return dp_accounting.PoissonSampledDpEvent(probability, _leaf(inner))
        case PoissonSampledContributions(probability, most, Gaussian(noise)):
            return _mixture(probability, most, noise)
        case TruncatedPoissonSampled(num_units, probability, max_batch_size, Gaussian(noise)):
            return dp_accounting.TruncatedSubsampledGaussianDpEvent(
                num_units, probability, max_batch_size, noise
            )
        case SampledWithoutReplacement(num_units, batch_size, Gaussian(noise)):
            return dp_accounting.SampledWithoutReplacementDpEvent(
                num_units, batch_size, dp_accounting.GaussianDpEvent(noise / 2)
            )
        case NonPrivate():
            return dp_accounting.NonPrivateDpEvent()
        case _:
            raise UnsupportedEventError(
                explain(
                    "as_dp_event.event",
                    leaf,
                    "a release that dp-accounting has an event for",
                    "Another event would have another cost.",
                    "Use an accountant of hf_dp.",
                )
            )


def _mixture(probability: float, most: int, noise: float) -> DpEvent:
    """How many of a unit's `most` examples are in the batch, and so how far it moves the sum."""
    from dp_accounting import dp_event
    from scipy.stats import binom

    contributions = range(most + 1)
    chances = binom.pmf(contributions, most, probability)
    kept = [(k, chance) for k, chance in zip(contributions, chances, strict=True) if chance > 0]
    return dp_event.MixtureOfGaussiansDpEvent(
        noise, [float(k) for k, _ in kept], [float(chance) for _, chance in kept]
    )
