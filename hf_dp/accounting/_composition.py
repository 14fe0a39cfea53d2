"""Composition of discretised losses by Fourier transform, fast enough for a whole curve of epsilons."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hf_dp.accounting._losses import TILTS, DiscreteLoss, Floats

TRUNCATED_MASS = 1e-15
"""Chance of a sum outside the window of the transform; counted as an infinite loss."""


def rounding_slack(num_releases: int) -> float:
    """How much delta a composition may lose to rounding in floating point.

    A Fourier transform's error is absolute, about 1e-16 per release, so it can hide a small delta
    altogether; it is taken off the delta that is asked for. Measured errors are below a fifth of this
    (test: test_rounding_never_makes_epsilon_too_small).
    """
    return 3e-13 + 1e-16 * num_releases


def composed_epsilon(parts: Sequence[tuple[DiscreteLoss, int]], delta: float) -> float:
    """Epsilon of several losses, each composed with itself many times.

    Args:
        parts: Losses in one direction on one grid, with counts.
        delta: In (0, 1), rounding slack already taken off.

    Returns:
        The smallest epsilon >= 0 at which the composed delta is at most `delta`; inf if none is.
    """
    lowest, probabilities, infinity_mass = _composed(parts)
    return _epsilon(parts[0][0].interval, lowest, probabilities, infinity_mass, delta)


def _composed(parts: Sequence[tuple[DiscreteLoss, int]]) -> tuple[int, Floats, float]:
    """First grid index, probabilities and infinity mass of the sum of all losses."""
    from scipy.fft import irfft, next_fast_len, rfft

    start, stop = _window(parts)
    length = next_fast_len(stop - start + 1, real=True)
    spectrum = np.ones(length // 2 + 1, dtype=np.complex128)
    log_finite = 0.0
    for loss, count in parts:
        wrapped = np.zeros(-(-len(loss.probabilities) // length) * length)
        wrapped[: len(loss.probabilities)] = loss.probabilities
        spectrum *= rfft(wrapped.reshape(-1, length).sum(axis=0)) ** count
        log_finite += count * math.log1p(-loss.infinity_mass)
    sums = irfft(spectrum, length)
    # The transform is circular: index i holds the sum `offset + i` modulo its length.
    offset = sum(loss.lowest * count for loss, count in parts)
    sums = np.maximum(np.roll(sums, (offset - start) % length), 0.0)
    return start, sums, 2 * TRUNCATED_MASS - math.expm1(log_finite)


def _window(parts: Sequence[tuple[DiscreteLoss, int]]) -> tuple[int, int]:
    """Grid indices between which the sum lies, but for `TRUNCATED_MASS` on either side."""
    interval = parts[0][0].interval
    low, high = chernoff_window(log_moments(parts), TILTS)
    lowest = sum(loss.lowest * count for loss, count in parts)
    highest = sum((loss.lowest + len(loss.probabilities) - 1) * count for loss, count in parts)
    start = max(lowest, math.floor(low / interval))
    stop = min(highest, math.ceil(high / interval))
    return min(start, -1), max(stop, 1)


def log_moments(parts: Sequence[tuple[DiscreteLoss, int]]) -> Floats:
    """Log E exp(tilt * sum of all losses) for each of `TILTS`: those of independent losses add up."""
    total = np.zeros(len(TILTS))
    for loss, count in parts:
        total += count * loss.log_moments
    return total


def chernoff_window(moments: Floats, tilts: Floats) -> tuple[float, float]:
    """Losses, in nats, below and above which a sum has a chance of at most `TRUNCATED_MASS` each.

    Args:
        moments: log E exp(tilt * sum) for each tilt, ``(n,)``.
        tilts: Exponents of both signs, ``(n,)``.
    """
    ends = (moments - math.log(TRUNCATED_MASS)) / tilts
    return float(np.max(ends[tilts < 0])), float(np.min(ends[tilts > 0]))


def _epsilon(
    interval: float, lowest: int, probabilities: Floats, infinity_mass: float, delta: float
) -> float:
    from scipy.signal import lfilter

    if infinity_mass > delta or not np.isfinite(probabilities).all():
        return math.inf
    reversed_positive = probabilities[-lowest:][::-1]
    # With loss x_j at grid point j: upper_i = sum of p_j, lower_i = sum of p_j exp(x_i - x_j), j >= i;
    # for x_(i-1) <= epsilon <= x_i, delta(epsilon) = infinity mass + upper_i - exp(epsilon - x_i) lower_i.
    upper = infinity_mass + np.cumsum(reversed_positive)
    lower = lfilter([1.0], [1.0, -math.exp(-interval)], reversed_positive)
    too_much = np.flatnonzero(upper - lower > delta)
    if len(too_much) == 0:  # delta(0) is small enough
        return 0.0
    position = too_much[0] - 1
    index = len(reversed_positive) - 1 - int(position)
    fraction = float((upper[position] - delta) / lower[position])
    return max(0.0, index * interval + math.log(fraction))
