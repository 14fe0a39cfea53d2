"""The Gaussian mechanism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from hf_dp._validate import positive
from hf_dp.coins import Coins
from hf_dp.events import Gaussian
from hf_dp.noise.base import NoiseMechanism
from hf_dp.sums import ClippedSum, NoisySum


@dataclass(frozen=True)
class GaussianNoise(NoiseMechanism):
    """Independent N(0, (noise_multiplier * sensitivity)^2) on every coordinate.

    Attributes:
        noise_multiplier: Standard deviation divided by sensitivity, > 0.

    Guarantees:
        * Every coordinate of the release, the loss's included, gets noise (test:
          test_every_coordinate_is_noised), never twice the same draw.

    Source:
        Dwork and Roth (2014), section 3.5.1 and appendix A.
    """

    noise_multiplier: float

    norm: ClassVar[Literal["l1", "l2"]] = "l2"

    def __post_init__(self) -> None:
        positive(
            "GaussianNoise.noise_multiplier",
            self.noise_multiplier,
            "Without noise nothing is private.",
            "Use transformers.Trainer to train without privacy.",
        )

    def event(self) -> Gaussian:
        return Gaussian(self.noise_multiplier)

    def release(self, summed: ClippedSum, *, sensitivity: float, coins: Coins) -> NoisySum:
        deviation = self.noise_multiplier * sensitivity

        def noised(tensor: Tensor) -> Tensor:
            return tensor.add_(coins.normal_like(tensor), alpha=deviation)

        grads = {name: noised(grad) for name, grad in summed.grads.items()}
        loss_sum = None if summed.loss_sum is None else noised(summed.loss_sum)
        return NoisySum(grads=grads, loss_sum=loss_sum)
