"""The Gaussian mechanism."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from hf_dp._validate import one_of, positive
from hf_dp.coins import Coins
from hf_dp.events import Gaussian, Norm
from hf_dp.noise.base import NoiseMechanism, released
from hf_dp.sums import ClippedSum, NoisySum


@dataclass(frozen=True)
class GaussianNoise(NoiseMechanism):
    """Independent N(0, (noise_multiplier * sensitivity)^2) on every coordinate.

    Attributes:
        noise_multiplier: Standard deviation divided by sensitivity, > 0.
        norm: "l2", or "l1" beside clipping in that norm. The l2 norm is never above the l1 norm, so
            the event is the same.

    Guarantees:
        * Every coordinate of the release, the loss's included, gets noise (test:
          test_every_coordinate_is_noised), never twice the same draw.

    Source:
        Dwork and Roth (2014), section 3.5.1 and appendix A.
    """

    noise_multiplier: float
    norm: Norm = "l2"

    def __post_init__(self) -> None:
        positive(
            "GaussianNoise.noise_multiplier",
            self.noise_multiplier,
            "Without noise nothing is private.",
            "Use transformers.Trainer to train without privacy.",
        )
        one_of("GaussianNoise.norm", self.norm, get_args(Norm), "It must be the clipping's.")

    def event(self) -> Gaussian:
        return Gaussian(self.noise_multiplier)

    def release(self, summed: ClippedSum, *, sensitivity: float, coins: Coins) -> NoisySum:
        deviation = self.noise_multiplier * sensitivity

        def noised(tensor: Tensor) -> Tensor:
            return tensor.add_(coins.normal_like(tensor), alpha=deviation)

        return released(summed, noised)

    def with_noise_multiplier(self, noise_multiplier: float) -> GaussianNoise:
        return dataclasses.replace(self, noise_multiplier=noise_multiplier)
