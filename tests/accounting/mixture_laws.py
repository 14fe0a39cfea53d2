"""Laws of drawn scales, and runs whose noise has them."""

from __future__ import annotations

import functools
from dataclasses import astuple

import numpy as np
import pytest
from numpy.typing import NDArray

from hf_dp.accounting import accountant_named
from hf_dp.events import (
    NeighboringRelation,
    Norm,
    PoissonSampled,
    PrivacyEvent,
    ScaleDraw,
    ScaleMixtureLaplace,
)
from hf_dp.noise.base import NoiseMechanism
from hf_dp.noise.candidates import Run
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


def run_of(noise: NoiseMechanism, probability: float, num_steps: int) -> Run:
    """What `calibrate` needs of a plan."""
    step = functools.partial(PoissonSampled, probability)
    return Run(noise, step, num_steps, "example", NeighboringRelation.ADD_OR_REMOVE_ONE)


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
