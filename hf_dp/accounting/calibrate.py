"""How much noise, how many steps, how large a batch a target affords.

A cheap search first, then the accountant's own last word: nothing is returned that it did not certify.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from hf_dp._validate import positive
from hf_dp.errors import ConfigurationError, explain

LEAST_NOISE = 0.01
"""Noise multipliers below this are not searched: they hide nothing at any target worth asking for."""

MOST_NOISE = 1e6
"""A target that needs more noise than this is refused: such a run learns nothing."""

_DIGITS = 5
_MAX_CERTIFICATES = 30
_CLOSE = 1e-4  # more noise than needed, relative, at which a search ends

Epsilon = Callable[[float], float]
"""Epsilon as a function of what is searched for."""


def smallest_noise(quick: Epsilon, certified: Epsilon, target_epsilon: float) -> float:
    """A noise multiplier of five significant digits that meets the target, hardly larger than needed.

    Args:
        quick: Epsilon as a function of the noise multiplier, cheap, to search with.
        certified: The same, tight: the accountant's guarantee. Only it decides.
        target_epsilon: > 0.

    Returns:
        A noise multiplier at which `certified` is at most `target_epsilon`, while it is not at the
        five-digit number below, or would not be if epsilon goes on as between the last two points.

    Raises:
        ConfigurationError: The target is not positive, or more than `MOST_NOISE` would be needed.
    """
    check_target(target_epsilon)
    start, slope = _search(quick, target_epsilon)
    noise = rounded_up(start)
    failing, passing = 0.0, math.inf
    last: tuple[float, float] | None = None
    for _ in range(_MAX_CERTIFICATES):
        epsilon = certified(noise)
        if epsilon <= target_epsilon:
            passing = min(passing, noise)
        else:
            failing = max(failing, noise)
        slope = slope_between(last, (noise, epsilon), slope)
        last = (noise, epsilon)
        guess = noise * (max(epsilon, 1e-6 * target_epsilon) / target_epsilon) ** (1 / slope)
        if passing <= LEAST_NOISE or _neighbour(passing, -1) <= failing:
            return passing
        if passing == noise and (
            passing <= guess * (1 + _CLOSE / 2) or _neighbour(passing, -1) < guess
        ):
            return passing
        noise = rounded_up(max(guess * (1 + 1e-6), LEAST_NOISE))
        noise = max(min(noise, _neighbour(passing, -1)), _neighbour(failing, +1))
    if math.isinf(passing):
        raise _out_of_reach(target_epsilon)
    return passing


def check_target(target_epsilon: float) -> float:
    """Refuse a target that is no finite number > 0."""
    return positive(
        "Accountant.target_epsilon",
        target_epsilon,
        "At zero nothing can be learnt from the data.",
        "Use a number between 0.1 and 10.",
    )


def slope_between(
    last: tuple[float, float] | None, now: tuple[float, float], guess: float
) -> float:
    """How steeply log(epsilon) changes with the log of what is searched for, without its sign.

    Args:
        last: A point and its epsilon, or None.
        now: Another.
        guess: The answer where the two do not tell.
    """
    if last is None or not (0 < last[1] < math.inf and 0 < now[1] < math.inf):
        return guess
    run = math.log(now[0] / last[0])
    if abs(run) < 1e-5:
        return guess
    return min(max(abs(math.log(now[1] / last[1]) / run), 0.1), 10.0)


def _search(quick: Epsilon, target: float) -> tuple[float, float]:
    """Where `quick` meets the target, and how steeply it falls there, on logarithmic scales."""
    from scipy.optimize import brentq

    def excess(log_noise: float) -> float:
        return math.log(min(max(quick(math.exp(log_noise)) / target, 1e-9), 1e9))

    low, high = _bracket(quick, target)
    root = (
        low if low == high else math.exp(brentq(excess, math.log(low), math.log(high), xtol=1e-4))
    )
    rise = excess(math.log(root)) - excess(math.log(root) + 0.02)
    return root, min(max(rise / 0.02, 0.1), 10.0)


def _bracket(quick: Epsilon, target: float) -> tuple[float, float]:
    """Two noise multipliers with the target's between them; equal where the least noise meets it."""
    low = high = 1.0
    if quick(1.0) > target:
        while quick(high) > target:
            low, high = high, high * 4
            if low > MOST_NOISE:
                raise _out_of_reach(target)
        return low, high
    while quick(low) <= target:
        if low <= LEAST_NOISE:
            return LEAST_NOISE, LEAST_NOISE
        low, high = max(low / 2, LEAST_NOISE), low
    return low, high


def _out_of_reach(target: float) -> ConfigurationError:
    return ConfigurationError(
        explain(
            "Accountant.target_epsilon",
            target,
            "a target that a noise multiplier up to 1e6 reaches",
            "With more noise than that a run learns nothing.",
            "Ask for a larger epsilon or delta, fewer steps or smaller batches; and see that every "
            "release of the plan is private.",
        )
    )


def rounded_up(number: float) -> float:
    """The least number of five significant digits that is not below (but for rounding)."""
    places = _DIGITS - 1 - math.floor(math.log10(number))
    return round(math.ceil(number * 10.0**places * (1 - 1e-12)) / 10.0**places, places)


def _neighbour(number: float, steps: int) -> float:
    """The number of five significant digits just below (-1) or above (+1)."""
    if number == 0 or math.isinf(number):
        return number
    places = _DIGITS - 1 - math.floor(math.log10(number))
    moved = round(number + steps * 10.0**-places, places)
    if moved < 10.0 ** math.floor(math.log10(number)):  # below 1.0000 comes 0.99999
        return round(number + steps * 10.0 ** -(places + 1), places + 1)
    return moved
