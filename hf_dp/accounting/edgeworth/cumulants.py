"""Moments of privacy losses by quadrature, good to eleven digits.

A release is looked at in two worlds: without the unit and with it. The loss of a run is a sum of
independent losses, so its cumulants are the sums of theirs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from hf_dp.accounting._losses import Direction, Floats, SampledGaussian

_NODES = 64
_REACH = 15.0  # standard deviations; what lies beyond has a chance below 1e-50


@dataclass(frozen=True, eq=False)
class LossNodes:
    """The loss of one release at quadrature nodes, and the chance of each node in both worlds.

    Attributes:
        outputs: The nodes, ``(n,)``.
        losses: Log of the density with the unit over the density without it, ``(n,)``.
        absent: Masses without the unit, ``(n,)``; they sum to one.
        present: Masses with the unit, ``(n,)``.
    """

    outputs: Floats
    losses: Floats
    absent: Floats
    present: Floats

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(
        cls, release: SampledGaussian, max_width: float = math.inf, further: float = 0.0
    ) -> Self:
        """Composite Gauss-Legendre quadrature over all outputs that matter.

        Args:
            release: What is released.
            max_width: Panels are no wider than this, for integrands that oscillate.
            further: Go on beyond the last output that matters, for integrands that grow.
        """
        sigma = release.noise_multiplier
        low, high = -_REACH * sigma, 1 + _REACH * sigma + further
        # The loss has branch points at distance pi sigma^2 from the real line.
        widest = min(max_width, (1 + 2 * _REACH * sigma) / max(24, math.ceil(40 / sigma)))
        panels = math.ceil((high - low) / widest * (1 - 1e-12))
        edges = np.linspace(low, high, panels + 1)
        half, middle = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
        nodes, weights = np.polynomial.legendre.leggauss(_NODES)
        outputs = (middle[:, None] + half[:, None] * nodes).ravel()
        masses = (half[:, None] * weights).ravel() / (sigma * math.sqrt(2 * math.pi))
        absent = masses * np.exp(-((outputs / sigma) ** 2) / 2)
        shifted = masses * np.exp(-(((outputs - 1) / sigma) ** 2) / 2)
        q = release.sampling_probability
        return cls(outputs, _losses(release, outputs), absent, (1 - q) * absent + q * shifted)

    def masses(self, direction: Direction, *, large: bool) -> Floats:
        """Masses in the world whose losses are large, or in the other one."""
        return self.present if large == (direction == "remove") else self.absent


def _losses(release: SampledGaussian, outputs: Floats) -> Floats:
    """Log density ratio at `outputs` without cancellation: its mean is about q squared."""
    exponents = (2 * outputs - 1) / (2 * release.noise_multiplier**2)
    q = release.sampling_probability
    if q == 1:
        return exponents
    small = np.log1p(q * np.expm1(np.minimum(exponents, 30.0)))
    capped = np.minimum(np.exp(-np.maximum(exponents, 30.0)), 1.0)
    large = exponents + math.log(q) + np.log1p((1 - q) / q * capped)
    losses: Floats = np.where(exponents < 30, small, large)
    return losses


@dataclass(frozen=True)
class Cumulants:
    """The first five cumulants of a loss, or of a sum of independent ones.

    Attributes:
        mean: First cumulant, in nats.
        variance: Second.
        third: Third, the third central moment.
        fourth: Fourth, the fourth central moment less three squared variances.
        fifth: Fifth.
    """

    mean: float
    variance: float
    third: float
    fourth: float
    fifth: float

    @property
    def skewness(self) -> float:
        """Third cumulant of the standardised loss."""
        return float(self.third / self.variance**1.5)

    @property
    def excess_kurtosis(self) -> float:
        """Fourth cumulant of the standardised loss."""
        return self.fourth / self.variance**2

    @property
    def standardised_fifth(self) -> float:
        """Fifth cumulant of the standardised loss."""
        return float(self.fifth / self.variance**2.5)

    def mirrored(self) -> Cumulants:
        """Those of minus the loss."""
        return Cumulants(-self.mean, self.variance, -self.third, self.fourth, -self.fifth)


@dataclass(frozen=True)
class AbsoluteMoments:
    """What the explicit theorems need besides cumulants: central moments of one loss.

    Attributes:
        first: Mean absolute deviation.
        second: Variance.
        third: Third absolute central moment.
        fourth: Fourth central moment.
        signed_third: Third central moment.
    """

    first: float
    second: float
    third: float
    fourth: float
    signed_third: float


@functools.lru_cache(maxsize=256)
def one_release(release: SampledGaussian, direction: Direction, *, large: bool) -> Cumulants:
    """Cumulants of the loss of one release.

    Args:
        release: What is released.
        direction: Which neighbour is the larger dataset.
        large: In the world where losses are large rather than in the other one.
    """
    if direction == "add":  # the same two worlds with the loss's sign and their parts exchanged
        return one_release(release, "remove", large=not large).mirrored()
    if release.sampling_probability == 1:
        precision = 1 / release.noise_multiplier**2
        return Cumulants(precision / 2 if large else -precision / 2, precision, 0.0, 0.0, 0.0)
    nodes = LossNodes.of(release)
    masses = nodes.masses(direction, large=large)
    mean = float(masses @ nodes.losses)
    deviations = nodes.losses - mean
    second, third, fourth, fifth = (float(masses @ deviations**power) for power in (2, 3, 4, 5))
    return Cumulants(mean, second, third, fourth - 3 * second**2, fifth - 10 * third * second)


def absolute_moments(
    release: SampledGaussian, direction: Direction, *, large: bool
) -> AbsoluteMoments:
    """Central moments of the loss of one release, absolute ones among them (see `one_release`)."""
    nodes = LossNodes.of(release)
    sign = 1.0 if direction == "remove" else -1.0
    masses = nodes.masses(direction, large=large)
    deviations = sign * nodes.losses - sign * float(masses @ nodes.losses)
    sizes = np.abs(deviations)
    first, second, third, fourth = (float(masses @ sizes**power) for power in (1, 2, 3, 4))
    return AbsoluteMoments(first, second, third, fourth, float(masses @ deviations**3))


def of_sum(
    releases: Mapping[SampledGaussian, int], direction: Direction, *, large: bool
) -> Cumulants:
    """Cumulants of the sum of all losses of a run (see `one_release`)."""
    parts = [
        (count, one_release(release, direction, large=large)) for release, count in releases.items()
    ]
    return Cumulants(
        mean=math.fsum(count * part.mean for count, part in parts),
        variance=math.fsum(count * part.variance for count, part in parts),
        third=math.fsum(count * part.third for count, part in parts),
        fourth=math.fsum(count * part.fourth for count, part in parts),
        fifth=math.fsum(count * part.fifth for count, part in parts),
    )
