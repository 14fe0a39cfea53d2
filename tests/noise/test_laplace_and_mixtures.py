"""Laplace noise and its mixtures: the law that is accounted for, on every coordinate, drawn anew."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from laws import (
    AS_A_RATE,
    COORDINATES,
    FALSE_ALARM,
    LOMAX,
    MECHANISMS,
    PUBLISHED,
    flat,
    has_the_law,
    noise,
    unrelated,
)
from scipy import stats
from torch import Tensor

from hf_dp.coins import FixedCoins, SecretCoins
from hf_dp.events import Laplace
from hf_dp.noise import LaplaceNoise, NoiseMechanism, ScaleMixtureNoise, draws, scale_mixture
from hf_dp.scale_law import ScaleLaw
from hf_dp.sums import ClippedSum

# ---- the law ---------------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("name", MECHANISMS)
def test_noise_has_the_law_of_its_event(name: str) -> None:
    mechanism = MECHANISMS[name]
    drawn = noise(mechanism, sensitivity=2.5) / 2.5
    assert len(drawn) == COORDINATES
    assert has_the_law(drawn, mechanism.event())


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["laplace", "gamma", "published"])
def test_the_law_is_the_same_in_float32_and_on_fixed_coins(name: str) -> None:
    mechanism = MECHANISMS[name]
    assert has_the_law(noise(mechanism, dtype=torch.float32), mechanism.event())
    coins = FixedCoins(torch.Generator().manual_seed(7))
    assert has_the_law(noise(mechanism, coins=coins), mechanism.event())


@pytest.mark.statistical
@pytest.mark.parametrize(
    "mechanism",
    [LaplaceNoise(0.5), ScaleMixtureNoise(PUBLISHED), ScaleMixtureNoise(PUBLISHED, "shared")],
    ids=lambda mechanism: type(mechanism).__name__,
)
def test_the_loss_has_that_law_too(mechanism: NoiseMechanism) -> None:
    coins, losses = SecretCoins(), []
    for _ in range(1500):
        loss = torch.zeros((), dtype=torch.float64)
        summed = ClippedSum({"bias": torch.zeros(2)}, torch.zeros(0), torch.zeros(0), loss)
        losses.append(mechanism.release(summed, sensitivity=3.0, coins=coins).loss_sum)
    drawn = torch.stack([loss for loss in losses if loss is not None]).numpy() / 3
    assert has_the_law(drawn, mechanism.event())


@pytest.mark.statistical
@pytest.mark.parametrize("shape", [0.3, 1.0, 1.5, 7.0, 3000.0])
def test_gamma_draws_are_gamma(shape: float) -> None:
    drawn = draws.gamma(shape, 100_000, torch.device("cpu"), SecretCoins()).numpy()
    assert stats.kstest(drawn, stats.gamma(shape).cdf).pvalue > FALSE_ALARM


@pytest.mark.statistical
def test_the_closed_form_of_a_gamma_part_alone_is_the_general_one() -> None:
    """A part so small that it changes nothing sends the draws through the general route."""
    general = dataclasses.replace(LOMAX, uniform_high=1e-12)
    drawn = noise(ScaleMixtureNoise(general))
    assert has_the_law(drawn, ScaleMixtureNoise(LOMAX).event())


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["laplace", "published", "gamma of shape 40"])
def test_the_deviation_is_the_noise_multiplier(name: str) -> None:
    mechanism = MECHANISMS[name]
    drawn = np.concatenate([noise(mechanism) for _ in range(5)])
    # Batches of a heavy-tailed law: the middle of many estimates, within 3 %.
    estimates = [part.std() for part in np.array_split(drawn, 20)]
    assert np.median(estimates) == pytest.approx(mechanism.noise_multiplier, rel=0.03)


# ---- planted faults ----------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("drawn_by", "accounted"),
    [
        (ScaleMixtureNoise(PUBLISHED), ScaleMixtureNoise(AS_A_RATE)),  # a rate read as a mean
        (ScaleMixtureNoise(AS_A_RATE), ScaleMixtureNoise(PUBLISHED)),
        (LaplaceNoise(1.3 * math.sqrt(2)), LaplaceNoise(1.3)),  # deviation drawn as scale
        (LaplaceNoise(1.3 / math.sqrt(2)), LaplaceNoise(1.3)),
        (LaplaceNoise(1.3 * 1.05), LaplaceNoise(1.3)),
        (LaplaceNoise(1.3 * 0.95), LaplaceNoise(1.3)),
        (ScaleMixtureNoise(PUBLISHED.scaled(1.05)), ScaleMixtureNoise(PUBLISHED)),
        (ScaleMixtureNoise(LOMAX.scaled(0.95)), ScaleMixtureNoise(LOMAX)),
        (ScaleMixtureNoise(LOMAX, "shared"), ScaleMixtureNoise(LOMAX)),
    ],
)
def test_noise_of_another_law_is_seen(drawn_by: NoiseMechanism, accounted: NoiseMechanism) -> None:
    assert not has_the_law(noise(drawn_by), accounted.event())


@pytest.mark.statistical
def test_a_tail_that_is_cut_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = scale_mixture.laplace_of_drawn_scale

    def cut(*args: Any) -> Tensor:
        return real(*args).clamp_(-34, 34)  # which 5e-4 of all draws should be beyond

    monkeypatch.setattr(scale_mixture, "laplace_of_drawn_scale", cut)
    assert not has_the_law(noise(ScaleMixtureNoise(LOMAX)), ScaleMixtureNoise(LOMAX).event())


class Unsigned(SecretCoins):
    def signed_uniforms(self, count: int, device: torch.device) -> Tensor:
        return super().signed_uniforms(count, device).abs_()


class FewBits(SecretCoins):
    """24-bit uniforms, as float32 has them."""

    def signed_uniforms(self, count: int, device: torch.device) -> Tensor:
        drawn = super().signed_uniforms(count, device)
        return (drawn.abs() * 2**24).ceil_().div_(2**24).copysign_(drawn)


class SameEveryTime(SecretCoins):
    def signed_uniforms(self, count: int, device: torch.device) -> Tensor:
        return FixedCoins(torch.Generator().manual_seed(1)).signed_uniforms(count, device)


@pytest.mark.statistical
def test_planted_coins_are_seen() -> None:
    mechanism = LaplaceNoise(1.3)
    assert not has_the_law(noise(mechanism, coins=Unsigned()), mechanism.event())
    few = noise(mechanism, coins=FewBits())
    assert len(np.unique(few)) < len(few)
    same = [noise(mechanism, coins=SameEveryTime()) for _ in range(2)]
    assert not unrelated(*same)


# ---- every coordinate, anew ----------------------------------------------------------------------------


@pytest.mark.parametrize("draw", ["iid", "shared"])
@pytest.mark.parametrize("law", [LOMAX, PUBLISHED], ids=["gamma", "published"])
def test_every_coordinate_gets_a_draw_of_its_own(law: ScaleLaw, draw: Any) -> None:
    for mechanism in (LaplaceNoise(1.0), ScaleMixtureNoise(law, draw)):
        drawn = np.concatenate([noise(mechanism), noise(mechanism)])
        assert len(np.unique(drawn)) == 2 * COORDINATES
        assert (drawn != 0).all()


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["laplace", "gamma", "published"])
def test_coordinates_and_releases_are_independent(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "_BLOCK", 1000)  # many blocks: none repeats the one before
    one, other = noise(MECHANISMS[name]), noise(MECHANISMS[name])
    assert unrelated(one, other)
    for lag in (1, 2, 400, 500, 1000, len(one) // 2):
        assert unrelated(one[lag:], one[:-lag]), lag


@pytest.mark.statistical
def test_one_scale_is_shared_by_a_release_and_by_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "_BLOCK", 3)
    wide = ScaleLaw(0.3, 2.0, 0.0, 0.02, 0.02)  # so that sharing shows, by 12 deviations and more
    mechanism, coins = ScaleMixtureNoise(wide, "shared"), SecretCoins()

    def sizes(mechanism: NoiseMechanism) -> np.ndarray:
        rows = []
        for _ in range(1000):
            grads = {name: torch.zeros(4, dtype=torch.float64) for name in ("one", "other")}
            loss = torch.zeros((), dtype=torch.float64)
            summed = ClippedSum(grads, torch.zeros(0), torch.zeros(0), loss)
            rows.append(flat(mechanism.release(summed, sensitivity=1.0, coins=coins)))
        return np.abs(np.stack(rows))

    shared, iid = sizes(mechanism), sizes(dataclasses.replace(mechanism, draw="iid"))
    for place in range(1, 9):  # in the same block, another block, another tensor, the loss
        assert not unrelated(shared[:, 0], shared[:, place])
        assert unrelated(iid[:, 0], iid[:, place])
    assert unrelated(shared[1:, 0], shared[:-1, 0])
    assert has_the_law(shared[:, 3] * np.sign(np.arange(1000) % 2 - 0.5), mechanism.event())


@pytest.mark.statistical
def test_given_its_scale_a_shared_release_is_plain_laplace_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        scale_mixture, "inverse_scales", lambda *_: torch.tensor([0.25], dtype=torch.float64)
    )
    drawn = noise(ScaleMixtureNoise(LOMAX, "shared"), sensitivity=3.0) / 3
    assert has_the_law(drawn, Laplace(4 * math.sqrt(2)))


@pytest.mark.gpu
@pytest.mark.statistical
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["laplace", "gamma", "published", "small gamma"])
def test_on_an_accelerator_noise_has_that_law_too(name: str) -> None:
    mechanism, like = MECHANISMS[name], torch.zeros(500_000, device="cuda")
    summed = ClippedSum({"all": like}, torch.zeros(0), torch.zeros(0))
    torch.manual_seed(0)
    released = mechanism.release(summed, sensitivity=1.0, coins=SecretCoins())
    assert released.grads["all"].device.type == "cuda"
    assert has_the_law(released.grads["all"].cpu().double().numpy(), mechanism.event())
