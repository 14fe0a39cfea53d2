"""Edgeworth series: the distribution of a sum of losses from its cumulants, and epsilon from that.

An approximation. Its error is absolute, about one over the number of releases, while delta lives in
the tail: what comes out here is an estimate and bounds nothing (see `interval` for what does).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

from hf_dp.accounting._losses import Floats
from hf_dp.accounting.edgeworth.cumulants import Cumulants

Order = Literal[0, 1, 2, 3]
ORDERS: tuple[Order, ...] = (0, 1, 2, 3)

_GRID = 4001
_REACH = 12.0  # standard deviations above the mean up to which delta is looked at


def correction(cumulants: Cumulants, order: Order, t: Floats) -> Floats:
    """What the series adds to the normal survival function at `t`, divided by the normal density.

    Args:
        cumulants: Of the sum.
        order: 0 is the central limit theorem; each further one uses one cumulant more.
        t: Standardised losses, ``(n,)``.

    Source:
        The expansion by powers of the inverse root of the number of terms, in probabilists' Hermite
        polynomials: Feller (1971), volume II, chapter XVI.
    """
    three, four, five = np.array(  # numpy's numbers overflow to inf, Python's raise
        [cumulants.skewness, cumulants.excess_kurtosis, cumulants.standardised_fifth]
    )
    square = t * t
    total = np.zeros_like(t)
    if order >= 1:
        total = total + three / 6 * (square - 1)
    if order >= 2:
        total = total + t * (
            four / 24 * (square - 3) + three**2 / 72 * (square**2 - 10 * square + 15)
        )
    if order >= 3:
        total = total + (
            five / 120 * (square**2 - 6 * square + 3)
            + three * four / 144 * (square**3 - 15 * square**2 + 45 * square - 15)
            + three**3 / 1296 * (square**4 - 28 * square**3 + 210 * square**2 - 420 * square + 105)
        )
    return total


def terms(cumulants: Cumulants, order: int) -> Iterator[tuple[int, float]]:
    """Power of (iu), and factor, of every term but the one in the transform of the series."""
    three, four, five = (
        cumulants.skewness,
        cumulants.excess_kurtosis,
        cumulants.standardised_fifth,
    )
    first = [(3, three / 6)]
    second = [(4, four / 24), (6, three**2 / 72)]
    third = [(5, five / 120), (7, three * four / 144), (9, three**3 / 1296)]
    return itertools.chain(*(first, second, third)[:order])


def survival(
    cumulants: Cumulants, losses: Floats, order: Order, log_factor: Floats | float = 0.0
) -> Floats:
    """The approximate chance that the sum exceeds each of `losses`, times exp(`log_factor`).

    Not clipped: it can be negative or above one. The factor is applied inside the exponents, so that
    a huge one does not meet a tiny chance as inf times zero.
    """
    from scipy.special import log_ndtr

    t = (losses - cumulants.mean) / math.sqrt(cumulants.variance)
    with np.errstate(over="ignore", invalid="ignore"):
        normal = np.exp(log_factor + log_ndtr(-t))
        density = np.exp(log_factor - t * t / 2) / math.sqrt(2 * math.pi)
        chance: Floats = normal + density * correction(cumulants, order, t)
    return chance


def estimated_delta(large: Cumulants, small: Cumulants, epsilons: Floats, order: Order) -> Floats:
    """delta(epsilon) by the series: no bound, can be negative, can rise.

    Args:
        large: Cumulants of the sum in the world where losses are large.
        small: Those in the other world.
        epsilons: In nats, ``(n,)``.
        order: See `correction`.
    """
    return survival(large, epsilons, order) - survival(small, epsilons, order, epsilons)


def estimated_epsilon(
    large: Cumulants, small: Cumulants, delta: float, order: Order = 2
) -> float | None:
    """The largest epsilon at which the estimated delta falls through `delta`.

    Returns:
        0.0 if delta(0) is estimated between 0 and `delta` and it never rises above; None if there is
        no crossing otherwise: the series has then nothing to say.
    """
    from scipy.optimize import brentq

    def excess(epsilon: float) -> float:
        return float(estimated_delta(large, small, np.array([epsilon]), order)[0]) - delta

    top = large.mean + _REACH * math.sqrt(large.variance)
    if not 0 < top < math.inf or min(large.variance, small.variance) == 0:
        return None
    grid = np.linspace(0.0, top, _GRID)
    values = estimated_delta(large, small, grid, order) - delta
    if not np.all(np.isfinite(values)):
        return None
    falls = np.flatnonzero((values[:-1] > 0) & (values[1:] <= 0))
    if len(falls) == 0:
        return 0.0 if -delta <= values[0] <= 0 and np.all(values <= 0) else None
    last = falls[-1]
    if values[last + 1] == 0:
        return float(grid[last + 1])
    return float(brentq(excess, grid[last], grid[last + 1], xtol=1e-13, rtol=1e-13))


def looks_converged(estimates: Mapping[Order, float | None]) -> bool:
    """Whether orders 1 to 3 agree so well that the second is likely within a few percent.

    A rule of thumb, not a proof: the third within 1% of the second, the second within 2% of the first.
    """
    first, second, third = (estimates[1], estimates[2], estimates[3])
    if not first or not second or not third:
        return False
    return abs(third - second) <= 0.01 * second and abs(second - first) <= 0.02 * first
