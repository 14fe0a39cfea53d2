"""Privacy losses, sampled or not, rounded to a grid so that they can be composed; those of Gaussians.

dp-accounting has the same discretisation, one Python call per grid point; here it is vectorised, and
arranged so that no digits cancel, which matters on fine grids.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Direction = Literal["remove", "add"]
"""Which of two neighbours is the larger dataset: the one at hand ("remove") or the other ("add")."""

DIRECTIONS: tuple[Direction, ...] = ("remove", "add")

# Grid ends: losses beyond them have a chance below exp(-50) and count as infinite, or as the lowest.
_QUANTILE = 9.97

# Exponents for Chernoff bounds on sums of losses, in 1 / nats.
_TILTS = 2.0 ** np.arange(-9, 8)
TILTS = np.concatenate((-_TILTS[::-1], _TILTS))


@dataclass(frozen=True)
class SampledGaussian:
    """Gaussian noise on a sum over a Poisson sample (over all units if the probability is 1).

    Attributes:
        sampling_probability: In (0, 1].
        noise_multiplier: Standard deviation divided by sensitivity, > 0.
    """

    sampling_probability: float
    noise_multiplier: float

    @property
    def is_symmetric(self) -> bool:
        """Whether both directions have the same loss."""
        return self.sampling_probability == 1

    def discretised(self, direction: Direction, interval: float) -> DiscreteLoss:
        """The loss on a grid (see `discretise`)."""
        return discretise(self, direction, interval)

    def loss_range(self) -> tuple[float, float]:
        """Lowest and highest loss of the grid, in the direction "remove"."""
        sigma = self.noise_multiplier
        low = self._loss(-_QUANTILE * sigma)
        return low, self._loss(1 + _QUANTILE * sigma)

    def _loss(self, output: float) -> float:
        """Log of the density with the unit over the density without it, at `output`."""
        exponent = (2 * output - 1) / (2 * self.noise_multiplier**2)
        if self.sampling_probability == 1:
            return exponent
        absent = math.log1p(-self.sampling_probability)
        return float(np.logaddexp(absent, math.log(self.sampling_probability) + exponent))

    def tail(self, epsilons: Floats, direction: Direction) -> Floats:
        """delta(epsilon) of one release, for epsilons >= 0, ``(n,)``."""
        return amplified(self._gaussian_tail, self.sampling_probability, epsilons, direction)

    def _gaussian_tail(self, levels: Floats) -> Floats:
        from scipy.special import log_ndtr, ndtr

        sigma = self.noise_multiplier
        present = ndtr(0.5 / sigma - levels * sigma)
        absent = np.exp(levels + log_ndtr(-0.5 / sigma - levels * sigma))
        deltas: Floats = np.maximum(present - absent, 0.0)
        return deltas


@dataclass(frozen=True, eq=False)
class DiscreteLoss:
    """A loss on a grid that dominates the true one.

    Attributes:
        interval: Distance of grid points, > 0, in nats.
        lowest: Index of the first grid point: its loss is ``lowest * interval``.
        probabilities: Chance of each grid point, ``(n,)``.
        infinity_mass: Chance of an infinite loss.
    """

    interval: float
    lowest: int
    probabilities: Floats
    infinity_mass: float

    @functools.cached_property
    def log_moments(self) -> Floats:
        """`log_moments_at` the exponents `TILTS`."""
        return self.log_moments_at(TILTS)

    def log_moments_at(self, tilts: Floats) -> Floats:
        """Log E exp(tilt * loss) for each tilt, infinite losses left out."""
        losses = (self.lowest + np.arange(len(self.probabilities))) * self.interval
        ends = np.where(tilts > 0, losses[-1], losses[0])
        # The largest exponent is taken out first, so that nothing overflows.
        rest = [
            np.dot(self.probabilities, np.exp(tilt * (losses - end)))
            for tilt, end in zip(tilts, ends, strict=True)
        ]
        moments: Floats = tilts * ends + np.log(np.maximum(rest, 1e-300))
        return moments


def amplified(
    profile: Callable[[Floats], Floats],
    sampling_probability: float,
    epsilons: Floats,
    direction: Direction,
) -> Floats:
    """delta(epsilon) of a release over a Poisson sample, for epsilons >= 0, ``(n,)``.

    Let the unsampled release be dominated by the pair (P, Q) in both directions, P where the unit is
    there, with profile H(level) = H_level(P, Q), and let q be the probability. Given who else is drawn,
    (1 - q) Q + q P exceeds e^epsilon Q by q (P - e^level Q) with e^level = 1 + (e^epsilon - 1) / q, and
    Q exceeds e^epsilon ((1 - q) Q + q P) by q e^(epsilon - level) (Q - e^level P) with
    e^-level = 1 + (e^-epsilon - 1) / q, by nothing where this is no positive number. Averaging over who
    else is drawn adds nothing, because hockey-stick divergences are jointly convex.

    Args:
        profile: H at levels >= 0, ``(n,)``; the same for (Q, P).
        sampling_probability: In (0, 1].
        epsilons: >= 0, ``(n,)``.
        direction: Which neighbour is the larger.

    Source:
        Zhu, Dong and Wang (2022), arXiv 2106.08567, theorem 11.
    """
    q = sampling_probability
    if q == 1:
        return profile(epsilons)
    if direction == "remove":
        small = np.minimum(epsilons, 30.0)
        log_ratio = epsilons - math.log(q) + np.log1p(-(1 - q) * np.exp(-epsilons))
        levels = np.where(epsilons < 30, np.log1p(np.expm1(small) / q), log_ratio)
        return q * profile(levels)
    deltas = np.zeros_like(epsilons)
    possible = np.expm1(-epsilons) > -q  # beyond that the loss never gets
    inside = epsilons[possible]
    levels = -np.log1p(np.expm1(-inside) / q)
    deltas[possible] = q * np.exp(inside - levels) * profile(levels)
    return deltas


class HasProfile(Protocol):
    """A release whose delta is known, or bounded, for every epsilon >= 0 in both directions."""

    def loss_range(self) -> tuple[float, float]:
        """Lowest and highest loss of the grid, in the direction "remove"."""
        ...

    def tail(self, epsilons: Floats, direction: Direction) -> Floats:
        """delta(epsilon) of one release, for epsilons >= 0, ``(n,)``."""
        ...


def discretise(release: HasProfile, direction: Direction, interval: float) -> DiscreteLoss:
    """Round the loss of one release to a grid, so that the result is never more private.

    Args:
        release: What is released.
        direction: Which neighbour is the larger.
        interval: Distance of grid points, > 0, in nats.

    Guarantees:
        * delta(epsilon) is exact at every grid point of a single release, and an upper bound
          elsewhere and under composition (test: test_discretised_loss_is_exact_on_the_grid).

    Source:
        Doroshenko, Ghazi, Kamath, Kumar and Manurangsi (2022), "Connect the Dots", algorithm 1.
    """
    low, high = release.loss_range()
    if direction == "add":
        low, high = -high, -low
    first, last = min(math.floor(low / interval), -1), max(math.ceil(high / interval), 1)
    positive = np.arange(0, last + 1, dtype=np.float64) * interval
    negative = np.arange(first, 0, dtype=np.float64) * interval
    # For negative epsilons delta is 1 - exp(epsilon) plus exp(epsilon) times the other direction's
    # delta at -epsilon. The first part adds probability 1 at loss 0 and is left out of the
    # differences: they are then taken between small numbers only.
    other: Direction = "add" if direction == "remove" else "remove"
    excess = np.concatenate(
        (np.exp(negative) * release.tail(-negative, other), release.tail(positive, direction))
    )
    growth = math.expm1(interval)
    rises = np.diff(excess)
    probabilities = np.empty_like(excess)
    probabilities[1:-1] = (rises[1:] - (1 + growth) * rises[:-1]) / growth
    probabilities[0] = (excess[1] - (1 + growth) * excess[0]) / growth
    probabilities[-1] = -rises[-1] * (1 + growth) / growth
    probabilities[-first] += 1.0
    return DiscreteLoss(interval, first, np.maximum(probabilities, 0.0), float(excess[-1]))
