"""Laws of drawn scales, and runs whose noise has them."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from hf_dp.accounting import accountant_named
from hf_dp.events import (
    NeighboringRelation,
    Norm,
    PoissonSampled,
    PrivacyEvent,
    PrivacyUnit,
    ScaleDraw,
    ScaleMixtureLaplace,
    SelfComposed,
)
from hf_dp.scale_law import ScaleLaw

Floats = NDArray[np.float64]


ACCOUNTED = ScaleLaw(1.0, 0.05, 0.02, 0.1, 0.2)


SAMPLED = ScaleLaw(1.0, 0.05, 0.5, 0.1, 0.2)


LOMAX = ScaleLaw(3.0, 1 / 3)


UNIFORM = ScaleLaw(uniform_low=0.4, uniform_high=2.0)


NEARLY_CONSTANT = ScaleLaw(3000.0, 1 / 3000)


ALL = [ACCOUNTED, SAMPLED, LOMAX, UNIFORM, NEARLY_CONSTANT]


LAWS = pytest.mark.parametrize("law", ALL, ids=str)


def event(
    law: ScaleLaw, dimension: int | None = 1, norm: Norm = "l1", draw: ScaleDraw = "iid"
) -> ScaleMixtureLaplace:
    return ScaleMixtureLaplace(*astuple(law), draw, norm, dimension)


def epsilon(event: PrivacyEvent, delta: float, accountant: str = "pld") -> float:
    return accountant_named(accountant).guarantee(event, delta=delta).epsilon


@dataclass(frozen=True)
class Run:
    """What `calibrate` needs of a plan."""

    noise: ScaleMixtureLaplace
    probability: float
    num_steps: int

    unit: ClassVar[PrivacyUnit] = "example"
    relation: ClassVar[NeighboringRelation] = NeighboringRelation.ADD_OR_REMOVE_ONE

    def event(self) -> PrivacyEvent:
        return SelfComposed(PoissonSampled(self.probability, self.noise), self.num_steps)

    def with_noise_multiplier(self, noise_multiplier: float) -> Run:
        law = self.noise.law.with_deviation(noise_multiplier)
        fields = dict(zip(law.__dataclass_fields__, astuple(law), strict=True))
        return replace(self, noise=replace(self.noise, **fields))


def reach_of(law: ScaleLaw) -> float:
    """Where next to nothing of the noise is left."""
    reach = 1.0
    while law.tail(reach) > 1e-13 and reach < 1e5:
        reach *= 2
    return reach


def chances_of(law: ScaleLaw, edges: Floats) -> Floats:
    """Chances of cells, 0 being among their ends, without cancellation far out."""
    tails = law.tail(np.abs(edges)) / 2
    chances: Floats = np.where(edges[:-1] < 0, np.diff(tails), -np.diff(tails))
    return chances


def delta_of(losses: Floats, chances: Floats, level: float) -> float:
    return float(chances @ np.maximum(-np.expm1(level - losses), 0.0))
