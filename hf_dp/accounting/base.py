"""What an accountant is: from events to a guarantee, with composition and refusal written once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from hf_dp._validate import one_of, open_unit_interval, positive_integer
from hf_dp.accounting._leaves import (
    Leaves,
    flatten,
    gaussian_parameters,
    is_gaussian,
    laplace_remedy,
    relations_of,
)
from hf_dp.accounting.calibrate import smallest_noise
from hf_dp.accounting.curve import EpsilonCurve
from hf_dp.accounting.guarantee import Guarantee
from hf_dp.errors import ConfigurationError, UnsupportedEventError, explain
from hf_dp.events import (
    NeighboringRelation,
    NonPrivate,
    PrivacyEvent,
    PrivacyUnit,
    SelfComposed,
)

__all__ = [
    "Accountant",
    "Calibratable",
    "Guarantee",
    "Leaves",
    "StepBounds",
    "flatten",
    "gaussian_parameters",
    "is_gaussian",
]

StepBounds = Callable[[int, int], NDArray[np.float64]]
"""``bounds(first, last)``: upper bounds on epsilon after first, ..., last releases, ``(n,)``."""


class Calibratable(Protocol):
    """A run whose noise an accountant can choose (`PrivacyPlan` is one)."""

    @property
    def unit(self) -> PrivacyUnit:
        """Whose data is protected together."""
        ...

    @property
    def relation(self) -> NeighboringRelation:
        """Which datasets count as neighbours."""
        ...

    def event(self) -> PrivacyEvent:
        """What the whole run releases."""
        ...

    def with_noise_multiplier(self, noise_multiplier: float) -> Self:
        """The same run with other noise."""
        ...


Plan = TypeVar("Plan", bound=Calibratable)


class Accountant(ABC):
    """Computes what a sequence of releases guarantees. Stateless: the ledger is the only memory.

    A subclass says which releases it can cost (`supports`) and what they cost together
    (`_epsilon`, `_bounds`); composition, refusal and calibration are written here, once.
    """

    name: ClassVar[str]
    is_upper_bound: ClassVar[bool] = True
    relations: ClassVar[frozenset[NeighboringRelation]] = frozenset(
        {NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_SPECIAL}
    )

    @abstractmethod
    def supports(self, leaf: PrivacyEvent) -> bool:
        """Whether this accountant has a proven cost for a release that is not a composition."""

    @abstractmethod
    def _epsilon(self, leaves: Leaves, delta: float) -> float:
        """Epsilon of all `leaves` together; they are supported, private, and at least one."""

    @abstractmethod
    def _bounds(self, leaves: Leaves, delta: float, final_epsilon: float) -> StepBounds:
        """Upper bounds for a step that releases `leaves`, given epsilon after the last step."""

    def _quick_epsilon(self, leaves: Leaves, delta: float, near: float) -> float:
        """A cheap, less tight `_epsilon`, to search with; `near` is the value searched for."""
        del near
        return self._epsilon(leaves, delta)

    def _certificate(self, leaves: Leaves, delta: float) -> float:
        """What ends a search: `_epsilon`, or a bound that is hardly larger and takes less time."""
        return self._epsilon(leaves, delta)

    def _beside(self, leaves: Leaves, delta: float) -> tuple[float | None, float | None]:
        """`Guarantee.lower` and `Guarantee.estimate` of releases such as `_epsilon` gets."""
        del leaves, delta
        return None, None

    def can_cost(
        self,
        event: PrivacyEvent | Iterable[PrivacyEvent],
        relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> bool:
        """Whether `guarantee` would answer rather than refuse."""
        supported = (
            relation in relations_of(leaf) and (type(leaf) is NonPrivate or self.supports(leaf))
            for leaf in flatten(event)
        )
        return relation in self.relations and all(supported)

    def guarantee(
        self,
        event: PrivacyEvent | Iterable[PrivacyEvent],
        *,
        delta: float,
        unit: PrivacyUnit = "example",
        relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> Guarantee:
        """What all releases of `event` guarantee together.

        Args:
            event: One event, or several made one after another.
            delta: In (0, 1).
            unit: Repeated in the answer; the events must have been emitted for this unit.
            relation: Which datasets count as neighbours.

        Returns:
            The guarantee; epsilon is inf if any release was made without privacy.

        Raises:
            UnsupportedEventError: A release or the relation has no proven cost here.
            ConfigurationError: `delta` is out of range.
        """
        delta = self._checked_delta(delta)
        leaves = self._checked_leaves(event, relation)
        private = leaves and not any(type(leaf) is NonPrivate for leaf in leaves)
        lower, estimate = self._beside(leaves, delta) if private else (None, None)
        return Guarantee(
            epsilon=self._total(leaves, delta),
            delta=delta,
            is_upper_bound=self.is_upper_bound,
            accountant=self.name,
            unit=unit,
            relation=NeighboringRelation(relation),
            lower=lower,
            estimate=estimate,
        )

    def curve(
        self,
        step: PrivacyEvent,
        *,
        num_steps: int,
        delta: float,
        relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> EpsilonCurve:
        """Epsilon after every one of `num_steps` steps, computed once (see `EpsilonCurve`).

        Args:
            step: What one step releases.
            num_steps: Steps planned, > 0; the curve goes on beyond them.
            delta: In (0, 1), the same after every step.
            relation: Which datasets count as neighbours.

        Raises:
            UnsupportedEventError: The step or the relation has no proven cost here.
            ConfigurationError: `delta` or `num_steps` is out of range, or this accountant only
                estimates.
        """
        self.check_bounds()
        delta = self._checked_delta(delta)
        leaves = self._checked_leaves(step, relation)
        positive_integer(
            f"{type(self).__name__}.num_steps",
            num_steps,
            "The curve is drawn up to it.",
            "Use the number of optimizer steps.",
        )
        total = self._total(flatten(SelfComposed(step, num_steps)), delta)
        if not leaves or any(type(leaf) is NonPrivate for leaf in leaves):
            return EpsilonCurve(
                lambda first, last: np.full(last - first + 1, total), num_steps, total
            )
        return EpsilonCurve(self._bounds(leaves, delta, total), num_steps, total)

    def calibrate(self, plan: Plan, *, target_epsilon: float, target_delta: float) -> Plan:
        """The plan with the least noise that keeps epsilon within the target.

        Args:
            plan: A run; its own noise is ignored.
            target_epsilon: > 0.
            target_delta: In (0, 1).

        Returns:
            The plan with about the smallest noise multiplier of five significant digits for which
            `guarantee` gives at most `target_epsilon`.

        Guarantees:
            * The last word is a bound that `guarantee` does not exceed, at exactly the noise returned
              (test: test_calibrated_noise_meets_the_target).
            * At most 0.1% more noise than needed (test: test_slightly_less_noise_misses_the_target).

        Raises:
            UnsupportedEventError: The plan's event or relation has no proven cost here.
            ConfigurationError: A target is out of range, no noise reaches it, or this accountant only
                estimates.
        """
        self.check_bounds()
        delta = self._checked_delta(target_delta)
        self._checked_leaves(plan.event(), plan.relation)

        def quick(noise_multiplier: float) -> float:
            event = plan.with_noise_multiplier(noise_multiplier).event()
            return self.rough_epsilon(event, delta=delta, near=target_epsilon)

        def certified(noise_multiplier: float) -> float:
            event = plan.with_noise_multiplier(noise_multiplier).event()
            leaves = self._checked_leaves(event, plan.relation)
            if not leaves or any(type(leaf) is NonPrivate for leaf in leaves):
                return self._total(leaves, delta)
            return Guarantee(self._certificate(leaves, delta), delta, True, self.name).epsilon

        return plan.with_noise_multiplier(smallest_noise(quick, certified, target_epsilon))

    def rough_epsilon(
        self, event: PrivacyEvent | Iterable[PrivacyEvent], *, delta: float, near: float
    ) -> float:
        """About the epsilon of `event`, quickly: where to search, never what to claim.

        Args:
            event: One event, or several, that `can_cost`.
            delta: In (0, 1).
            near: The value searched for; the answer is best close to it.
        """
        return self._total(flatten(event), delta, near=near)

    def check_bounds(self) -> None:
        """Refuse to decide anything if this accountant only estimates."""
        if not self.is_upper_bound:
            raise ConfigurationError(
                explain(
                    f"{type(self).__name__}.name",
                    self.name,
                    "an accountant that proves upper bounds: 'pld', 'edgeworth' or 'rdp'",
                    "An estimate can be far below the truth, so it must not choose noise or end a run.",
                    "Use accountant='pld'; `hf-dp epsilon` prints this one's estimate.",
                )
            )

    def _total(self, leaves: Leaves, delta: float, near: float | None = None) -> float:
        if any(type(leaf) is NonPrivate for leaf in leaves):
            return math.inf
        if not leaves:
            return 0.0
        if near is None:
            return self._epsilon(leaves, delta)
        return self._quick_epsilon(leaves, delta, near)

    def _checked_delta(self, delta: float) -> float:
        return open_unit_interval(
            f"{type(self).__name__}.delta",
            delta,
            "It is the chance with which epsilon may fail to hold.",
            "Use less than 1 / the number of units, for example default_delta(num_units).",
        )

    def _checked_leaves(
        self, event: PrivacyEvent | Iterable[PrivacyEvent], relation: NeighboringRelation
    ) -> dict[PrivacyEvent, int]:
        owner = type(self).__name__
        known = [str(one) for one in NeighboringRelation]
        one_of(f"{owner}.relation", relation, known, "It is a claim about datasets.")
        leaves = flatten(event)
        if relation not in self.relations:
            expected = f"one of {sorted(map(str, self.relations))}"
            why = "Its sensitivity is not the one that this accountant's proof is about."
            raise UnsupportedEventError(
                explain(
                    f"{owner}.relation", str(relation), expected, why, _remedy(leaves, relation)
                )
            )
        for leaf in leaves:
            if type(leaf) is not NonPrivate and not self.supports(leaf):
                expected = f"a release that accountant {self.name!r} has a proven cost for"
                why = "What cannot be bounded must not be counted as nothing."
                remedy = _remedy([leaf], relation)
                raise UnsupportedEventError(explain(f"{owner}.event", leaf, expected, why, remedy))
            if relation not in relations_of(leaf):
                expected = f"neighbours by {sorted(map(str, relations_of(leaf)))} for {leaf!r}"
                why = "Other neighbours move what this sampler releases by more than it was sized for."
                remedy = "Ask for one of those relations, or choose another sampler."
                raise UnsupportedEventError(
                    explain(f"{owner}.relation", str(relation), expected, why, remedy)
                )
        return leaves


def _remedy(leaves: Iterable[PrivacyEvent], relation: NeighboringRelation) -> str:
    from hf_dp.accounting import ACCOUNTANTS  # the table holds the subclasses of this module's ABC

    leaves = tuple(leaves)
    able = [name for name, make in ACCOUNTANTS.items() if make().can_cost(leaves, relation)]
    if able:
        return f"Accountants that can cost it: {', '.join(able)}."
    for leaf in leaves:
        if remedy := laplace_remedy(leaf):
            return remedy
    return "No accountant of hf_dp can cost it: choose another mechanism, sampler or relation."
