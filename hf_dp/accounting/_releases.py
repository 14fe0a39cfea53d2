"""From events to privacy losses, for samplers other than Poisson's and for Laplace noise."""

from __future__ import annotations

from typing import Protocol

from hf_dp.accounting._balls_in_bins import BallsInBinsPass
from hf_dp.accounting._contributions import SampledContributions
from hf_dp.accounting._laplace import has_laplace_loss, laplace_loss
from hf_dp.accounting._leaves import Leaves
from hf_dp.accounting._losses import Direction, DiscreteLoss
from hf_dp.accounting._profiles import SampledSwap, TruncatedSample
from hf_dp.events import (
    BallsInBins,
    Gaussian,
    PoissonSampledContributions,
    PrivacyEvent,
    SampledWithoutReplacement,
    TruncatedPoissonSampled,
)


class Release(Protocol):
    """A release whose loss can be rounded to a grid; hashable, equal by value."""

    @property
    def is_symmetric(self) -> bool:
        """Whether both directions have the same loss."""
        ...

    def __hash__(self) -> int: ...

    def loss_range(self) -> tuple[float, float]:
        """Lowest and highest loss of the grid, in the direction "remove"."""
        ...

    def discretised(self, direction: Direction, interval: float) -> DiscreteLoss:
        """The loss on a grid, never more private than it is."""
        ...


def has_loss(leaf: PrivacyEvent) -> bool:
    """Whether `release_of` knows the loss of a release that is not `is_gaussian`."""
    if has_laplace_loss(leaf):
        return True
    kinds = (
        BallsInBins,
        PoissonSampledContributions,
        SampledWithoutReplacement,
        TruncatedPoissonSampled,
    )
    return isinstance(leaf, kinds) and type(leaf.event) is Gaussian


def release_of(leaf: PrivacyEvent) -> Release:
    """The privacy loss of a release that `has_loss`."""
    if has_laplace_loss(leaf):
        return laplace_loss(leaf)
    match leaf:
        case BallsInBins(num_batches, Gaussian(noise)):
            return BallsInBinsPass(num_batches, noise)
        case PoissonSampledContributions(probability, most, Gaussian(noise)):
            return SampledContributions(probability, most, noise)
        case SampledWithoutReplacement(num_units, batch_size, Gaussian(noise)):
            return SampledSwap(batch_size / num_units, noise)
        case TruncatedPoissonSampled(num_units, probability, max_batch_size, Gaussian(noise)):
            return TruncatedSample.of(num_units, probability, max_batch_size, noise)
        case _:
            raise TypeError(f"{leaf!r} has no loss here; ask `has_loss` first")


def unamplified(leaves: Leaves) -> dict[PrivacyEvent, int]:
    """Releases with Rényi divergences that are no more private: Gaussian ones of units always drawn.

    A mixture's Renyi divergence is at most its worst part's, and there a unit moves the sum by one
    clipping norm, by two where it leaves its place to another, and by as many as it owns examples
    where all of them may be drawn.
    """
    bounds: dict[PrivacyEvent, int] = {}
    for leaf, count in leaves.items():
        match leaf:
            case BallsInBins(event=Gaussian(noise)):
                bound: PrivacyEvent = Gaussian(noise)
            case (
                SampledWithoutReplacement(event=Gaussian(noise))
                | TruncatedPoissonSampled(event=Gaussian(noise))
            ):
                bound = Gaussian(noise / 2)
            case PoissonSampledContributions(_, most, Gaussian(noise)):
                bound = Gaussian(noise / most)
            case _:
                bound = leaf
        bounds[bound] = bounds.get(bound, 0) + count
    return bounds
