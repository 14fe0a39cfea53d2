"""What a search is asked and what it weighs: the question, a run, and a candidate that is certified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, get_args

from hf_dp._validate import one_of, positive, positive_integer
from hf_dp.errors import PrivacyError, explain
from hf_dp.events import (
    NeighboringRelation,
    Norm,
    PrivacyEvent,
    PrivacyUnit,
    ScaleDraw,
    SelfComposed,
)
from hf_dp.noise.base import NoiseMechanism
from hf_dp.noise.figures import Figures, Objective, check_objective

Family = Literal["gaussian", "laplace", "lmo"]
FAMILIES: tuple[Family, ...] = get_args(Family)


class Accountant(Protocol):
    """What the search asks of an accountant (those of `hf_dp.accounting` are such)."""

    @property
    def name(self) -> str: ...

    def can_cost(self, event: PrivacyEvent, relation: NeighboringRelation = ...) -> bool: ...

    def rough_epsilon(self, event: PrivacyEvent, *, delta: float, near: float) -> float: ...

    def calibrate(self, plan: Any, *, target_epsilon: float, target_delta: float) -> Any: ...

    def guarantee(
        self,
        event: PrivacyEvent,
        *,
        delta: float,
        unit: PrivacyUnit = ...,
        relation: NeighboringRelation = ...,
    ) -> Any: ...


@dataclass(frozen=True)
class Question:
    """What a search is asked.

    Attributes:
        target_epsilon: > 0.
        target_delta: In (0, 1).
        num_steps: Releases, > 0.
        norm: In which one unit's share of the sum is clipped.
        dimension: Coordinates that are noised, > 0.
        objective: What is made least.
        clipping_norm: Scales the figures, and with them what `radius` means.
        radius: Of the usefulness; None if it is not asked about.
        unit: Whose data is protected together.
        relation: Which datasets count as neighbours.
        draw: Whether a mixture draws its scale anew for every coordinate, or once a release.
    """

    target_epsilon: float
    target_delta: float
    num_steps: int
    norm: Norm
    dimension: int
    objective: Objective = "variance"
    clipping_norm: float = 1.0
    radius: float | None = None
    unit: PrivacyUnit = "example"
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE
    draw: ScaleDraw = "iid"

    def __post_init__(self) -> None:
        """Refuse a question that has no answer."""
        owner = "search_noise"
        why = "The noise depends on it."
        positive(f"{owner}.target_epsilon", self.target_epsilon, why, "Use between 0.1 and 10.")
        positive(f"{owner}.clipping_norm", self.clipping_norm, why, "Use that of the clipping.")
        positive_integer(f"{owner}.num_steps", self.num_steps, why, "Use 1 for one release.")
        remedy = "Use the number of trainable parameters, or of numbers that are released."
        positive_integer(f"{owner}.dimension", self.dimension, why, remedy)
        one_of(f"{owner}.norm", self.norm, get_args(Norm), why)
        one_of(f"{owner}.draw", self.draw, get_args(ScaleDraw), why)
        check_objective(self.objective, self.radius)


@dataclass(frozen=True)
class Run:
    """A run whose noise an accountant can choose."""

    noise: NoiseMechanism
    step: Callable[[PrivacyEvent], PrivacyEvent]
    num_steps: int
    unit: PrivacyUnit
    relation: NeighboringRelation

    def event(self) -> PrivacyEvent:
        """What the whole run releases."""
        return SelfComposed(self.step(self.noise.event()), self.num_steps)

    def with_noise_multiplier(self, noise_multiplier: float) -> Self:
        """The same run with more or less noise of the same shape."""
        noise = self.noise.with_noise_multiplier(noise_multiplier)
        return type(self)(noise, self.step, self.num_steps, self.unit, self.relation)


@dataclass(frozen=True)
class Candidate:
    """One family's best.

    Attributes:
        family: Which.
        mechanism: Sized for the target.
        epsilon: Proven, by the accountant of the search.
        figures: The noise on one coordinate of the sum.
    """

    family: Family
    mechanism: NoiseMechanism
    epsilon: float
    figures: Figures


class NotCertifiedError(PrivacyError):
    """An accountant that contradicts itself; never taken for a family that cannot be had."""


def certified(family: Family, run: Run, question: Question, accountant: Accountant) -> Candidate:
    """A run's mechanism sized by the accountant, and the accountant's own word on the result.

    Raises:
        NotCertifiedError: That word is more than the target.
    """
    sized: Run = accountant.calibrate(
        run, target_epsilon=question.target_epsilon, target_delta=question.target_delta
    )
    epsilon = float(
        accountant.guarantee(
            sized.event(),
            delta=question.target_delta,
            unit=question.unit,
            relation=question.relation,
        ).epsilon
    )
    if not epsilon <= question.target_epsilon:
        raise NotCertifiedError(
            explain(
                "search_noise.epsilon",
                epsilon,
                f"at most the target {question.target_epsilon}",
                f"Accountant {accountant.name!r} does not confirm its own choice of noise.",
                "Use another accountant, and report this as a bug.",
            )
        )
    figures = Figures.of(sized.noise, clipping_norm=question.clipping_norm, radius=question.radius)
    return Candidate(family, sized.noise, epsilon, figures)
