"""Shuffling is no sampling: the deterministic epsilon is the guarantee, and little less is possible."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import log_ndtr

from hf_dp.accounting import accountant_named
from hf_dp.events import Gaussian, NeighboringRelation, PoissonSampled, SelfComposed, Shuffled

SPECIAL = NeighboringRelation.REPLACE_SPECIAL


def least_epsilon(sigma: float, batches: int, delta: float) -> float:
    """Below what no guarantee of one shuffled pass can be: an attack by the largest batch's output.

    Chua et al. (2024), arXiv 2403.17673: all other examples contribute one, the example at hand two.
    """
    levels = np.linspace(-4, 2 + 12 * sigma, 20_001)

    def above(shift: float) -> np.ndarray:
        """Chance that the largest output passes each level."""
        others = (batches - 1) * log_ndtr(levels / sigma)
        chances: np.ndarray = -np.expm1(log_ndtr((levels - shift) / sigma) + others)
        return chances

    with_unit, without = above(2.0), above(1.0)
    return float(
        brentq(lambda e: float(np.max(with_unit - math.exp(e) * without)) - delta, 1e-3, 40)
    )


@pytest.mark.reference
@pytest.mark.parametrize(
    ("sigma", "batches", "delta", "poisson", "least", "deterministic"),
    [
        (0.5, 10_000, 1e-6, 1.955, 10.995, 10.997),
        (0.7, 1000, 1e-5, 0.610, 6.529, 6.652),
        (0.8, 1000, 1e-5, 0.305, 5.235, 5.680),
        (1.0, 1000, 1e-5, 0.155, 2.882, 4.377),
    ],
)
def test_a_shuffled_pass_has_the_epsilon_of_a_fixed_order(
    sigma: float,
    batches: int,
    delta: float,
    poisson: float,
    least: float,
    deterministic: float,
) -> None:
    pld = accountant_named("pld")
    found = pld.guarantee(Shuffled(batches, Gaussian(sigma)), delta=delta, relation=SPECIAL)
    assert found.epsilon == pytest.approx(deterministic, abs=6e-4)
    sampled = SelfComposed(PoissonSampled(1 / batches, Gaussian(sigma)), batches)
    amplified = pld.guarantee(sampled, delta=delta, relation=SPECIAL).epsilon
    assert 0.95 * poisson <= amplified <= poisson * 1.001  # published on a coarser grid
    assert least_epsilon(sigma, batches, delta) == pytest.approx(least, abs=2e-3)
    assert amplified < least < found.epsilon


@pytest.mark.parametrize("accountant", ["pld", "rdp", "edgeworth"])
def test_passes_are_gaussian_releases_for_every_accountant(accountant: str) -> None:
    chosen = accountant_named(accountant)
    passes = SelfComposed(Shuffled(50, Gaussian(3.0)), 4)
    plain = SelfComposed(Gaussian(3.0), 4)
    assert (
        chosen.guarantee(passes, delta=1e-5, relation=SPECIAL).epsilon
        == chosen.guarantee(plain, delta=1e-5, relation=SPECIAL).epsilon
    )
