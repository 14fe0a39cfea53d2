"""How many steps, or how large a batch, a target affords with the noise that is given."""

from __future__ import annotations

import math
from collections.abc import Callable

from hf_dp._validate import positive_integer
from hf_dp.accounting.base import Accountant
from hf_dp.accounting.calibrate import check_target, slope_between
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import NeighboringRelation, PrivacyEvent, SelfComposed

MOST_STEPS = 10**8
"""Runs are not searched beyond it."""

_MAX_CERTIFICATES = 60
_CLOSE = 1e-3  # fewer steps, or a smaller batch, than affordable, relative, at which a search ends
_FINEST = 1e-6  # share of the whole data below which batches are not searched


def most_steps(
    accountant: Accountant,
    step: PrivacyEvent,
    *,
    target_epsilon: float,
    target_delta: float,
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> int:
    """The number of steps that a target affords.

    Args:
        accountant: Who certifies.
        step: What one step releases, noise included.
        target_epsilon: > 0.
        target_delta: In (0, 1).
        relation: Which datasets count as neighbours.

    Returns:
        A number of steps, at most `MOST_STEPS`, whose guarantee is within the target, while that of
        0.1% (or one) more is not.

    Raises:
        UnsupportedEventError: The step or the relation has no proven cost.
        ConfigurationError: A target is out of range, not even one step is within it, or the
            accountant only estimates.
    """
    accountant.check_bounds()
    check_target(target_epsilon)

    def certified(count: float) -> float:
        whole = SelfComposed(step, int(count))
        return accountant.guarantee(whole, delta=target_delta, relation=relation).epsilon

    if _or_inf(lambda: certified(MOST_STEPS)) <= target_epsilon:
        return MOST_STEPS
    if certified(1) > target_epsilon:
        raise _unaffordable("num_steps", target_epsilon, "one step", "Use more noise.")

    def quick(count: float) -> float:
        whole = SelfComposed(step, int(count))
        return _or_inf(
            lambda: accountant.rough_epsilon(whole, delta=target_delta, near=target_epsilon)
        )

    high = 1.0
    while high < MOST_STEPS and quick(high) <= target_epsilon:
        high *= 4
    start = _bisected(quick, 1.0, min(high, MOST_STEPS), target_epsilon)
    return int(
        _largest(
            lambda count: _or_inf(lambda: certified(count)),
            target_epsilon,
            start=float(math.floor(start)),
            ends=(1.0, float(MOST_STEPS)),
            rounded=math.floor,
            resolution=1.0,
        )
    )


def largest_batch(
    accountant: Accountant,
    run: Callable[[float], PrivacyEvent],
    *,
    num_examples: int,
    target_epsilon: float,
    target_delta: float,
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> float:
    """The expected batch size that a target affords.

    Args:
        accountant: Who certifies.
        run: What the whole run releases, as a function of the expected batch size; the number of steps
            may depend on it, as long as larger batches cost more.
        num_examples: Size of the data: the largest batch there can be.
        target_epsilon: > 0.
        target_delta: In (0, 1).
        relation: Which datasets count as neighbours.

    Returns:
        A batch size, at most `num_examples`, whose guarantee is within the target, while that of one
        larger by 0.1% is not.

    Raises:
        UnsupportedEventError: The run or the relation has no proven cost.
        ConfigurationError: A target is out of range, no batch is within it, or the accountant only
            estimates.
    """
    accountant.check_bounds()
    check_target(target_epsilon)
    positive_integer(
        "largest_batch.num_examples",
        num_examples,
        "It is the largest batch there can be.",
        "Use the number of examples.",
    )

    def certified(batch: float) -> float:
        return accountant.guarantee(run(batch), delta=target_delta, relation=relation).epsilon

    least = max(num_examples * _FINEST, 1e-3)
    if certified(num_examples) <= target_epsilon:
        return float(num_examples)
    if certified(least) > target_epsilon:
        raise _unaffordable(
            "expected_batch_size", target_epsilon, "any batch", "Use more noise or fewer steps."
        )

    def quick(batch: float) -> float:
        return _or_inf(
            lambda: accountant.rough_epsilon(run(batch), delta=target_delta, near=target_epsilon)
        )

    return _largest(
        certified,
        target_epsilon,
        start=_bisected(quick, least, float(num_examples), target_epsilon),
        ends=(least, float(num_examples)),
        rounded=float,
        resolution=0.0,
    )


def _bisected(quick: Callable[[float], float], low: float, high: float, target: float) -> float:
    """About the largest argument at which `quick` is within the target, between two ends."""
    while high > low * (1 + _CLOSE):
        middle = math.sqrt(low * high)
        if quick(middle) <= target:
            low = middle
        else:
            high = middle
    return low


def _largest(
    certified: Callable[[float], float],
    target: float,
    *,
    start: float,
    ends: tuple[float, float],
    rounded: Callable[[float], float],
    resolution: float,
) -> float:
    """The largest argument whose certificate is within the target; that of the lower end is known to be."""
    passing, failing = ends[0], math.inf
    guess, slope = start, 0.6
    last: tuple[float, float] | None = None
    for _ in range(_MAX_CERTIFICATES):
        epsilon = certified(guess)
        if epsilon <= target:
            passing = max(passing, guess)
        else:
            failing = min(failing, guess)
        slope = slope_between(last, (guess, epsilon), slope)
        last = (guess, epsilon)
        finite = min(max(epsilon, 1e-6 * target), 1e6 * target)
        wanted = min(guess * (target / finite) ** (1 / slope), ends[1])
        near = max(resolution, passing * _CLOSE)
        if failing - passing <= near or passing >= ends[1]:
            return passing
        if passing == guess and wanted - passing < near / 2:
            return passing
        inside = (passing + max(resolution, passing * _CLOSE / 4), failing - resolution)
        guess = min(max(rounded(wanted * (1 - _CLOSE / 10)), inside[0]), inside[1], ends[1])
        if not passing < guess < failing:
            guess = rounded(math.sqrt(passing * failing))
    return passing


def _or_inf(epsilon: Callable[[], float]) -> float:
    """Epsilon; inf where the accountant has no number for so many releases."""
    try:
        return epsilon()
    except ConfigurationError:
        return math.inf


def _unaffordable(field: str, target: float, what: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(
        explain(
            "Accountant.target_epsilon",
            target,
            f"a target that allows {what}",
            f"The least {field} already costs more.",
            f"{remedy} Or ask for a larger epsilon or delta.",
        )
    )
