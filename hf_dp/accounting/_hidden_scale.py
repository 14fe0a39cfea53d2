"""The privacy loss of ONE number with Laplace noise whose inverse scale is drawn and not shown.

For one coordinate only: where a unit may spread over several, each with a scale of its own, a pair of
one coordinate does not dominate (test: test_two_halves_are_worse_than_one_coordinate).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from hf_dp.accounting._losses import Floats
from hf_dp.scale_law import ScaleLaw

_NODES = 4096
_NEAREST = 1e-6  # first node, over the scale on which the density falls at 0
_UNLIKELY = 1e-30
_FLATTEST = 1e-7  # losses that fall below this part of the highest are not followed outwards
_ROUNDING = 1e-13
_OF_LOGS = 1e-15


@dataclass(frozen=True)
class HiddenScale:
    """One coordinate that moves by at most 1, with noise of density f, a mixture of Laplace densities.

    With log f = psi(|x|), psi is convex and falls, as f mixes exponentials. The loss at output x is
    log f(x) - log f(x - 1). At x = -v <= 0 it is psi(v) - psi(v + 1), which falls as v grows; for x in
    [0, 1 / 2] it is psi(x) - psi(1 - x), which falls to 0; beyond that it is negative. So it is at
    most `highest`, its value at 0, and for epsilon >= 0 it exceeds epsilon on one interval (-v, w) around
    0, w <= 1 / 2. With P(|Z| > x) = M(-x),

        delta(epsilon) = 1 - (M(-w) + M(-v)) / 2 - e^epsilon (M(w - 1) - M(-v - 1)) / 2.

    The derivative of delta by the shift is e^epsilon (f(1 - w) - f(1 + v)) >= 0, the ends' own moves
    adding nothing: so a unit that moves the number by less, or the other way, costs no more.

    Guarantees:
        * `profile` is an upper bound. A wrong interval gives too small a delta; the loss is monotone on
          either side, so between a found end x and the true one it lies between its value at x and
          epsilon, and what is missed is at most |loss(x) - epsilon| times the chance of falling
          between the two, which lie in one cell of a table of losses. That is added, with what
          rounding can do (test: test_hidden_scale_agrees_with_quadrature_from_above).

    Attributes:
        law: Of the inverse scale.
    """

    law: ScaleLaw

    @functools.cached_property
    def highest(self) -> float:
        """The highest loss: never passed."""
        return highest_loss(self.law, 1.0)

    def profile(self, levels: Floats) -> Floats:
        """delta(level), or slightly more, for levels >= 0, ``(n,)``."""
        deltas = np.zeros_like(levels)
        possible = levels < self.highest
        deltas[possible] = self._delta(levels[possible])
        return deltas

    def _delta(self, levels: Floats) -> Floats:
        log_moment = self.law.log_moment
        right, missed = self._right.found(levels)
        left, missed_left = self._left.found(levels)
        present = -(np.expm1(log_moment(-right)) + np.expm1(log_moment(-left))) / 2
        near, far = log_moment(right - 1), log_moment(-left - 1)
        absent = np.exp(levels + near) * -np.expm1(far - near) / 2
        errors = missed + missed_left + _ROUNDING * (1 + levels) * present + 4e-16
        deltas: Floats = np.maximum(present - absent, 0.0) + errors
        return deltas

    @functools.cached_property
    def _right(self) -> _LossTable:
        return _LossTable(self.law, self._distances(0.5), outwards=False)

    @functools.cached_property
    def _left(self) -> _LossTable:
        reach = 1 / self.law.mean
        floor = _FLATTEST * self.highest
        while self.law.tail(reach) > _UNLIKELY and self._loss_outside(reach) > floor:
            reach *= 2
        return _LossTable(self.law, self._distances(reach), outwards=True)

    def _loss_outside(self, distance: float) -> float:
        near, far = self.law.moment_derivative(np.array([-distance, -distance - 1]))
        return math.log(near / far)

    def _distances(self, last: float) -> Floats:
        scale = self.law.mean / float(self.law.moment_second_derivative(0.0))
        first = min(_NEAREST * scale, last / 2)
        return np.concatenate(([0.0], np.geomspace(first, last, _NODES)))


class _LossTable:
    """The loss at growing distances from 0 on one side, to look up where it takes a given value."""

    def __init__(self, law: ScaleLaw, distances: Floats, *, outwards: bool) -> None:
        from scipy.interpolate import CubicHermiteSpline

        self._law, self._outwards = law, outwards
        losses = self._loss(distances)
        # Where the loss is flat, rounding may make it rise; such points are left out.
        lowest_before = np.minimum.accumulate(np.concatenate(([np.inf], losses[:-1])))
        falls = losses < lowest_before - 1e-12 * (1 + losses[0])
        self._distances, self._losses = distances[falls], losses[falls]
        slopes = np.minimum(self._slope(self._distances), -1e-300)
        self._inverse = CubicHermiteSpline(
            self._losses[::-1], self._distances[::-1], 1 / slopes[::-1]
        )
        # The chance of each cell and its two neighbours, as rounding may move an end across a node.
        tails = np.concatenate(([1.0], law.tail(self._distances), [0.0]))
        self._chances = (tails[:-3] - tails[3:]) / 2

    def found(self, levels: Floats) -> tuple[Floats, Floats]:
        """Distances at which the loss is `levels`, and how much of delta their errors may miss."""
        cells = np.searchsorted(-self._losses, -levels) - 1
        beyond = cells >= len(self._losses) - 1
        cells = np.clip(cells, 0, len(self._losses) - 2)
        distances = np.clip(
            self._inverse(levels), self._distances[cells], self._distances[cells + 1]
        )
        residuals = np.abs(self._loss(distances) - levels)
        missed = (residuals + _ROUNDING * (1 + levels)) * self._chances[cells]
        if not self._outwards:
            return distances, missed
        # Beyond the last node the interval is left open: then too much of the other density is taken off.
        too_much = np.exp(levels) * (levels + _ROUNDING) * self._law.tail(self._distances[-1])
        return np.where(beyond, np.inf, distances), np.where(beyond, too_much, missed)

    def _loss(self, distances: Floats) -> Floats:
        losses: Floats = self._psi(distances) - self._psi(self._to_the_other(distances))
        return losses

    def _slope(self, distances: Floats) -> Floats:
        other = self._psi_slope(self._to_the_other(distances))
        slopes: Floats = self._psi_slope(distances) + (-other if self._outwards else other)
        return slopes

    def _to_the_other(self, distances: Floats) -> Floats:
        """Distances from 1 of the outputs at these distances from 0."""
        return 1 + distances if self._outwards else 1 - distances

    def _psi(self, distances: Floats) -> Floats:
        logs: Floats = np.log(self._law.moment_derivative(-distances) / 2)
        return logs

    def _psi_slope(self, distances: Floats) -> Floats:
        law = self._law
        slopes: Floats = -law.moment_second_derivative(-distances) / law.moment_derivative(
            -distances
        )
        return slopes


def highest_loss(law: ScaleLaw, shift: float) -> float:
    """The highest loss of one coordinate that moves by `shift`, or hardly more: a bound.

    A difference of logs loses digits where the shift is small next to the noise. There the loss's steepest
    rise, at 0, times the shift says as much: the highest loss is concave in the shift.
    """
    rounding = _OF_LOGS * (1 + abs(math.log(law.mean)))
    steepest = shift * float(law.moment_second_derivative(0.0) / law.mean)
    return min(float(law.pure_epsilon(shift)) * (1 + 1e-14) + rounding, steepest * (1 + 1e-12))
