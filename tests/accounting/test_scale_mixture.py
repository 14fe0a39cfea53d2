"""Laplace noise whose scale is drawn, in whole runs: no bound below what is known, none above another."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from mixture_laws import (
    ACCOUNTED,
    LAWS,
    LOMAX,
    SAMPLED,
    UNIFORM,
    Floats,
    chances_of,
    delta_of,
    epsilon,
    event,
    reach_of,
    run_of,
)

from hf_dp.accounting import PLDAccountant, accountant_named
from hf_dp.accounting._hidden_scale import HiddenScale, highest_loss
from hf_dp.accounting._laplace import (
    FixedScale,
    laplace_loss,
    pure_epsilon,
)
from hf_dp.accounting._released_scale import ReleasedScale
from hf_dp.errors import UnsupportedEventError
from hf_dp.events import (
    BallsInBins,
    Laplace,
    NeighboringRelation,
    Norm,
    PoissonSampled,
    PrivacyEvent,
    ScaleDraw,
    ScaleMixtureLaplace,
    SelfComposed,
    Shuffled,
)
from hf_dp.noise import ScaleMixtureNoise
from hf_dp.scale_law import ScaleLaw


class Spread:
    """A run in which one unit moves d coordinates equally, with one coin a step: a lower bound.

    Outputs are seen through cells and losses are rounded to the nearest point of a fine grid.
    """

    step = 2e-3

    def __init__(self, law: ScaleLaw, dimension: int) -> None:
        shift = 1 / math.sqrt(dimension)
        grown = np.concatenate(([0.0], np.geomspace(1e-4, reach_of(law), 6000)))
        edges = np.concatenate((-grown[:0:-1], np.linspace(0, shift, 2000), shift + grown[1:]))
        middle = (edges[1:] + edges[:-1]) / 2
        losses = np.log(law.density(middle - shift) / law.density(middle))
        chances = chances_of(law, edges - shift)
        self.present = self._power(*self._on_grid(losses, chances), dimension)

    def _on_grid(self, losses: Floats, chances: Floats) -> tuple[int, Floats]:
        exact = losses / self.step
        places = np.floor(exact).astype(int)
        # Between two points, so that the mean stays: rounding to one of them would add a drift.
        up = exact - places
        low = int(places.min())
        found = np.zeros(int(places.max()) - low + 2)
        np.add.at(found, places - low, chances * (1 - up))
        np.add.at(found, places - low + 1, chances * up)
        return low, found

    def _power(self, low: int, chances: Floats, count: int) -> tuple[int, Floats]:
        length = 1 << (len(chances) * min(count, 64)).bit_length()
        powered = np.fft.irfft(np.fft.rfft(chances, length) ** count, length)
        if count <= 64:
            return low * count, np.maximum(powered, 0.0)
        raise AssertionError("too wide for this transform")

    def epsilon(self, q: float, num_steps: int, delta: float) -> float:
        low, present = self.present
        losses = (low + np.arange(len(present))) * self.step
        kept = present > 1e-25
        losses, present = losses[kept], present[kept]
        absent = present * np.exp(-losses)
        absent /= absent.sum()
        drawn = np.log1p(q * np.expm1(losses))
        first, chances = self._on_grid(drawn, (1 - q) * absent + q * present / present.sum())
        width = 1 << 17
        total = np.fft.irfft(np.fft.rfft(chances, width) ** num_steps, width)
        # The transform is circular: put the part that holds nearly everything in the middle.
        centre = num_steps * (first + float(chances @ np.arange(len(chances))))
        start = int(centre) - width // 2
        sums = np.maximum(np.roll(total, (num_steps * first - start) % width), 0.0)
        grid = (start + np.arange(width)) * self.step
        low_end, high_end = 0.0, float(grid[-1])
        for _ in range(60):
            middle = (low_end + high_end) / 2
            if delta_of(grid, sums, middle) > delta:
                low_end = middle
            else:
                high_end = middle
        return low_end


@pytest.mark.reference
@pytest.mark.parametrize(("dimension", "known"), [(1, 1.63), (4, 2.06), (16, 2.37)])
def test_no_bound_is_below_the_direction_that_is_spread_evenly(
    dimension: int, known: float
) -> None:
    q, num_steps, delta = 2048 / 67350, 192, 1e-10
    lower = Spread(SAMPLED, dimension).epsilon(q, num_steps, delta)
    assert lower == pytest.approx(known, abs=0.015)
    for draw, accountant in itertools.product(("iid", "shared"), ("pld", "rdp")):
        noise = event(SAMPLED, dimension, "l2", draw)  # type: ignore[arg-type]
        found = epsilon(SelfComposed(PoissonSampled(q, noise), num_steps), delta, accountant)
        assert found >= lower * (1 - 2e-3)
    # The planted fault: one coordinate's loss for all dimensions is below the truth.
    one = epsilon(SelfComposed(PoissonSampled(q, event(SAMPLED, 1)), num_steps), delta)
    assert (one < 0.9 * lower) is (dimension > 1)


def test_no_bound_for_plain_noise_is_below_it_either() -> None:
    q, num_steps, delta = 0.05, 100, 1e-6
    for dimension in (1, 4, 32):
        lower = Spread(ScaleLaw(uniform_low=1.0, uniform_high=1.0), dimension).epsilon(
            q, num_steps, delta
        )
        for accountant in ("pld", "rdp"):
            noise = Laplace(math.sqrt(2), "l2", dimension)
            found = epsilon(SelfComposed(PoissonSampled(q, noise), num_steps), delta, accountant)
            assert lower * (1 - 2e-3) <= found <= 1.6 * lower


@pytest.mark.parametrize("draw", ["iid", "shared"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("dimension", [1, 3, None])
def test_a_constant_scale_is_plain_laplace_noise(
    draw: ScaleDraw, norm: Norm, dimension: int | None
) -> None:
    constant = event(ScaleLaw(uniform_low=0.5, uniform_high=0.5), dimension, norm, draw)
    plain = Laplace(2 * math.sqrt(2), norm, dimension)
    for wrapped, same in (
        (constant, plain),
        (PoissonSampled(0.1, constant), PoissonSampled(0.1, plain)),
    ):
        for accountant in ("pld", "rdp"):
            found = epsilon(SelfComposed(wrapped, 7), 1e-6, accountant)
            assert found == pytest.approx(
                epsilon(SelfComposed(same, 7), 1e-6, accountant), rel=1e-9
            )


def test_scales_that_hardly_vary_cost_what_plain_noise_does() -> None:
    nearly = ScaleLaw(1e5, 1e-5)
    plain = SelfComposed(PoissonSampled(0.1, Laplace(math.sqrt(2))), 20)
    for noise in (event(nearly), event(nearly, 5, "l1", "shared")):
        found = epsilon(SelfComposed(PoissonSampled(0.1, noise), 20), 1e-6)
        assert found == pytest.approx(epsilon(plain, 1e-6), rel=3e-3)


@LAWS
def test_what_is_hidden_costs_no_more_than_what_is_shown(law: ScaleLaw) -> None:
    for level in np.array([0.0, 0.3, 1.0]) * law.mean:
        at = np.array([level])
        assert HiddenScale(law).profile(at)[0] <= ReleasedScale(law).profile(at)[0] * (1 + 1e-5)
    shared = SelfComposed(PoissonSampled(0.1, event(law, None, "l1", "shared")), 30)
    hidden = SelfComposed(PoissonSampled(0.1, event(law)), 30)
    assert epsilon(hidden, 1e-6) <= epsilon(shared, 1e-6)


@pytest.mark.parametrize("dimension", [1, 2, 5, 100])
@LAWS
def test_the_highest_loss_of_several_coordinates_is_bounded(law: ScaleLaw, dimension: int) -> None:
    generator = np.random.default_rng(1)
    for norm in ("l1", "l2"):
        pure = pure_epsilon(event(law, dimension, norm))  # type: ignore[arg-type]
        for _ in range(20):
            move = np.abs(generator.standard_normal(dimension)) ** generator.integers(1, 5)
            move /= np.linalg.norm(move, 1 if norm == "l1" else 2)
            highest = sum(float(law.pure_epsilon(one)) for one in move)
            assert highest <= pure * (1 + 1e-9)
    anyhow = pure_epsilon(event(law, None, "l1"))
    assert pure_epsilon(event(law, dimension, "l1")) <= anyhow * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("dimension", [1, 100, 10_000])
def test_rounding_never_makes_the_highest_loss_too_small(scale: float, dimension: int) -> None:
    """Of a Gamma part alone it is (k + 1) log(1 + scale * shift)."""
    law = ScaleLaw(gamma_shape=3.0, gamma_scale=scale)
    exact = 4.0 * math.log1p(scale / dimension)
    found = highest_loss(law, 1 / dimension)
    assert exact <= found <= exact * (1 + 1e-9) + 2e-14
    rounded = dimension * float(law.pure_epsilon(1 / dimension))  # what the bound is made of
    if (scale, dimension) == (1e-9, 10_000):
        assert abs(rounded / (dimension * exact) - 1) > 1e-3


def test_shown_scales_have_a_highest_loss_only_if_they_have_an_end() -> None:
    assert pure_epsilon(event(UNIFORM, None, "l1", "shared")) == 2.0
    assert pure_epsilon(event(UNIFORM, 9, "l2", "shared")) == 6.0
    assert math.isinf(pure_epsilon(event(LOMAX, 9, "l1", "shared")))
    assert math.isinf(pure_epsilon(event(LOMAX, 1, "l2", "shared")))
    assert pure_epsilon(event(LOMAX, 1, "l2")) == pytest.approx(4 * math.log(4 / 3))
    # Rounding of a tiny move would be multiplied by the number of coordinates: then the limit is taken.
    assert pure_epsilon(event(LOMAX, 10**15)) == pure_epsilon(event(LOMAX, None))


@pytest.mark.parametrize("delta", [1e-12, 1e-10, 1e-4])
@LAWS
def test_epsilon_is_never_above_the_pure_one(law: ScaleLaw, delta: float) -> None:
    pure = float(law.pure_epsilon(1.0))
    for count in (1, 4):
        for accountant in ("pld", "rdp"):
            found = epsilon(SelfComposed(event(law), count), delta, accountant)
            assert 0 < found <= count * pure * (1 + 1e-12)


@pytest.mark.parametrize(
    "noise",
    [
        event(LOMAX),
        event(ScaleLaw(6.0, 0.1, 0.3, 0.2, 0.4), None, "l1", "shared"),
        event(ScaleLaw(6.0, 0.1, 0.3, 0.2, 0.4), None, "l1"),
        event(ScaleLaw(6.0, 0.1, 0.3, 0.2, 0.4), None, "l2"),
        event(ScaleLaw(6.0, 0.1, 0.3, 0.2, 0.4), 2, "l2", "shared"),
    ],
    ids=str,
)
def test_calibrated_noise_meets_the_target(noise: ScaleMixtureLaplace) -> None:
    mixture = ScaleMixtureNoise(noise.law, noise.draw, noise.norm, noise.dimension)
    run, accountant = run_of(mixture, 0.1, 10), PLDAccountant()
    chosen = accountant.calibrate(run, target_epsilon=2.0, target_delta=1e-6)
    assert epsilon(chosen.event(), 1e-6) <= 2.0
    less = chosen.with_noise_multiplier(0.998 * chosen.noise.noise_multiplier)
    assert epsilon(less.event(), 1e-6) > 2.0


def test_more_noise_never_costs_more() -> None:
    for noise in (event(SAMPLED), event(LOMAX, 3, "l1", "shared"), event(ACCOUNTED, 3)):
        found = [
            epsilon(SelfComposed(PoissonSampled(0.05, replaced), 20), 1e-6)
            for replaced in (
                event(noise.law.scaled(factor), noise.dimension, noise.norm, noise.draw)
                for factor in (0.3, 0.6, 1.0, 1.5)
            )
        ]
        assert found == sorted(found)


def test_a_curve_bounds_every_count_and_ends_at_the_guarantee() -> None:
    for noise in (event(SAMPLED), event(ACCOUNTED, None), event(ACCOUNTED, None, "l1", "shared")):
        step = PoissonSampled(0.05, noise)
        curve = PLDAccountant().curve(step, num_steps=50, delta=1e-6)
        for count in (1, 7, 50, 70):
            assert curve.epsilon(count) >= epsilon(SelfComposed(step, count), 1e-6) * (1 - 2e-3)
        assert curve.epsilon(50) == epsilon(SelfComposed(step, 50), 1e-6)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_a_shown_scale_in_the_l2_norm_needs_the_dimension(accountant: str) -> None:
    whole = event(SAMPLED, None, "l2", "shared")
    for noise in (whole, PoissonSampled(0.1, whole)):
        with pytest.raises(UnsupportedEventError, match="Give the number of noised coordinates"):
            epsilon(noise, 1e-6, accountant)
    bounded = event(SAMPLED, 4, "l2", "shared")
    doubled = event(SAMPLED.scaled(2.0), 4, "l1", "shared")
    assert epsilon(bounded, 1e-6, accountant) == epsilon(doubled, 1e-6, accountant)


@pytest.mark.parametrize("accountant", ["pld", "rdp", "edgeworth"])
def test_other_samplers_and_accountants_refuse(accountant: str) -> None:
    with pytest.raises(UnsupportedEventError, match="use sampling='poisson'"):
        accountant_named(accountant).guarantee(
            BallsInBins(5, event(SAMPLED)), delta=1e-5, relation=NeighboringRelation.REPLACE_SPECIAL
        )


def test_a_shuffled_pass_costs_one_release() -> None:
    found = PLDAccountant().guarantee(
        Shuffled(20, event(LOMAX)), delta=1e-6, relation=NeighboringRelation.REPLACE_SPECIAL
    )
    assert found.epsilon == epsilon(event(LOMAX), 1e-6)


def test_large_losses_fall_back_to_divergences() -> None:
    hopeless = event(ScaleLaw(3.0, 200.0))
    for count in (1, 30):
        found = epsilon(SelfComposed(PoissonSampled(0.5, hopeless), count), 1e-6)
        assert found <= count * pure_epsilon(PoissonSampled(0.5, hopeless)) * (1 + 1e-12)
        assert math.isfinite(found)
    wide = event(ScaleLaw(2.0, 0.3, 30.0), None, "l1", "shared")
    assert 1.0 < epsilon(wide, 1e-6)


@pytest.mark.parametrize("noise", [event(SAMPLED, None, "l2"), Laplace(1.0, "l2")], ids=str)
def test_any_number_of_coordinates_in_the_l2_norm_has_no_pair(noise: PrivacyEvent) -> None:
    with pytest.raises(TypeError, match="ask `has_laplace_loss` first"):
        laplace_loss(noise)


def test_fixed_scale_is_the_profile_that_is_averaged() -> None:
    levels = np.array([0.0, 0.4, 0.99, 1.0, 3.0])
    narrow = ScaleLaw(uniform_low=1.0, uniform_high=1.0 + 1e-9)
    np.testing.assert_allclose(
        ReleasedScale(narrow).profile(levels), FixedScale(1.0).profile(levels), atol=1e-8
    )
