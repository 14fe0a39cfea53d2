"""Users with fewer examples than the most, and what a guarantee for examples says about groups of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from hf_dp._validate import open_unit_interval, positive_integer
from hf_dp.accounting.base import Accountant
from hf_dp.accounting.guarantee import Guarantee
from hf_dp.errors import ConfigurationError
from hf_dp.events import (
    Composed,
    NeighboringRelation,
    PoissonSampledContributions,
    PrivacyEvent,
    SelfComposed,
)

_STEP = 8.0  # factor between the deltas that are tried first
_LEAST_DELTA = 1e-290
_HALVINGS = 10


def for_owner_of(
    num_examples: int, event: PrivacyEvent | Iterable[PrivacyEvent]
) -> tuple[PrivacyEvent, ...]:
    """What the same releases are for a user who owns that many examples, fewer than the most perhaps.

    A Poisson sample of examples draws fewer of a user who owns fewer, so the guarantee for this user
    is better; where users are drawn, it is not, and those events stay as they are. Whoever publishes
    such a guarantee publishes how many examples the user owns.

    Args:
        num_examples: Owned by the user, > 0; more than the events' `max_contributions` are never used.
        event: One event, or several; a ledger's, for example.

    Returns:
        Events for an accountant's `guarantee(..., unit="user")`.
    """
    positive_integer(
        "for_owner_of.num_examples",
        num_examples,
        "A user without examples has nothing to protect.",
        "Use the number of examples that the user owns.",
    )
    events = (event,) if isinstance(event, PrivacyEvent) else tuple(event)
    return tuple(_owned(item, num_examples) for item in events)


def _owned(event: PrivacyEvent, num_examples: int) -> PrivacyEvent:
    match event:
        case PoissonSampledContributions(max_contributions=most):
            return replace(event, max_contributions=min(most, num_examples))
        case SelfComposed(inner):
            return replace(event, event=_owned(inner, num_examples))
        case Composed(parts):
            return Composed(tuple(_owned(part, num_examples) for part in parts))
        case _:
            return event


def group_guarantee(
    accountant: Accountant,
    event: PrivacyEvent | Iterable[PrivacyEvent],
    *,
    group_size: int,
    delta: float,
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> Guarantee:
    """What a guarantee for one example says about `group_size` of them, knowing nothing of the run.

    For comparison only: `PoissonSampledContributions` gives the tight answer for users. Where one
    example has (e, d), the group has (G e, d (1 + exp(e) + ... + exp((G - 1) e))); of all pairs (e, d)
    that the accountant proves, about the one with the least epsilon is used.

    Args:
        accountant: Who proves the guarantee for one example; one with a least delta of its own ends
            at large groups with epsilon = inf.
        event: What was released, about examples.
        group_size: Examples that one user owns at most, > 0.
        delta: In (0, 1), for the user.
        relation: Which datasets count as neighbours.

    Returns:
        A proven, loose guarantee for users, whose accountant is called "group privacy over ...".

    Raises:
        UnsupportedEventError: A release or the relation has no proven cost.
        ConfigurationError: A number is out of range, or the accountant only estimates.

    Source:
        Vadhan (2017), "The Complexity of Differential Privacy", lemma 2.2, with its geometric sum kept.
    """
    accountant.check_bounds()
    open_unit_interval("group_guarantee.delta", delta, _WHY_DELTA, "Use less than 1 / users.")
    positive_integer("group_guarantee.group_size", group_size, "It is a user.", "Use 1 or more.")
    events = (event,) if isinstance(event, PrivacyEvent) else tuple(event)

    def single(log_delta: float) -> float:
        """Epsilon of one example at that delta, if the group's delta is then small enough, or inf."""
        one = math.exp(log_delta)
        epsilon = accountant.guarantee(events, delta=one, relation=relation).epsilon
        grown = log_delta + _log_growth(epsilon, group_size)
        return epsilon if grown <= math.log(delta) else math.inf

    # What is refused, or cannot be reached at all, is known before anything is searched.
    whole = accountant.guarantee(events, delta=delta, unit="user", relation=relation)
    best = whole.epsilon if group_size == 1 else _least(single, math.log(delta / group_size))
    return replace(
        whole,
        epsilon=group_size * best,
        accountant=f"group privacy over {accountant.name}",
        lower=None,
        estimate=None,
    )


def _least(single: Callable[[float], float], start: float) -> float:
    """The value of `single` about where it becomes finite, coming down from `start`."""
    failing = passing = start
    best = math.inf
    try:
        while math.isinf(best := single(passing)):
            failing, passing = passing, passing - math.log(_STEP)
            if passing < math.log(_LEAST_DELTA):
                return math.inf
    except ConfigurationError:  # a delta below what this accountant has
        return math.inf
    for _ in range(_HALVINGS if failing > passing else 0):
        middle = (failing + passing) / 2
        found = single(middle)
        if math.isinf(found):
            failing = middle
        else:
            best, passing = min(best, found), middle
    return best


def _log_growth(epsilon: float, group_size: int) -> float:
    """Log of 1 + exp(epsilon) + ... + exp((group_size - 1) epsilon)."""
    if epsilon == 0 or math.isinf(epsilon):
        return math.log(group_size) if epsilon == 0 else math.inf
    highest = (group_size - 1) * epsilon
    return highest + math.log(math.expm1(-group_size * epsilon) / math.expm1(-epsilon))


_WHY_DELTA = "It is the chance with which epsilon may fail to hold."
