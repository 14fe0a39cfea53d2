"""A run as the command line describes it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from hf_dp.events import (
    Gaussian,
    Laplace,
    NeighboringRelation,
    PoissonSampled,
    PrivacyEvent,
    PrivacyUnit,
    SelfComposed,
)

GAUSSIAN = Gaussian(1.0)


@dataclass(frozen=True)
class PoissonRun:
    """Poisson sampling and one kind of noise, the same in every step; an accountant can choose how much.

    The relation is to add or remove one example: probability and steps are typed in as constants.

    Attributes:
        sampling_probability: In (0, 1].
        num_steps: > 0.
        noise_multiplier: > 0.
        kind: The noise; its own multiplier is not used.
    """

    sampling_probability: float
    num_steps: int
    noise_multiplier: float = 1.0
    kind: Gaussian | Laplace = GAUSSIAN

    sampling: ClassVar[str] = "poisson"
    unit: ClassVar[PrivacyUnit] = "example"
    relation: ClassVar[NeighboringRelation] = NeighboringRelation.ADD_OR_REMOVE_ONE

    def event(self) -> PrivacyEvent:
        """What the whole run releases."""
        noise = dataclasses.replace(self.kind, noise_multiplier=self.noise_multiplier)
        step = PoissonSampled(self.sampling_probability, noise)
        return SelfComposed(step, self.num_steps)

    def with_noise_multiplier(self, noise_multiplier: float) -> PoissonRun:
        """The same run with other noise."""
        return dataclasses.replace(self, noise_multiplier=noise_multiplier)
