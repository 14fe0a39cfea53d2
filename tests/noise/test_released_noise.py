"""Laplace noise and its mixtures: what a release keeps, what is accounted for it, what is refused."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from laws import (
    COORDINATES,
    LOMAX,
    MECHANISMS,
    PUBLISHED,
    flat,
    noise,
    nothing,
)

from hf_dp.coins import Coins, FixedCoins, SecretCoins
from hf_dp.errors import ConfigurationError
from hf_dp.events import Laplace, ScaleMixtureLaplace
from hf_dp.noise import LaplaceNoise, NoiseMechanism, ScaleMixtureNoise
from hf_dp.scale_law import ScaleLaw
from hf_dp.sums import ClippedSum


def test_noise_ignores_every_seed_and_fixed_coins_repeat() -> None:
    def run(mechanism: NoiseMechanism, coins: Coins | None = None) -> np.ndarray:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        return noise(mechanism, coins=coins)

    for mechanism in MECHANISMS.values():
        assert not set(run(mechanism)) & set(run(mechanism))
        one, again, other = (
            run(mechanism, FixedCoins(torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)
        )
        assert (one == again).all()
        assert (one != other).all()


@pytest.mark.parametrize("name", ["laplace", "gamma", "published"])
def test_the_sum_is_kept_whatever_its_layout(name: str) -> None:
    grads = {
        "rows": torch.full((30, 40), 1000.0),
        "columns": torch.full((40, 30), 1000.0).t(),
        "number": torch.tensor(1000.0),
    }
    summed = ClippedSum(grads, torch.zeros(0), torch.zeros(0), torch.tensor(1000.0))
    released = MECHANISMS[name].release(summed, sensitivity=1e-4, coins=SecretCoins())
    shapes = [tuple(grad.shape) for grad in released.grads.values()]
    assert shapes == [(30, 40), (30, 40), ()]
    drawn = flat(released) - 1000
    assert (np.abs(drawn) < 1).all()
    assert (drawn != 0).mean() > 0.5
    assert released.grads["columns"].std() > 0


def test_without_a_loss_none_is_released() -> None:
    for mechanism in MECHANISMS.values():
        summed = nothing(loss=False)
        assert mechanism.release(summed, sensitivity=1.0, coins=SecretCoins()).loss_sum is None


# ---- what is accounted ----------------------------------------------------------------------------------


def test_the_event_is_that_of_the_fields() -> None:
    assert LaplaceNoise(1.7).event() == Laplace(1.7, "l1", None)
    assert LaplaceNoise(1.7, "l2", 8).event() == Laplace(1.7, "l2", 8)
    assert ScaleMixtureNoise(PUBLISHED, "shared", "l2", 8).event() == ScaleMixtureLaplace(
        1.0, 0.05, 0.5, 0.1, 0.2, "shared", "l2", 8
    )
    assert ScaleMixtureNoise(PUBLISHED).event().law == PUBLISHED


def test_a_size_can_be_chosen() -> None:
    assert LaplaceNoise(1.7, "l2", 8).with_noise_multiplier(3.0) == LaplaceNoise(3.0, "l2", 8)
    chosen = ScaleMixtureNoise(PUBLISHED, "shared", "l2", 8).with_noise_multiplier(3.0)
    assert chosen.noise_multiplier == pytest.approx(3.0, rel=1e-12)
    assert (chosen.draw, chosen.norm, chosen.dimension) == ("shared", "l2", 8)
    ratio = chosen.law.gamma_scale / PUBLISHED.gamma_scale
    assert chosen.law.uniform_high / PUBLISHED.uniform_high == pytest.approx(ratio, rel=1e-12)


@pytest.mark.parametrize("make", [LaplaceNoise, ScaleMixtureNoise])
def test_more_coordinates_than_are_accounted_for_are_refused(make: Any) -> None:
    size = 1.0 if make is LaplaceNoise else LOMAX
    enough = make(size, dimension=COORDINATES)
    enough.release(nothing(), sensitivity=1.0, coins=SecretCoins())
    make(size, dimension=COORDINATES - 1).release(
        nothing(loss=False), sensitivity=1.0, coins=SecretCoins()
    )
    summed = nothing()
    with pytest.raises(
        ConfigurationError, match=rf"Noise\.dimension={COORDINATES - 1}: .*{COORDINATES} coord"
    ):
        make(size, dimension=COORDINATES - 1).release(summed, sensitivity=1.0, coins=SecretCoins())
    assert not any(bool(grad.any()) for grad in summed.grads.values())


@pytest.mark.parametrize(
    "law",
    [
        ScaleLaw(2.0, 1.0),
        ScaleLaw(exponential_mean=1.0),
        ScaleLaw(uniform_high=1.0),
        ScaleLaw(0.9, 1.0, 1.0),
    ],
    ids=repr,
)
def test_noise_without_a_variance_is_refused(law: ScaleLaw) -> None:
    with pytest.raises(ConfigurationError, match=r"ScaleMixtureNoise\.law=.*variance.*above 2"):
        ScaleMixtureNoise(law)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, None, "1", True])
def test_noise_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Laplace\.noise_multiplier=.*> 0"):
        LaplaceNoise(value)


def test_unknown_norms_and_draws_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Laplace\.norm='l0'"):
        LaplaceNoise(1.0, "l0")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"ScaleMixtureLaplace\.draw='each'"):
        ScaleMixtureNoise(LOMAX, "each")  # type: ignore[arg-type]
