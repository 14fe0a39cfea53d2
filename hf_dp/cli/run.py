"""A run as the command line describes it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from hf_dp.events import (
    Gaussian,
    NeighboringRelation,
    PoissonSampled,
    PrivacyEvent,
    PrivacyUnit,
    SelfComposed,
)


@dataclass(frozen=True)
class PoissonRun:
    """Poisson sampling and Gaussian noise, the same in every step; an accountant can choose the noise.

    The relation is to add or remove one example: probability and steps are typed in as constants.

    Attributes:
        sampling_probability: In (0, 1].
        num_steps: > 0.
        noise_multiplier: > 0.
    """

    sampling_probability: float
    num_steps: int
    noise_multiplier: float = 1.0

    sampling: ClassVar[str] = "poisson"
    unit: ClassVar[PrivacyUnit] = "example"
    relation: ClassVar[NeighboringRelation] = NeighboringRelation.ADD_OR_REMOVE_ONE

    def event(self) -> PrivacyEvent:
        """What the whole run releases."""
        step = PoissonSampled(self.sampling_probability, Gaussian(self.noise_multiplier))
        return SelfComposed(step, self.num_steps)

    def with_noise_multiplier(self, noise_multiplier: float) -> PoissonRun:
        """The same run with other noise."""
        return dataclasses.replace(self, noise_multiplier=noise_multiplier)
