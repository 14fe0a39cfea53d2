"""Laplace noise and its mixtures by name, their draws, and the law that each is accounted for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy import stats

from hf_dp.coins import Coins, SecretCoins
from hf_dp.events import Laplace
from hf_dp.noise import LaplaceNoise, NoiseMechanism, ScaleMixtureNoise
from hf_dp.scale_law import ScaleLaw
from hf_dp.sums import ClippedSum, NoisySum

FALSE_ALARM = 1e-6  # of each statistical check below
SHAPES = {"table": (300, 400), "bias": (77,), "gain": (1,), "scale": (), "nothing": (0, 3)}
COORDINATES = 300 * 400 + 77 + 1 + 1 + 1

LOMAX = ScaleLaw(3.0, 1 / 3)
PUBLISHED = ScaleLaw(1.0, 0.05, 0.5, 0.1, 0.2)  # labelled 0.3, as drawn by the published sampler
AS_A_RATE = ScaleLaw(1.0, 0.05, 0.02, 0.1, 0.2)  # the same set, as read by its accountant
LAWS = {
    "gamma": LOMAX,
    "gamma of shape 40": ScaleLaw(40.0, 0.02),
    "published": PUBLISHED,
    "published, other reading": AS_A_RATE,
    "small gamma": ScaleLaw(0.4, 0.5, 0.0, 0.3, 0.3),
    "uniform": ScaleLaw(uniform_low=0.5, uniform_high=3.0),
    "constant": ScaleLaw(uniform_low=2.0, uniform_high=2.0),
    "gamma and exponential": ScaleLaw(2.5, 0.2, 0.4),
}
MECHANISMS: dict[str, NoiseMechanism] = {
    "laplace": LaplaceNoise(1.3),
    **{name: ScaleMixtureNoise(law) for name, law in LAWS.items()},
}


def nothing(dtype: torch.dtype = torch.float64, *, loss: bool = True) -> ClippedSum:
    grads = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    empty = torch.zeros(0)
    return ClippedSum(grads, empty, empty, torch.zeros((), dtype=dtype) if loss else None)


def flat(released: NoisySum) -> np.ndarray:
    parts = [*released.grads.values(), *([] if released.loss_sum is None else [released.loss_sum])]
    return torch.cat([part.reshape(-1).double() for part in parts]).numpy()


def noise(
    mechanism: NoiseMechanism,
    sensitivity: float = 1.0,
    coins: Coins | None = None,
    dtype: torch.dtype = torch.float64,
) -> np.ndarray:
    summed, coins = nothing(dtype), coins or SecretCoins()
    return flat(mechanism.release(summed, sensitivity=sensitivity, coins=coins))


def size_cdf(event: Any, x: np.ndarray) -> np.ndarray:
    """P(abs(Z) <= x), written down anew for what the event says."""
    if isinstance(event, Laplace):
        return stats.expon(scale=event.noise_multiplier / math.sqrt(2)).cdf(x)
    width = event.uniform_high - event.uniform_low
    uniform = np.exp(-event.uniform_low * x)
    if width:
        uniform = uniform * np.where(
            x > 0, -np.expm1(-width * x) / np.maximum(width * x, 1e-300), 1
        )
    gamma = (1 + event.gamma_scale * x) ** -event.gamma_shape
    return np.asarray(1 - gamma * uniform / (1 + event.exponential_mean * x))


def has_the_law(drawn: np.ndarray, event: Any) -> bool:
    """Kolmogorov-Smirnov on the sizes and on the signed values; the far tail by its count."""
    far = 0.9995
    low, high = 0.0, 1e9
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if size_cdf(event, np.array(middle)) < far else (low, middle)
    beyond = int((np.abs(drawn) > high).sum())
    p_values = [
        stats.kstest(np.abs(drawn), lambda x: size_cdf(event, x)).pvalue,
        stats.kstest(drawn, lambda z: 0.5 + 0.5 * np.sign(z) * size_cdf(event, np.abs(z))).pvalue,
        stats.binomtest(beyond, len(drawn), 1 - far).pvalue,
    ]
    return bool(min(p_values) > FALSE_ALARM / 3)


def unrelated(one: np.ndarray, other: np.ndarray) -> bool:
    """Rank correlation of sizes, which heavy tails cannot spoil."""
    z = stats.spearmanr(np.abs(one), np.abs(other)).statistic * math.sqrt(len(one) - 1)
    return bool(abs(z) < stats.norm.isf(FALSE_ALARM / 2))
