"""The Gaussian mechanism: every coordinate, the right size, never the same noise twice."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from hf_dp.coins import Coins, FixedCoins, SecretCoins
from hf_dp.errors import ConfigurationError
from hf_dp.events import Gaussian
from hf_dp.noise import GaussianNoise
from hf_dp.sums import ClippedSum, NoisySum

FALSE_ALARM = 1e-6  # of each statistical check below
SHAPES = {"table": (300, 400), "bias": (77,), "gain": (1,), "scale": ()}


def nothing(dtype: torch.dtype = torch.float32, *, loss: bool = True) -> ClippedSum:
    grads = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    empty = torch.zeros(0)
    return ClippedSum(grads, empty, empty, torch.zeros(()) if loss else None)


def flat(released: NoisySum) -> np.ndarray:
    parts = [*released.grads.values(), *([] if released.loss_sum is None else [released.loss_sum])]
    return torch.cat([part.reshape(-1).double() for part in parts]).numpy()


def noise(
    multiplier: float = 1.0, sensitivity: float = 1.0, coins: Coins | None = None
) -> np.ndarray:
    mechanism = GaussianNoise(multiplier)
    return flat(mechanism.release(nothing(), sensitivity=sensitivity, coins=coins or SecretCoins()))


def variance_is(drawn: np.ndarray, deviation: float) -> bool:
    """Chi-square on the sum of squares, both sides."""
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], len(drawn))
    return bool(low <= (drawn**2).sum() / deviation**2 <= high)


def unrelated(one: np.ndarray, other: np.ndarray) -> bool:
    """Neither the draws nor their squares correlate."""
    limit = stats.norm.isf(FALSE_ALARM / 4) / math.sqrt(len(one))
    pairs = ((one, other), (one**2, other**2))
    return all(abs(float(np.corrcoef(a, b)[0, 1])) < limit for a, b in pairs)


@pytest.mark.statistical
@pytest.mark.parametrize(("multiplier", "sensitivity"), [(1.0, 1.0), (0.3, 5.0), (20.0, 0.01)])
def test_the_deviation_is_multiplier_times_sensitivity(
    multiplier: float, sensitivity: float
) -> None:
    drawn = noise(multiplier, sensitivity)
    assert len(drawn) > 100_000
    assert variance_is(drawn, multiplier * sensitivity)
    assert abs(drawn.mean()) < stats.norm.isf(FALSE_ALARM / 2) * drawn.std() / math.sqrt(len(drawn))


@pytest.mark.statistical
@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_a_deviation_wrong_by_five_percent_is_seen(factor: float) -> None:
    assert not variance_is(noise(factor), 1.0)


@pytest.mark.statistical
def test_the_noise_is_normal_beyond_four_deviations() -> None:
    drawn = np.abs(np.concatenate([noise() for _ in range(10)]))
    for z in (3.0, 4.0, 4.5):
        found = stats.binomtest(int((drawn > z).sum()), len(drawn), 2 * stats.norm.sf(z))
        assert found.pvalue > FALSE_ALARM / 3


def test_every_coordinate_is_noised() -> None:
    drawn = noise()
    assert len(drawn) == sum(math.prod(shape) for shape in SHAPES.values()) + 1
    assert bool((drawn != 0).all())


def test_no_two_coordinates_share_a_draw() -> None:
    mechanism, coins = GaussianNoise(1.0), SecretCoins()
    released = mechanism.release(nothing(torch.float64), sensitivity=1.0, coins=coins)
    assert len(np.unique(flat(released))) == len(flat(released))


@pytest.mark.statistical
def test_releases_are_independent() -> None:
    one, other = noise(), noise()
    assert unrelated(one, other)
    assert (one == other).mean() < 1e-3  # float32 draws may meet by chance


@pytest.mark.statistical
def test_coordinates_are_independent_of_their_neighbours() -> None:
    drawn = noise()
    for lag in (1, 2, 64, 400, len(drawn) // 2):  # half: Box-Muller draws come in pairs
        assert unrelated(drawn[lag:], drawn[:-lag]), lag


def test_two_runs_differ_and_fixed_coins_repeat() -> None:
    def run(seed: int) -> np.ndarray:
        return noise(coins=FixedCoins(torch.Generator().manual_seed(seed)))

    assert (noise() == noise()).mean() < 1e-3
    assert (run(1) == run(1)).all()
    assert (run(1) == run(2)).mean() < 1e-3


def test_the_sum_is_kept_under_the_noise() -> None:
    summed = nothing()
    for grad in summed.grads.values():
        grad += 1000.0
    with_loss = ClippedSum(summed.grads, summed.norms, summed.losses, torch.tensor(500.0))
    released = GaussianNoise(1e-3).release(with_loss, sensitivity=1.0, coins=SecretCoins())
    assert isinstance(released, NoisySum)
    assert list(released.grads) == list(SHAPES)
    assert {name: grad.shape for name, grad in released.grads.items()} == SHAPES
    assert all(bool(((grad - 1000).abs() < 0.01).all()) for grad in released.grads.values())
    assert float(released.loss_sum) == pytest.approx(500, abs=0.01)  # type: ignore[arg-type]


def test_without_a_loss_none_is_released() -> None:
    summed = nothing(loss=False)
    released = GaussianNoise(1.0).release(summed, sensitivity=1.0, coins=SecretCoins())
    assert released.loss_sum is None


# ---- planted faults --------------------------------------------------------------------------------


class SameEveryTime(SecretCoins):
    def normal_like(self, tensor: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(42)
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


class OneDrawPerRow(SecretCoins):
    def normal_like(self, tensor: Tensor) -> Tensor:
        one = super().normal_like(tensor[..., :1] if tensor.dim() else tensor)
        return one.expand_as(tensor)


class Clipped(SecretCoins):
    def normal_like(self, tensor: Tensor) -> Tensor:
        return super().normal_like(tensor).clamp(-2.0, 2.0)


@pytest.mark.statistical
def test_planted_faults_are_seen() -> None:
    assert not unrelated(noise(coins=SameEveryTime()), noise(coins=SameEveryTime()))
    per_row = noise(coins=OneDrawPerRow())
    assert not unrelated(per_row[1:], per_row[:-1])
    assert not variance_is(noise(coins=Clipped()), 1.0)


# ---- what is accounted ------------------------------------------------------------------------------


def test_the_event_is_the_multiplier_that_is_used() -> None:
    assert GaussianNoise(1.7).event() == Gaussian(1.7)
    assert GaussianNoise(1.7).norm == "l2"


def test_beside_clipping_in_the_l1_norm_it_is_the_same_event() -> None:
    """The l2 norm of what one unit moves is at most its l1 norm."""
    noise = GaussianNoise(1.7, norm="l1")
    assert noise.event() == Gaussian(1.7)
    assert noise.with_noise_multiplier(2.0) == GaussianNoise(2.0, norm="l1")
    with pytest.raises(ConfigurationError, match=r"GaussianNoise\.norm='l0'.*the clipping's"):
        GaussianNoise(1.7, norm="l0")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, None, "1", True])
def test_noise_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"GaussianNoise\.noise_multiplier=.*> 0"):
        GaussianNoise(value)
