"""The offline search: which noise is least for a guarantee, the Gaussian always among the candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hf_dp._validate import one_of, positive_integer
from hf_dp.errors import ConfigurationError, HfDpError, PrivacyError, explain
from hf_dp.events import (
    NeighboringRelation,
    Norm,
    PrivacyEvent,
    PrivacyUnit,
    ScaleDraw,
)
from hf_dp.noise.base import NoiseMechanism
from hf_dp.noise.candidates import (
    FAMILIES,
    Accountant,
    Candidate,
    Family,
    NotCertifiedError,
    Question,
    Run,
    certified,
)
from hf_dp.noise.figures import Figures, Objective
from hf_dp.noise.gaussian import GaussianNoise
from hf_dp.noise.laplace import LaplaceNoise
from hf_dp.noise.scale_mixture import ScaleMixtureNoise
from hf_dp.noise.search_cache import SearchCache
from hf_dp.noise.shapes import HOPELESS, STARTS, best_shape, law_at
from hf_dp.noise.why import explained
from hf_dp.scale_law import ScaleLaw

Progress = Callable[[int, int], None]
"""``progress(done, planned)`` after every shape; a search that ends early jumps to planned."""

BUDGET = 60
"""Shapes of the mixture that are tried: 2 to 60 s on one core."""

_MARGIN = math.log(1.01)  # the least gain for which a family further down is chosen
_SCREEN = math.log(1.5)


@dataclass(frozen=True)
class NoiseSearch:
    """The noise that a search chose, and what it was chosen from.

    Attributes:
        question: What was asked.
        accountant: Name of the one that certified every candidate.
        candidates: The best of every family that can be had.
        refused: Why other families cannot.
        shapes_tried: Of the mixture.
        from_cache: Whether the shape was found earlier; its epsilon was certified anew.

    Guarantees:
        * Every candidate's epsilon is the accountant's own and at most the target (test:
          test_the_winner_is_certified_by_the_accountant).
        * Never worse than the Gaussian where that is a candidate (test:
          test_the_winner_is_never_worse_than_the_gaussian).
    """

    question: Question
    accountant: str
    candidates: tuple[Candidate, ...]
    refused: dict[Family, str]
    shapes_tried: int = 0
    from_cache: bool = False

    @property
    def winner(self) -> Candidate:
        """The candidate of least objective; a simpler family unless another is 1% better."""
        best = self.candidates[0]
        for one in self.candidates[1:]:
            if self._score(one) < self._score(best) - _MARGIN:
                best = one
        return best

    @property
    def mechanism(self) -> NoiseMechanism:
        """The winner's."""
        return self.winner.mechanism

    def of(self, family: Family) -> Candidate | None:
        """The best of a family; None if it cannot be had."""
        return next((one for one in self.candidates if one.family == family), None)

    def why(self) -> tuple[str, ...]:
        """Why the winner won, and where the family would win, in sentences."""
        return explained(self)

    def _score(self, candidate: Candidate) -> float:
        return candidate.figures.score(self.question.objective)


def search_noise(
    *,
    target_epsilon: float,
    target_delta: float,
    step: Callable[[PrivacyEvent], PrivacyEvent],
    num_steps: int,
    norm: Norm,
    dimension: int,
    accountant: Accountant,
    objective: Objective = "variance",
    families: Sequence[Family] = FAMILIES,
    clipping_norm: float = 1.0,
    radius: float | None = None,
    unit: PrivacyUnit = "example",
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    draw: ScaleDraw = "iid",
    budget: int = BUDGET,
    progress: Progress | None = None,
    cached: bool = True,
) -> NoiseSearch:
    """Find the noise of least objective that meets a target. Deterministic.

    The Gaussian and plain Laplace noise are one calibration each. Of the mixtures, shapes are tried with
    the accountant's rough epsilon; the best is then sized and certified like the others. Mixtures of
    infinite variance are not tried.

    Args:
        target_epsilon: > 0.
        target_delta: In (0, 1).
        step: What a sampler makes of a mechanism's event, e.g. ``sampler.event``.
        num_steps: How often that happens, > 0.
        norm: In which one unit's share of the sum is clipped.
        dimension: Coordinates that are noised, > 0.
        accountant: Certifies; a family that it cannot cost is not a candidate.
        objective: What to make least.
        families: Which may win.
        clipping_norm: Scales the figures, > 0.
        radius: Of the usefulness, in the units of `clipping_norm`.
        unit: Whose data is protected together.
        relation: Which datasets count as neighbours.
        draw: Whether a mixture draws its scale anew for every coordinate, or once a release.
        budget: Shapes of the mixture to try, > 0.
        progress: Called after every shape.
        cached: Whether to look for the shape in the cache (see `SearchCache`) and to keep it there.

    Raises:
        ConfigurationError: The question has no answer, or no family can be had.
        PrivacyError: The accountant's guarantee exceeds the target that it calibrated for.
    """
    question = Question(
        target_epsilon,
        target_delta,
        num_steps,
        norm,
        dimension,
        objective,
        clipping_norm,
        radius,
        unit,
        NeighboringRelation(relation),
        draw,
    )
    why = "The best of them is returned."
    for family in families:
        one_of("search_noise.families", family, FAMILIES, why)
    positive_integer("search_noise.budget", budget, "Each try is a shape.", "Use 60.")
    search = _Search(question, step, accountant, progress)
    return search.over(families, budget, SearchCache() if cached else None)


class _Search:
    """One question on its way to an answer."""

    def __init__(
        self,
        question: Question,
        step: Callable[[PrivacyEvent], PrivacyEvent],
        accountant: Accountant,
        progress: Progress | None,
    ) -> None:
        self.question, self.step, self.accountant = question, step, accountant
        self.progress = progress
        self.done, self.from_cache = 0, False

    def over(
        self, families: Sequence[Family], budget: int, cache: SearchCache | None
    ) -> NoiseSearch:
        found: list[Candidate] = []
        refused: dict[Family, str] = {}
        for family in (one for one in FAMILIES if one in families):
            try:
                run = self.run(self.shaped(family, found, budget, cache))
                found.append(certified(family, run, self.question, self.accountant))
            except PrivacyError as error:
                if isinstance(error, NotCertifiedError):
                    raise
                refused[family] = str(error)
            except ConfigurationError as error:
                refused[family] = str(error)
        if not found:
            raise ConfigurationError(
                explain(
                    "search_noise.families",
                    tuple(families),
                    f"a family that accountant {self.accountant.name!r} can size for this run",
                    " ".join(f"{family}: {reason}" for family, reason in refused.items()),
                    "Add 'gaussian', or use another accountant.",
                )
            )
        return NoiseSearch(
            self.question, self.accountant.name, tuple(found), refused, self.done, self.from_cache
        )

    def run(self, noise: NoiseMechanism) -> Run:
        asked = self.question
        return Run(noise, self.step, asked.num_steps, asked.unit, asked.relation)

    def mixture(self, law: ScaleLaw) -> ScaleMixtureNoise:
        asked = self.question
        return ScaleMixtureNoise(law, draw=asked.draw, norm=asked.norm, dimension=asked.dimension)

    def shaped(
        self, family: Family, others: Sequence[Candidate], budget: int, cache: SearchCache | None
    ) -> NoiseMechanism:
        """A mechanism of the family in its best shape, of any size."""
        asked = self.question
        if family == "gaussian":
            return GaussianNoise(1.0, norm=asked.norm)
        if family == "laplace":
            return LaplaceNoise(1.0, norm=asked.norm, dimension=asked.dimension)
        return self.mixture(self.best_law(others, budget, cache))

    def best_law(
        self, others: Sequence[Candidate], budget: int, cache: SearchCache | None
    ) -> ScaleLaw:
        trial = self.run(self.mixture(law_at(np.log(STARTS[0]))))
        asked = self.question
        if not self.accountant.can_cost(trial.event(), asked.relation):
            self.accountant.guarantee(
                trial.event(), delta=asked.target_delta, relation=asked.relation
            )  # says why not
        key = None if cache is None else self.key(cache, trial.event(), others, budget)
        kept = None if cache is None or key is None else cache.read(key)
        if kept is not None:
            self.from_cache = True
            return kept
        incumbent = min((one.figures.score(asked.objective) for one in others), default=math.inf)
        law, self.done = best_shape(
            self.scorer(others, budget), budget=budget, good_enough=incumbent + _SCREEN
        )
        if self.progress is not None:
            self.progress(budget, budget)
        if cache is not None and key is not None:
            cache.write(key, law)
        return law

    def key(
        self, cache: SearchCache, event: PrivacyEvent, others: Sequence[Candidate], budget: int
    ) -> str:
        beside = [one.family for one in others]  # how good they are decides where a search ends
        return cache.key(self.question, event, (self.accountant.name, budget, *beside))

    def scorer(self, others: Sequence[Candidate], budget: int) -> Callable[[ScaleLaw], float]:
        """The objective of a shape, roughly sized, as a function of the shape."""
        asked = self.question
        near = [one.mechanism.noise_multiplier for one in others]
        guess, done = (max(near) if near else 1.0), 0

        def score(law: ScaleLaw) -> float:
            nonlocal guess, done
            done += 1
            if self.progress is not None:
                self.progress(min(done, budget), budget)
            noise = self.mixture(law)
            try:
                size = self.rough_size(self.run(noise), guess)
            except HfDpError:
                return HOPELESS
            if size is None:
                return HOPELESS
            guess = size
            figures = Figures.of(
                noise.with_noise_multiplier(size),
                clipping_norm=asked.clipping_norm,
                radius=asked.radius,
            )
            found = figures.score(asked.objective)
            return found if math.isfinite(found) else HOPELESS

        return score

    def rough_size(self, run: Run, guess: float) -> float | None:
        """About the noise multiplier that meets the target; None if a hundredfold guess does not."""
        from scipy.optimize import brentq

        asked = self.question

        def excess(log_size: float) -> float:
            event = run.with_noise_multiplier(math.exp(log_size)).event()
            epsilon = self.accountant.rough_epsilon(
                event, delta=asked.target_delta, near=asked.target_epsilon
            )
            return math.log(min(max(epsilon / asked.target_epsilon, 1e-9), 1e9))

        if math.isinf(run.noise.noise_multiplier):
            return None
        low = high = math.log(guess)
        start = excess(low)
        width = 0.1
        while start > 0 and excess(high := high + width) > 0:
            low, width = high, width * 2
            if high > math.log(guess) + math.log(100):
                return None
        while start <= 0 and excess(low := low - width) <= 0:
            high, width = low, width * 2
            if low < math.log(guess) - math.log(100):
                return None
        return math.exp(brentq(excess, low, high, xtol=2e-4))
