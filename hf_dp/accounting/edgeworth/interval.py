"""Between which two numbers epsilon provably lies, from the series and a bound on its error.

The distance of the series from the truth is bounded for every order; for the first order also by the
explicit theorems. At each point the sharpest order is used, and both directions count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hf_dp.accounting._losses import DIRECTIONS, Direction, Floats, SampledGaussian
from hf_dp.accounting.edgeworth.analytic import composite_rule
from hf_dp.accounting.edgeworth.characteristic import CharacteristicFunction
from hf_dp.accounting.edgeworth.cumulants import Cumulants, absolute_moments, of_sum
from hf_dp.accounting.edgeworth.series import Order, survival
from hf_dp.accounting.edgeworth.theorems import (
    Standardised,
    bound_with_continuity,
    bound_without_regularity,
    frequencies_that_matter,
)

Distances = dict[Order, float]
"""For each order a bound on the error of the series, at every point."""

_GRID = 61
_REACH = 12.0  # standard deviations
_SLACK = 1e-12  # rounding, and what the integrals leave out
_FURTHEST = 45.0  # nats; exp(-45) of a chance is left out
_MAX_PANELS = 2000


@dataclass(frozen=True)
class Interval:
    """Proven ends.

    Attributes:
        lower: No epsilon below it holds; 0.0 if nothing is known.
        upper: This epsilon holds; inf if none is known.
    """

    lower: float
    upper: float


Releases = tuple[tuple[SampledGaussian, int], ...]


@functools.lru_cache(maxsize=32)
def interval(releases: Releases, delta: float) -> Interval:
    """The interval of a composition of Poisson-sampled Gaussians.

    Args:
        releases: Kinds of releases with counts.
        delta: In (0, 1).

    Guarantees:
        * The exact epsilon lies in it (test: test_the_interval_holds_the_exact_epsilon).
    """
    lowers, uppers = [], []
    for direction in DIRECTIONS:
        # Losses are large with the unit when it is removed, and without it when it is added.
        cumulants = of_sum(dict(releases), direction, large=True)
        within = _is_within_reach(cumulants)
        distances = _distances(releases, large=direction == "remove") if within else {}
        band = _Band(cumulants, distances)
        lowers.append(band.lower(delta))
        uppers.append(min(band.upper(delta), _largest_loss(releases, direction)))
    return Interval(max(lowers), max(uppers))


def theorem_distance(releases: Releases, *, large: bool) -> float:
    """The sharper of the two explicit theorems for the first order; inf for releases of several kinds."""
    if len(releases) != 1:
        return math.inf
    ((release, count),) = releases
    loss = Standardised.of(absolute_moments(release, "remove", large=large), count)
    without = bound_without_regularity(loss)
    start, end = frequencies_that_matter(loss)
    if not start < end:
        return without
    high = CharacteristicFunction(dict(releases), large=large).integral_of_modulus(start, end)
    return min(without, bound_with_continuity(loss, high))


def _distances(releases: Releases, *, large: bool) -> Distances:
    bounds = CharacteristicFunction(dict(releases), large=large).error_bounds()
    found: Distances = {1: bounds[1], 2: bounds[2], 3: bounds[3]}
    if math.isinf(found[1]) and len(releases) == 1:  # what can be said without looking
        ((release, count),) = releases
        moments = absolute_moments(release, "remove", large=large)
        found[1] = bound_without_regularity(Standardised.of(moments, count))
    return {
        order: bound * (1 + 1e-9) + _SLACK for order, bound in found.items() if bound < math.inf
    }


def _is_within_reach(cumulants: Cumulants) -> bool:
    """Whether the sum varies enough for its series to be integrated; where noise is tiny it does not."""
    scale = math.sqrt(cumulants.variance)
    top = cumulants.mean + _REACH * scale
    return min(max(top, scale), _FURTHEST) <= _MAX_PANELS * min(scale / 2, 2.0)


def _largest_loss(releases: Releases, direction: Direction) -> float:
    """Epsilon of the worst case, delta zero: finite where every loss is."""
    if direction == "remove" or any(one.sampling_probability == 1 for one, _ in releases):
        return math.inf
    total = math.fsum(-count * math.log1p(-one.sampling_probability) for one, count in releases)
    return total * (1 + 1e-12)


@dataclass(frozen=True)
class _Band:
    """Bounds on delta(epsilon) in one direction, from the world whose losses are large.

    With S the loss in that world, delta(epsilon) is the integral of exp(-c) P(S > epsilon + c) over
    c > 0. The weights add up to one, so an error of the chance is one of delta, and not a larger one.
    """

    cumulants: Cumulants
    distances: Distances

    def above(self, epsilons: Floats) -> Floats:
        """Upper bounds on delta at each of `epsilons`."""
        ends = [
            self._series(epsilons, order) + distance for order, distance in self.distances.items()
        ]
        deltas: Floats = np.minimum.reduce([*ends, np.ones(len(epsilons))])
        return deltas

    def below(self, epsilons: Floats) -> Floats:
        """Lower bounds on delta at each of `epsilons`."""
        ends = [
            self._series(epsilons, order) - distance for order, distance in self.distances.items()
        ]
        deltas: Floats = np.maximum.reduce([*ends, np.zeros(len(epsilons))])
        return deltas

    def _series(self, epsilons: Floats, order: Order) -> Floats:
        """The integral over the series instead of the chance, each panel a fraction of a deviation."""
        scale = math.sqrt(self.cumulants.variance)
        # Beyond both ends the integrand is below exp(-45), or that of a normal at ten deviations.
        top = self.cumulants.mean + _REACH * scale
        lengths = np.minimum(np.maximum(top - epsilons, scale), _FURTHEST)
        panels = math.ceil(float(np.max(lengths)) / min(scale / 2, 2.0))
        nodes, weights = composite_rule(panels)
        distances = lengths[:, None] * nodes
        losses = epsilons[:, None] + distances
        chances = survival(self.cumulants, losses.ravel(), order).reshape(losses.shape)
        deltas: Floats = lengths * ((chances * np.exp(-distances)) @ weights)
        return deltas

    def upper(self, delta: float) -> float:
        """The least epsilon found at which delta is proven to be small enough; inf if none is."""
        grid = self._grid()
        good = np.flatnonzero(self.above(grid) <= delta)
        if len(good) == 0:
            return math.inf
        if good[0] == 0:
            return 0.0
        bad, holds = float(grid[good[0] - 1]), float(grid[good[0]])
        return _narrowed(lambda epsilon: self.above(epsilon)[0] <= delta, holds, bad)

    def lower(self, delta: float) -> float:
        """The largest epsilon found at which delta is proven to be too large; 0.0 if none is."""
        grid = self._grid()
        too_large = np.flatnonzero(self.below(grid) > delta)
        if len(too_large) == 0:
            return 0.0
        last = too_large[-1]
        if last == len(grid) - 1:
            return float(grid[last])
        return _narrowed(
            lambda epsilon: self.below(epsilon)[0] > delta, float(grid[last]), float(grid[last + 1])
        )

    def _grid(self) -> Floats:
        top = self.cumulants.mean + _REACH * math.sqrt(self.cumulants.variance)
        return np.linspace(0.0, top, _GRID)


def _narrowed(holds: Callable[[Floats], bool], good: float, bad: float) -> float:
    """Bisect between a point that holds and one that does not; always a point that holds."""
    for _ in range(40):
        middle = (good + bad) / 2
        if holds(np.array([middle])):
            good = middle
        else:
            bad = middle
    return good
