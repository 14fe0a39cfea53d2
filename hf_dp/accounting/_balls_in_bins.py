"""The privacy loss of one pass of balls in bins, bounded without sampling.

A unit's batch is one of T, each equally likely. Against a pass without the unit the likelihood ratio is
the mean S of T independent lognormals exp((2 x - 1) / (2 sigma^2)), x ~ N(0, sigma^2), and

    delta(epsilon) = E max(S - e^epsilon, 0)  (remove),    E max(1 - e^epsilon S, 0)  (add).

Both are expectations of convex functions of S, so they only grow where a value is replaced by a random
one with the same mean. Sums of lognormals are built by doubling, every partial sum rounded in this way
to a grid of values e^(k h): the result is an upper bound whatever the grid, and its error falls with h^2.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from hf_dp.accounting._losses import Direction, DiscreteLoss, Floats

_COARSEST = 0.01
_FINEST = 2e-6  # a bound for epsilons as small as this need not be tight
_FINENESS = 2e-4  # the grid may add this part of the variance of a mean, times 10 / 6 at most
_QUANTILE = 8.8  # chances below exp(-41) at either end are moved to zero, or to an infinite loss
_NEGLIGIBLE = 1e-19  # of every partial sum
_BEYOND_NUMBERS = 300.0  # nats
_SHORT = 24  # kernels up to this length are faster added up one by one

# What rounding in floating point can do, generously: to a value, and to a probability. Values get ten
# times as much as mean and mass are seen to be off, should that be more.
_VALUE_SLACK = 1e-12
_PROBABILITY_SLACK = 1e-10


@dataclass(frozen=True, eq=False)
class GridSum:
    """A sum of lognormals on a geometric grid, under the neighbour without the unit.

    Attributes:
        interval: Distance of the values' logarithms, > 0.
        first: The first value is ``exp(first * interval)``.
        probabilities: Chance of each value, ``(n,)``.
        zero: Chance of the value 0.
        lost: Mean that was moved to infinity.
    """

    interval: float
    first: int
    probabilities: Floats
    zero: float
    lost: float

    @property
    def logs(self) -> Floats:
        """Logarithms of the values, ``(n,)``."""
        places = self.first + np.arange(len(self.probabilities), dtype=np.float64)
        logs: Floats = places * self.interval
        return logs

    def drift(self, mean: float) -> float:
        """How far rounding in floating point has moved the total chance, or the relative mean."""
        found = (np.dot(self.probabilities, np.exp(self.logs)) + self.lost) / mean
        mass = self.probabilities.sum() + self.zero
        return float(abs(found - 1) + abs(mass - 1))

    def refined(self, interval: float) -> GridSum:
        """The same on a grid at most as coarse as `interval`, halved as often as that takes."""
        same = self
        while same.interval > interval:
            spread = np.zeros(2 * len(same.probabilities) - 1)
            spread[::2] = same.probabilities
            same = replace(
                same, interval=same.interval / 2, first=2 * same.first, probabilities=spread
            )
        return same

    def trimmed(self) -> GridSum:
        """Without the unlikely ends."""
        means = self.probabilities * np.exp(self.logs)
        above = np.cumsum(means[::-1])[::-1]
        stop = int(np.searchsorted(-above, -_NEGLIGIBLE * above[0])) + 1
        start = int(np.searchsorted(np.cumsum(self.probabilities), _NEGLIGIBLE))
        return self.cut(min(start, stop - 2), min(stop, len(self.probabilities)))

    def cut(self, start: int, stop: int) -> GridSum:
        """With values of index start, ..., stop - 1 alone; the others move without a change of mean.

        Smaller ones become 0 or the least value, larger ones the largest value or infinity.
        """
        start = max(start, 0)
        logs = self.logs
        kept = self.probabilities[start:stop].copy()
        low, high = self.probabilities[:start], self.probabilities[stop:]
        raised = float(np.dot(low, np.exp(logs[:start] - logs[start])))
        kept[0] += raised
        kept[-1] += high.sum()
        beyond = float(np.dot(high, np.exp(logs[stop:]) - math.exp(logs[stop - 1])))
        return GridSum(
            self.interval,
            self.first + start,
            kept,
            self.zero + max(float(low.sum()) - raised, 0.0),
            self.lost + beyond,
        )


def lognormal(noise_multiplier: float, interval: float) -> GridSum:
    """One lognormal on a grid; its mean is 1.

    Args:
        noise_multiplier: > 0.
        interval: Of the grid, > 0.
    """
    from scipy.special import ndtr

    sigma = noise_multiplier
    reach = _QUANTILE / sigma
    first = math.floor((-reach - 0.5 / sigma**2) / interval)
    last = math.ceil((reach + 0.5 / sigma**2) / interval)
    logs = np.arange(first, last + 1) * interval

    def cells(centre: float) -> Floats:
        """Chances of below the grid, of each cell, and of above it, from the nearer tail."""
        ends = sigma * (logs - centre)
        below = np.concatenate(([0.0], ndtr(ends)))
        above = np.concatenate((ndtr(-ends), [0.0]))
        left = np.append(below[1:], 1.0) - below
        right = np.append(1.0, above[:-1]) - above
        middle = np.concatenate(([-math.inf], ends))
        chances: Floats = np.where(middle < 0, left, right)
        return chances

    without, present = cells(-0.5 / sigma**2), cells(0.5 / sigma**2)
    width = math.expm1(interval)
    # In a cell between a and b, chance c and mean m become (m - a c) / (b - a) at b and the rest at a.
    inside = without[1:-1]
    upper = np.clip((present[1:-1] * np.exp(-logs[:-1]) - inside) / width, 0.0, inside)
    probabilities = np.zeros(len(logs))
    probabilities[:-1] += inside - upper
    probabilities[1:] += upper
    raised = present[0] * math.exp(-logs[0])
    probabilities[0] += raised
    probabilities[-1] += without[-1]
    lost = present[-1] - without[-1] * math.exp(logs[-1])
    return GridSum(
        interval, first, probabilities, float(max(without[0] - raised, 0.0)), float(max(lost, 0.0))
    )


def added(one: GridSum, other: GridSum) -> GridSum:
    """The sum of two independent sums on one grid, rounded to that grid without a change of mean."""
    h = one.interval
    first = min(one.first, other.first)
    last = max(one.first + len(one.probabilities), other.first + len(other.probabilities)) - 1
    p, q = (np.zeros(last - first + 1) for _ in range(2))
    p[one.first - first :][: len(one.probabilities)] = one.probabilities
    q[other.first - first :][: len(other.probabilities)] = other.probabilities
    sums, base = _room_for_pairs(len(p), h)
    _add_pairs(sums, base, p, q, h, least=0)
    _add_pairs(sums, base, q, p, h, least=1)
    zero = one.zero * other.zero + _add_singles(sums, base, other.zero * p + one.zero * q, h)
    return GridSum(h, first + base, sums, zero, one.lost + other.lost).trimmed()


def doubled(one: GridSum) -> GridSum:
    """`added` to an independent copy of itself, in half the time."""
    h, p = one.interval, one.probabilities
    sums, base = _room_for_pairs(len(p), h)
    _add_pairs(sums, base, p, p, h, least=1)
    sums *= 2
    zero = one.zero**2 + _add_singles(sums, base, 2 * one.zero * p, h)
    # Equal values: log 2 above each.
    step = math.floor(math.log(2) / h)
    upper = math.expm1(math.log(2) - step * h) / math.expm1(h)
    sums[step - base :][: len(p)] += (1 - upper) * p**2
    sums[step - base + 1 :][: len(p)] += upper * p**2
    return GridSum(h, one.first + base, sums, zero, 2 * one.lost).trimmed()


def _room_for_pairs(n: int, h: float) -> tuple[Floats, int]:
    """Zeros for the sums of pairs of `n` grid points, and how far above the first point they begin."""
    base = math.floor(math.log1p(math.exp(-n * h)) / h)
    return np.zeros(n + math.ceil(math.log(2) / h) + 1 - base), base


def _add_singles(sums: Floats, base: int, chances: Floats, h: float) -> float:
    """Add values alone, as their partner is 0; those below the sums' first go there, or to 0.

    Returns:
        The chance that went to 0.
    """
    sums[: max(len(chances) - base, 0)] += chances[base:]
    low = chances[:base]
    raised = low * np.exp((np.arange(len(low)) - base) * h)
    sums[0] += raised.sum()
    return float((low - raised).sum())


def _add_pairs(
    sums: Floats, base: int, small: Floats, large: Floats, h: float, *, least: int
) -> None:
    """Add all pairs whose `large` value is at least `least` grid points above the `small` one.

    The sum of values e^(i h) and e^((i + d) h) is e^((i + d) h) (1 + e^(-d h)): how far it lies above
    the larger one depends on d alone, so pairs with the same rounding are added together.

    Args:
        sums: What is added to; its first value lies `base` grid points above that of the others.
        base: See `sums`.
        small: Chances of the smaller values, ``(n,)``.
        large: Chances of the larger values on the same grid, ``(n,)``.
        h: Interval of the grid.
        least: 0 or 1.
    """
    from scipy.signal import lfilter

    (s0, s1), (l0, l1) = _support(small), _support(large)
    closest = max(least, l0 - s1 + 1)
    ratios = np.exp(-np.arange(closest, l1 - s0) * h)
    steps = np.floor(np.log1p(ratios) / h).astype(int)
    growth = math.expm1(h)
    # The sum is between grid points; its mean is kept by this chance of the upper one.
    uppers = np.clip((1 + ratios - np.exp(steps * h)) / (np.exp(steps * h) * growth), 0.0, 1.0)
    bounds = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(ratios)]
    for start, stop in itertools.pairwise(bounds if len(ratios) else []):
        step, nearest = int(steps[start]), closest + start
        values = large[max(l0, s0 + nearest) : l1]
        # Partners at distance `nearest` are the last of these, those farther away stand before them.
        wanted = l1 - nearest - len(values)
        begin = s0 if step == 0 else max(s0, wanted - (stop - start - 1))
        partners = small[begin : l1 - nearest]
        if step == 0:  # and all that are farther: `upper` falls like e^(-d h)
            raised = lfilter([1.0], [1.0, -math.exp(-h)], partners) * (ratios[start] / growth)
            kept = np.maximum(np.cumsum(partners) - raised, 0.0)
        elif stop - start <= _SHORT:
            raised, kept = uppers[start] * partners, (1 - uppers[start]) * partners
            for farther in range(1, min(stop - start, len(partners))):
                upper, reached = uppers[start + farther], partners[:-farther]
                raised[farther:] += upper * reached
                kept[farther:] += (1 - upper) * reached
        else:
            raised = np.convolve(partners, uppers[start:stop])[: len(partners)]
            kept = np.convolve(partners, 1 - uppers[start:stop])[: len(partners)]
        start_at = l1 - len(values) + step - base
        sums[start_at : start_at + len(values)] += values * kept[wanted - begin :]
        sums[start_at + 1 : start_at + 1 + len(values)] += values * raised[wanted - begin :]
        if step == 0:
            return


def _support(chances: Floats) -> tuple[int, int]:
    """The first index that is not zero, and the one after the last."""
    places = np.flatnonzero(chances)
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


@functools.lru_cache(maxsize=64)
def sum_of_lognormals(noise_multiplier: float, count: int) -> GridSum:
    """The sum of `count` independent lognormals, an upper bound in the sense of this module.

    Args:
        noise_multiplier: > 0.
        count: > 0.
    """
    # A grid of interval h adds (h m)^2 / 6 to the variance of a sum of m, of which count / m are added.
    spread = math.expm1(min(noise_multiplier**-2, 30.0))

    def fine(terms: int) -> float:
        return min(_COARSEST, max(_FINEST, math.sqrt(_FINENESS * spread / terms)))

    @functools.cache
    def of(terms: int) -> GridSum:
        if terms == 1:
            halvings = max(0, math.ceil(math.log2(_COARSEST / fine(1))))
            return lognormal(noise_multiplier, _COARSEST / 2**halvings)
        half, rest = (of(part).refined(fine(terms)) for part in (terms // 2, terms - terms // 2))
        return doubled(half) if terms % 2 == 0 else added(half, rest)

    return of(count)


@dataclass(frozen=True)
class BallsInBinsPass:
    """One pass of Gaussian releases, each unit in one of them.

    Attributes:
        num_batches: Releases of the pass, > 1.
        noise_multiplier: Standard deviation divided by sensitivity, > 0.
    """

    num_batches: int
    noise_multiplier: float

    is_symmetric = False

    def loss_range(self) -> tuple[float, float]:
        """Lowest and highest loss of the grid, in the direction "remove"."""
        alone = _QUANTILE / self.noise_multiplier + 0.5 / self.noise_multiplier**2
        if alone > _BEYOND_NUMBERS:  # exponentials would overflow, and nothing is protected
            return -alone, alone
        logs = self._sum.logs - math.log(self.num_batches)
        return float(logs[0]), float(logs[-1])

    def discretised(self, direction: Direction, interval: float) -> DiscreteLoss:
        """The loss on a grid, rounded without a change of mean once more.

        Args:
            direction: Which neighbour is the larger.
            interval: Distance of grid points, > 0, in nats.

        Guarantees:
            * Never more private than the pass (test: test_a_pass_is_never_less_than_its_simulation).
        """
        towards = 1 if direction == "remove" else -1
        slack = max(_VALUE_SLACK, 10 * self._sum.drift(self.num_batches))
        logs = self._sum.logs - math.log(self.num_batches) + towards * slack
        below = np.floor(logs / interval).astype(np.int64)
        upper = np.clip(np.expm1(logs - below * interval) / math.expm1(interval), 0.0, 1.0)
        lowest, highest = min(int(below[0]), -1), max(int(below[-1]) + 1, 1)
        masses = np.zeros(highest - lowest + 1)
        np.add.at(masses, below - lowest, self._sum.probabilities * (1 - upper))
        np.add.at(masses, below + 1 - lowest, self._sum.probabilities * upper)
        masses *= 1 + _PROBABILITY_SLACK
        if direction == "remove":
            masses *= np.exp(np.arange(lowest, highest + 1) * interval)
            return DiscreteLoss(interval, lowest, masses, self._sum.lost / self.num_batches)
        return DiscreteLoss(interval, -highest, masses[::-1].copy(), self._sum.zero)

    @property
    def _sum(self) -> GridSum:
        return sum_of_lognormals(self.noise_multiplier, self.num_batches)
