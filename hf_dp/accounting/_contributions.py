"""Privacy profile of a batch in which one unit may own several of the examples."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from decimal import Decimal, localcontext

import numpy as np

from hf_dp.accounting._losses import Direction, DiscreteLoss, Floats, discretise

_NEGLIGIBLE = math.exp(-50)  # chances below it count as an infinite loss
_QUANTILE = 9.97  # standard deviations of Gaussian noise that are passed with that chance
_MOST_KINDS = 256
_TABLE = 4001
_ROUNDS = 30
_AT_ONCE = 1 << 18


@dataclass(frozen=True, eq=False)
class Contributions:
    """How many of a unit's examples are in the batch.

    Attributes:
        numbers: What may be there, increasing, > 0, ``(k,)``.
        chances: Of each of them, ``(k,)``.
        absent: Chance of none.
        present: Its complement, without the digits that a difference would lose.
        left_out: Chance of more than the largest of `numbers`.
    """

    numbers: Floats
    chances: Floats
    absent: float
    present: float
    left_out: float

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(cls, sampling_probability: float, max_contributions: int) -> Contributions:
        """Those of a unit with `max_contributions` examples, each drawn with `sampling_probability`.

        Very many contributions, of negligible chance, are left out; very few count as a few more; and
        where more than `_MOST_KINDS` numbers are left, neighbouring ones count as the largest of them.
        All chances are rounded once only, at the end.

        Args:
            sampling_probability: In (0, 1).
            max_contributions: > 0.
        """
        chances, left_out = _binomial(sampling_probability, max_contributions)
        few = int(np.searchsorted(np.cumsum(chances), _NEGLIGIBLE))
        if few > 0:  # the unit has a few more examples there than it has: no less is given away
            chances[few] += chances[:few].sum()
            chances[:few] = 0.0
        numbers = np.arange(max(few, 1), len(chances))
        stride = -(-len(numbers) // _MOST_KINDS)
        last = np.minimum(
            np.arange(stride - 1, len(numbers) + stride - 1, stride), len(numbers) - 1
        )
        kept = np.add.reduceat(chances[numbers], np.arange(0, len(numbers), stride))
        none = -math.expm1(max_contributions * math.log1p(-sampling_probability))
        return cls(
            numbers=numbers[last].astype(np.float64),
            chances=kept,
            absent=float(chances[0]),
            present=none if few == 0 else 1.0,
            left_out=left_out,
        )


def _binomial(probability: float, size: int) -> tuple[Floats, float]:
    """Chances of 0, 1, ... successes, up to where more are negligible, and a bound on those of more."""
    chances: list[float] = []
    with localcontext() as context:
        context.prec = 40
        success = Decimal(probability)
        odds = success / (1 - success)
        chance, rest = (1 - success) ** size, Decimal(1)
        for successes in range(size + 1):
            chances.append(float(chance))
            rest -= chance
            if successes > size * probability and rest < _NEGLIGIBLE:
                break
            chance *= odds * (size - successes) / (successes + 1)
        # Forty digits are not exact, and neither is a float.
        left_out = 0.0 if len(chances) == size + 1 else float(max(rest, Decimal(0))) + 1e-30
    return np.array(chances), left_out


@dataclass(frozen=True)
class SampledContributions:
    """Gaussian noise on a sum over a Poisson sample of examples, several of which one unit owns.

    With the unit the batch holds k of its n <= `max_contributions` examples, k binomial, and they move
    the sum by at most k clipping norms: the output is a mixture of Gaussians. No direction of the
    examples' gradients does worse than all of them along one line, where k stands for the distance
    moved; and moving the mixture's parts further away only makes it easier to recognise. So the pair

        sum_k Binomial(max_contributions, sampling_probability)[k] N(k, sigma^2)  and  N(0, sigma^2)

    dominates, whatever n is: a binomial of n trials becomes one of more by adding to k. It is attained
    by a unit with `max_contributions` examples of equal, large gradients.

    Attributes:
        sampling_probability: Of each example, in (0, 1).
        max_contributions: Examples that a unit owns at most, > 0.
        noise_multiplier: Standard deviation / clipping norm of one example, > 0.

    Guarantees:
        * delta is never below that of the pair, whatever the inversion and the cut-off of the binomial
          do: delta is evaluated exactly at an epsilon that is provably not above the one asked for, and
          what is cut off is added (test: test_contributions_have_the_profile_of_their_mixture).

    Source:
        Choquette-Choo, Ganesh, Steinke and Thakurta (2023), arXiv 2310.15526, corollary 4.7, for the
        mixture of Gaussians and its monotonicity; Ganesh (2024), arXiv 2401.10294, theorem 3.1, for
        groups under Poisson sampling.
    """

    sampling_probability: float
    max_contributions: int
    noise_multiplier: float

    is_symmetric = False

    def discretised(self, direction: Direction, interval: float) -> DiscreteLoss:
        """The loss on a grid (see `discretise`)."""
        return discretise(self, direction, interval)

    def loss_range(self) -> tuple[float, float]:
        """Lowest and highest loss of the grid, in the direction "remove"."""
        ends = np.array(self._output_range)
        low, high = np.logaddexp(_log(self._kinds.absent), self._log_presence(ends)[0])
        return float(low), float(high)

    def tail(self, epsilons: Floats, direction: Direction) -> Floats:
        """delta(epsilon) of one release, for epsilons >= 0, ``(n,)``."""
        piece = max(1, _AT_ONCE // len(self._kinds.numbers))
        tail = self._removed if direction == "remove" else self._added
        starts = range(0, len(epsilons), piece)
        return np.concatenate([tail(epsilons[start : start + piece]) for start in starts])

    def _removed(self, epsilons: Floats) -> Floats:
        """The output is above a threshold t more often with the unit than e^epsilon times without it.

        With S(x) the density of the mixture without its absent part, relative to that of the noise
        alone, t has absent + S(t) = e^epsilon. Then delta is the chance of more than t with the unit
        present, less S(t) times the chance without it: each number of contributions adds something
        positive, and nothing cancels that was not close together to begin with.
        """
        from scipy.special import log_ndtr

        kinds, sigma = self._kinds, self.noise_multiplier
        # log(e^epsilon - absent), where e^epsilon might overflow
        wanted = epsilons + np.log(kinds.present * np.exp(-epsilons) - np.expm1(-epsilons))
        outputs, log_presence, found = self._outputs(wanted, side=-1)
        above = self._mixed(outputs, side=-1)
        without = np.exp(log_presence + log_ndtr(-outputs / sigma))
        deltas = np.where(found, np.maximum(above - without, 0.0) + kinds.left_out, 1.0)
        return np.minimum(deltas, 1.0)

    def _added(self, epsilons: Floats) -> Floats:
        """The output is below a threshold s more often without the unit than e^epsilon times with it.

        Here absent + S(s) = e^-epsilon, and delta is e^epsilon times S(s) times the chance of less than s
        without the unit, less the chance of it with the unit present. What is cut off of the mixture
        would only lower it.
        """
        from scipy.special import log_ndtr

        kinds, sigma = self._kinds, self.noise_multiplier
        presence = kinds.present + np.expm1(-epsilons) + 4e-16 * kinds.present
        deltas = np.zeros_like(epsilons)
        possible = presence > 0  # beyond that the loss never gets
        outputs, log_presence, found = self._outputs(np.log(presence[possible]), side=+1)
        without = np.exp(log_presence + log_ndtr(outputs / sigma))
        below = np.maximum(without - self._mixed(outputs, side=+1), 0.0)
        deltas[possible] = np.where(found, np.exp(epsilons[possible]) * below, 1.0)
        return np.minimum(deltas, 1.0)

    def _mixed(self, outputs: Floats, side: int) -> Floats:
        """Chance of an output above (-1) or below (+1) each of `outputs` with the unit present."""
        from scipy.special import ndtr

        kinds = self._kinds
        distances = side * (outputs[:, None] - kinds.numbers) / self.noise_multiplier
        chances: Floats = ndtr(distances) @ kinds.chances
        return chances

    def _outputs(self, wanted: Floats, side: int) -> tuple[Floats, Floats, np.ndarray]:
        """Outputs where log S is `wanted`, or a little below (side -1) or above (+1) it.

        log S is increasing and convex, and its slope is known, so Newton's method converges from
        everywhere. It aims at two margins beside the wanted value and counts as done within one margin
        of that; a margin is more than rounding can do to log S. So an output that is found is on the safe
        side: there epsilon is lower than asked for, by three margins at most, and delta larger.

        Returns:
            Outputs, log S there, and whether each was found, ``(n,)`` each.
        """
        steepest = float(self._kinds.numbers[-1]) / self.noise_multiplier
        margin = 1e-13 + 2e-15 * (np.abs(wanted) + steepest**2 / 2)
        aim = wanted + 2 * side * margin
        places, heights = self._table
        outputs: Floats = np.interp(aim, heights, places)
        for _ in range(_ROUNDS):
            log_presence, slope = self._log_presence(outputs)
            excess = log_presence - aim
            if (np.abs(excess) <= margin).all():
                break
            outputs = outputs - excess / slope
        log_presence, _ = self._log_presence(outputs)
        return outputs, log_presence, np.abs(log_presence - aim) <= margin

    def _log_presence(self, outputs: Floats) -> tuple[Floats, Floats]:
        """Log S at outputs ``(n,)``, and its slope, ``(n,)`` each."""
        kinds, variance = self._kinds, self.noise_multiplier**2
        exponents = outputs[:, None] * (kinds.numbers / variance)
        exponents += np.log(kinds.chances) - kinds.numbers**2 / (2 * variance)
        largest = exponents.max(axis=1)
        np.exp(np.subtract(exponents, largest[:, None], out=exponents), out=exponents)
        total = exponents.sum(axis=1)
        return largest + np.log(total), exponents @ (kinds.numbers / variance) / total

    @property
    def _kinds(self) -> Contributions:
        return Contributions.of(self.sampling_probability, self.max_contributions)

    @functools.cached_property
    def _output_range(self) -> tuple[float, float]:
        """Outputs below which the noise, and above which the mixture, is with negligible chance only."""
        sigma = self.noise_multiplier
        low, high = 0.0, float(self._kinds.numbers[-1]) + _QUANTILE * sigma
        for _ in range(40):
            middle = (low + high) / 2
            above = self._mixed(np.array([middle]), side=-1)[0]
            low, high = (low, middle) if above < _NEGLIGIBLE else (middle, high)
        return -_QUANTILE * sigma, max(high, 1 + _QUANTILE * sigma)

    @functools.cached_property
    def _table(self) -> tuple[Floats, Floats]:
        """Outputs and log S there, both increasing, to start from."""
        low, high = self._output_range
        places = np.linspace(low - self.noise_multiplier, high + self.noise_multiplier, _TABLE)
        return places, self._log_presence(places)[0]


def _log(number: float) -> float:
    return math.log(number) if number > 0 else -math.inf
