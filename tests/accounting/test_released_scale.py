"""One scale that is shown: the mean of the profiles of fixed scales, and runs that are simulated."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from mixture_laws import (
    LAWS,
    LOMAX,
    NEARLY_CONSTANT,
    UNIFORM,
    epsilon,
    event,
)
from scipy.integrate import quad
from scipy.stats import gamma

from hf_dp.accounting import _released_scale as released_module
from hf_dp.accounting._released_scale import ReleasedScale
from hf_dp.events import (
    PoissonSampled,
    ScaleDraw,
    SelfComposed,
)
from hf_dp.scale_law import ScaleLaw


def mean_of_profiles(law: ScaleLaw, level: float) -> float:
    """The profile of a shown scale: over the Uniform part in closed form, over a Gamma part by quadrature."""
    low, high = law.uniform_low, law.uniform_high

    def at(drawn: float) -> float:
        left = level - drawn
        if high == low:
            return max(-math.expm1((left - low) / 2), 0.0)
        first = max(low, left)
        if first >= high:
            return 0.0
        tilted = 2 * (math.exp((left - first) / 2) - math.exp((left - high) / 2))
        return (high - first - tilted) / (high - low)

    if law.gamma_scale == 0:
        return at(0.0)
    law_of_gamma = gamma(law.gamma_shape, scale=law.gamma_scale)
    last = float(law_of_gamma.isf(1e-18))
    kinks = sorted({0.0, *(min(max(level - end, 0.0), last) for end in (low, high)), last})
    parts = [
        quad(lambda g: at(g) * law_of_gamma.pdf(g), a, b, epsabs=1e-12, limit=300)[0]
        for a, b in itertools.pairwise(kinks)
    ]
    return math.fsum(parts)


@pytest.mark.parametrize(
    "law", [LOMAX, UNIFORM, NEARLY_CONSTANT, ScaleLaw(2.0, 0.3, 0.0, 0.7, 0.7)], ids=str
)
def test_released_scale_agrees_with_quadrature_from_above(law: ScaleLaw) -> None:
    loss = ReleasedScale(law)
    for level in np.array([0.0, 0.2, 0.5, 1.0, 1.5]) * law.mean:
        found = float(loss.profile(np.array([level]))[0])
        exact = mean_of_profiles(law, float(level))
        assert exact * (1 - 1e-7) - 1e-11 <= found <= exact * (1 + 2e-5) + 1e-20


@pytest.mark.parametrize("cells", [3, 10, 100])
@LAWS
def test_every_grid_of_scales_gives_an_upper_bound(
    cells: int, law: ScaleLaw, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = np.linspace(0.0, 3.0, 31) * law.mean
    exact = ReleasedScale(law).profile(levels)
    monkeypatch.setattr(released_module, "_CELLS", cells)
    released_module._on_grid.cache_clear()
    try:
        rough = ReleasedScale(law).profile(levels)
        assert np.all(rough >= exact * (1 - 1e-5))
        # The planted fault: the middle of a cell for all of it, which is mostly below.
        monkeypatch.setattr(released_module, "_split", lambda chances, *_: np.append(chances, 0.0))
        released_module._on_grid.cache_clear()
        assert np.any(ReleasedScale(law).profile(levels) < exact * (1 - 1e-5))
    finally:
        released_module._on_grid.cache_clear()


@pytest.mark.statistical
@pytest.mark.parametrize("draw", ["iid", "shared"])
def test_a_simulated_run_loses_what_is_claimed(draw: ScaleDraw) -> None:
    """Five deviations either way: a false alarm once in 1.7 million runs."""
    generator = np.random.default_rng()
    runs, q, num_steps, delta, law = 200_000, 0.2, 12, 0.01, ScaleLaw(4.0, 0.3, 0.0, 0.1, 0.5)
    losses = np.zeros(runs)
    for _ in range(num_steps):
        scale = law.gamma_scale * generator.standard_gamma(4.0, runs)
        scale += generator.uniform(law.uniform_low, law.uniform_high, runs)
        output = generator.laplace(0.0, 1.0, runs) / scale + (generator.random(runs) < q)
        if draw == "iid":
            ratio = law.density(output - 1) / law.density(output)
        else:
            ratio = np.exp(scale * (np.abs(output) - np.abs(output - 1)))
        losses += np.log1p(q * (ratio - 1))
    dimension = 1 if draw == "iid" else None
    step = PoissonSampled(q, event(law, dimension, "l1", draw))
    found = epsilon(SelfComposed(step, num_steps), delta)

    def agrees(claimed: float) -> bool:
        parts = np.maximum(-np.expm1(claimed - losses), 0.0)
        return abs(parts.mean() - delta) <= 5 * parts.std() / math.sqrt(runs)

    assert agrees(found)
    assert not agrees(0.94 * found)
    assert not agrees(1.06 * found)
