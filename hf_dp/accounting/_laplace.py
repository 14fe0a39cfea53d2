"""Privacy losses of Laplace noise, of fixed or of drawn scale, as dominating pairs of one coordinate.

Throughout, lambda is the inverse scale 1 / b, and one unit moves the sum by at most 1 in the l1 norm
(`shift` where it is more). All pairs are symmetric: adding a unit costs what removing one does.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hf_dp.accounting._hidden_scale import HiddenScale, highest_loss
from hf_dp.accounting._leaves import drawn, is_laplace, simplified
from hf_dp.accounting._losses import Direction, DiscreteLoss, Floats, amplified, discretise
from hf_dp.accounting._released_scale import ReleasedScale
from hf_dp.events import Laplace, PrivacyEvent, ScaleMixtureLaplace

_MANY = 10_000  # coordinates; beyond, rounding would count


class Symmetric(Protocol):
    """An unsampled release whose loss has the same law in both directions; hashable."""

    def __hash__(self) -> int: ...

    @property
    def highest(self) -> float:
        """The highest loss, or one that is almost never passed."""
        ...

    def profile(self, levels: Floats) -> Floats:
        """delta(level) of one release, or an upper bound, for levels >= 0, ``(n,)``."""
        ...


@dataclass(frozen=True)
class FixedScale:
    """Laplace noise of one known scale.

    Guarantees:
        * The pair of one coordinate that moves by the whole `shift` dominates every other way to spread
          it over coordinates, for every epsilon (test: test_no_spread_over_two_coordinates_is_worse).
          Proof for two coordinates that move by u and v, u + v = s (in units of b): under Q the loss
          of one coordinate that moves by u has the law exp(-(u + l) / 2) m_u(dl), where m_u puts 1 / 2
          at each of -u and u and the density 1 / 4 between them. Of two it is exp(-(s + l) / 2) times
          the convolution of m_u and m_v, which puts 1 / 4 at -s and at s, and between them atoms, the
          density 1 / 4 and something positive. So the law for one coordinate less the law for two is
          positive at the ends and negative between them, with total mass 0 and mean of exp(loss) 0.
          Subtract from a convex function of exp(loss) the chord through the ends, which integrates
          to 0: what is left is 0 at the ends and negative between them, where the difference is negative
          too. So the integral is >= 0, for hockey-sticks in particular. Domination survives products, so
          coordinates may be merged one after another; and a smaller shift is what one sees of two
          coordinates when only the first is looked at.
        * The profile is 1 - exp((epsilon - shift) / 2), by integrating the law above.

    Attributes:
        inverse_scale: What one unit moves the sum by, over the scale b: > 0.
    """

    inverse_scale: float

    @property
    def highest(self) -> float:
        """The highest loss: never passed."""
        return self.inverse_scale

    def profile(self, levels: Floats) -> Floats:
        """delta(level), for levels >= 0, ``(n,)``."""
        deltas: Floats = np.maximum(-np.expm1((levels - self.inverse_scale) / 2), 0.0)
        return deltas


@dataclass(frozen=True)
class BoundedLoss:
    """Any release whose loss never passes `highest`, in either direction.

    The likelihood ratio r has mean 1 under Q and lies between e^-h and e^h, h being `highest`. A convex
    function lies below its chord, so max(r - e^epsilon, 0) has at most the mean that it would have if r were
    at an end, at the upper one with the chance 1 / (1 + e^h) that the mean of r leaves.

    Source:
        Kairouz, Oh and Viswanath (2015), arXiv 1311.0776: it is dominated by randomised response.
    """

    highest: float

    def profile(self, levels: Floats) -> Floats:
        """A bound on delta(level), for levels >= 0, ``(n,)``."""
        h = self.highest
        deltas: Floats = np.maximum(-np.expm1(levels - h), 0.0) / (1 + math.exp(-h))
        return deltas


@dataclass(frozen=True)
class SampledNoise:
    """Symmetric noise on a sum over a Poisson sample (over all units if the probability is 1)."""

    sampling_probability: float
    noise: Symmetric

    @property
    def is_symmetric(self) -> bool:
        """Whether both directions have the same loss."""
        return self.sampling_probability == 1

    def loss_range(self) -> tuple[float, float]:
        """Lowest and highest loss of the grid, in the direction "remove"."""
        high = self.noise.highest
        absent = (
            math.log1p(-self.sampling_probability) if self.sampling_probability < 1 else -np.inf
        )
        present = math.log(self.sampling_probability)
        return float(np.logaddexp(absent, present - high)), float(
            np.logaddexp(absent, present + high)
        )

    def tail(self, epsilons: Floats, direction: Direction) -> Floats:
        """delta(epsilon) of one release, for epsilons >= 0, ``(n,)``."""
        return amplified(self.noise.profile, self.sampling_probability, epsilons, direction)

    def discretised(self, direction: Direction, interval: float) -> DiscreteLoss:
        """The loss on a grid (see `discretise`)."""
        return discretise(self, direction, interval)


def inverse_scale(noise: Laplace) -> float:
    """1 / b of noise whose standard deviation is sqrt(2) b."""
    return math.sqrt(2) / noise.noise_multiplier


def l1_shift(noise: Laplace | ScaleMixtureLaplace) -> float:
    """By how much one unit moves the sum at most in the l1 norm: sqrt(d) where its l2 norm is bounded."""
    if noise.norm == "l1":
        return 1.0
    return math.inf if noise.dimension is None else math.sqrt(noise.dimension)


@functools.lru_cache(maxsize=256)
def symmetric_loss(inner: PrivacyEvent) -> Symmetric | None:
    """The dominating pair of unsampled noise; None if none is known.

    Of hidden scales of several coordinates no more is used than their highest loss (`pure_epsilon`).
    """
    noise = simplified(inner)
    assert isinstance(noise, Laplace | ScaleMixtureLaplace)
    shift = l1_shift(noise)
    if math.isinf(shift):
        return None
    if isinstance(noise, Laplace):
        return FixedScale(shift * inverse_scale(noise))
    if noise.draw == "shared":
        return ReleasedScale(noise.law.scaled(shift))
    return HiddenScale(noise.law) if noise.dimension == 1 else BoundedLoss(_pure_epsilon(noise))


def has_laplace_loss(leaf: PrivacyEvent) -> bool:
    """Whether `laplace_loss` knows a dominating pair."""
    return is_laplace(leaf) and symmetric_loss(drawn(leaf)[1]) is not None


def laplace_loss(leaf: PrivacyEvent) -> SampledNoise:
    """The privacy loss of a release that `has_laplace_loss`."""
    probability, inner = drawn(leaf)
    noise = symmetric_loss(inner)
    if noise is None:
        raise TypeError(f"{leaf!r} has no loss here; ask `has_laplace_loss` first")
    return SampledNoise(probability, noise)


def pure_epsilon(leaf: PrivacyEvent) -> float:
    """An epsilon at which delta is 0; inf if there is none, or none is known.

    Where scales are hidden, a coordinate that moves by s has the highest loss e(s) =
    log(f(0) / f(s)), f being the noise's density. f mixes exponentials, so log f is convex on s > 0 and e
    is concave: of all ways to move d coordinates by an l1 norm of at most c, none has a higher sum of
    e(s_i) than equal moves, d e(c / d), which grows with d to c e'(0) = c E[lambda^2] / E[lambda]. (For one
    coordinate see `HiddenScale`, for the products of several add the losses.)
    Amplification by sampling: `amplified` at delta 0.
    """
    if not is_laplace(leaf):
        return math.inf
    probability, inner = drawn(leaf)
    unsampled = _pure_epsilon(inner)
    if probability == 1 or unsampled > 700:
        return unsampled
    return math.log1p(probability * math.expm1(unsampled))


def _pure_epsilon(inner: PrivacyEvent) -> float:
    noise = simplified(inner)
    assert isinstance(noise, Laplace | ScaleMixtureLaplace)
    shift = l1_shift(noise)
    if isinstance(noise, Laplace):
        return shift * inverse_scale(noise)
    law, dimension = noise.law, noise.dimension
    if noise.draw == "shared":
        return shift * law.uniform_high if math.isinf(law.domain_end) else math.inf
    if dimension is not None and dimension <= _MANY:
        return dimension * highest_loss(law, shift / dimension)
    return shift * float(law.moment_second_derivative(0.0) / law.mean) * (1 + 1e-12)
