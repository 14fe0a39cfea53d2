"""The privacy loss of Laplace noise whose inverse scale is drawn once a release and may be seen."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from hf_dp.accounting._losses import Floats
from hf_dp.scale_law import ScaleLaw

_CELLS = 16_384
_UNLIKELY = 1e-22
_ROUNDING = 1e-11
_NUDGE = 1e-6  # part of every cell that goes to its upper end, for rounding in the means


@dataclass(frozen=True)
class ReleasedScale:
    """Any number of coordinates that move by at most 1 together, given an inverse scale that is shown.

    Given lambda, the pair of one coordinate dominates (`FixedScale`), and lambda's law is the same in
    both worlds, so

        delta(epsilon) = E[max(1 - e^(epsilon / 2) R, 0)],  R = e^(-lambda / 2).

    That is convex in R, and in each factor of R where lambda is a sum of independent parts. So it only
    grows where a part's chance in a cell of a grid is split between the two ends such that the mean of its
    factor stays (`_split`), and where more of it goes to the upper end. Parts on a grid are added up by
    convolution; where a part may be beyond its grid, the loss counts as infinite.

    Guarantees:
        * `profile` is an upper bound whatever the grid: no step of it goes below, and sums of
          positive numbers round by less than what is added
          (test: test_released_scale_agrees_with_quadrature_from_above).

    Attributes:
        law: Of the inverse scale, at sensitivity 1.
    """

    law: ScaleLaw

    @property
    def highest(self) -> float:
        """A loss that is almost never passed."""
        return self.law.uniform_high + sum(_reach(*gamma) for gamma in _gammas(self.law))

    def profile(self, levels: Floats) -> Floats:
        """delta(level), or slightly more, for levels >= 0, ``(n,)``."""
        return _on_grid(self.law).profile(levels)


@functools.lru_cache(maxsize=32)
def _on_grid(law: ScaleLaw) -> _GridLaw:
    width, gammas = law.uniform_high - law.uniform_low, _gammas(law)
    interval = (sum(_reach(*gamma) for gamma in gammas) + width) / _CELLS
    chances, gone = np.ones(1), 0.0
    for gamma in gammas:
        part, beyond = _gamma_part(*gamma, interval)
        chances, gone = np.convolve(chances, part), gone + beyond
    if width > 0:
        chances = np.convolve(chances, _uniform_part(width, interval))
    return _GridLaw.of(law.uniform_low, interval, chances, gone)


def _gammas(law: ScaleLaw) -> list[tuple[float, float]]:
    """Shapes and scales of the unbounded parts."""
    parts = [(law.gamma_shape, law.gamma_scale), (1.0, law.exponential_mean)]
    return [(shape, scale) for shape, scale in parts if scale > 0]


def _reach(shape: float, scale: float) -> float:
    """What a Gamma variable almost never passes."""
    from scipy.special import gammainccinv

    return scale * float(gammainccinv(shape, _UNLIKELY))


def _gamma_part(shape: float, scale: float, interval: float) -> tuple[Floats, float]:
    """Chances of the points of a grid from 0 on, and that of being beyond it."""
    from scipy.special import gammainc, gammaincc

    edges = interval * np.arange(math.ceil(_reach(shape, scale) / interval) + 1)
    points = edges / scale

    def inside(order: float) -> Floats:
        """The chance of each cell, from the side on which fewer digits cancel."""
        below, above = np.diff(gammainc(order, points)), -np.diff(gammaincc(order, points))
        chances: Floats = np.maximum(np.where(points[:-1] < shape, below, above), 0.0)
        return chances

    chances = inside(shape)
    # x times the density of shape k is k times that of shape k + 1.
    sums = shape * scale * inside(shape + 1)
    means = np.divide(sums, chances, out=edges[1:].copy(), where=chances > 0) - edges[:-1]
    return _split(chances, means / interval, interval), float(gammaincc(shape, points[-1]))


def _uniform_part(width: float, interval: float) -> Floats:
    """Chances of the points of a grid from the lower end on."""
    edges = interval * np.arange(math.ceil(width / interval) + 1)
    lengths = np.diff(np.minimum(edges, width))
    return _split(lengths / width, lengths / (2 * interval), interval)


def _split(chances: Floats, means: Floats, interval: float) -> Floats:
    """Move what is in cells to their ends.

    A point at the part x of a cell of length h keeps the mean of exp(-lambda / 2) if
    (1 - e^(-x h / 2)) / (1 - e^(-h / 2)) of it goes to the upper end. That is at most
    x + h (1 + h / 2) / 16: as a function of x h it is concave, and it exceeds its chord by at most h^2 / 8
    times its largest second derivative, (1 / 4) / (1 - e^(-h / 2)) <= (1 + h / 2) / (2 h).

    Args:
        chances: Of the cells, ``(n,)``.
        means: Places inside the cells, on average, 0 to 1, ``(n,)``.
        interval: Length of the cells.
    """
    up = np.clip(means + interval * (1 + interval / 2) / 16 + _NUDGE, 0.0, 1.0)
    ends: Floats = np.append(chances * (1 - up), 0.0) + np.append(0.0, chances * up)
    return ends


@dataclass(frozen=True, eq=False)
class _GridLaw:
    """Inverse scales ``lowest + i * interval``, their chances added up from above.

    Attributes:
        lowest: First inverse scale.
        interval: Distance of the next.
        tilted: For each i, the sum over j >= i of chance_j * exp((lambda_i - lambda_j) / 2), ``(n,)``.
        deltas: delta at each lambda_i, ``(n,)``.
        infinity_mass: Chance of an infinite loss.
    """

    lowest: float
    interval: float
    tilted: Floats
    deltas: Floats
    infinity_mass: float

    @classmethod
    def of(cls, lowest: float, interval: float, chances: Floats, gone: float) -> _GridLaw:
        """Add up chances from above: positive terms only."""
        from scipy.signal import lfilter

        tilted = lfilter([1.0], [1.0, -math.exp(-interval / 2)], chances[::-1])[::-1]
        steps = tilted[1:] * -math.expm1(-interval / 2)
        deltas = np.append(np.cumsum(steps[::-1])[::-1], 0.0)
        return cls(lowest, interval, tilted, deltas, gone)

    def profile(self, levels: Floats) -> Floats:
        places = np.ceil((levels - self.lowest) / self.interval).astype(int)
        inside = np.clip(places, 0, len(self.deltas) - 1)
        gap = self.lowest + inside * self.interval - levels  # up to the next inverse scale
        deltas = self.deltas[inside] + self.tilted[inside] * -np.expm1(-np.maximum(gap, 0.0) / 2)
        deltas = np.where(places >= len(self.deltas), 0.0, deltas)
        bounded: Floats = np.minimum(deltas * (1 + _ROUNDING) + self.infinity_mass, 1.0)
        return bounded
