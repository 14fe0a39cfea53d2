"""The Laplace mechanism."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_dp.coins import Coins
from hf_dp.events import Laplace, Norm
from hf_dp.noise.base import NoiseMechanism, check_dimension, released
from hf_dp.noise.draws import add_in_blocks, laplace
from hf_dp.sums import ClippedSum, NoisySum


@dataclass(frozen=True)
class LaplaceNoise(NoiseMechanism):
    """Independent Laplace noise on every coordinate.

    Attributes:
        noise_multiplier: Standard deviation divided by sensitivity, > 0. The scale b of the density
            exp(-abs(z) / b) / (2 b) is the standard deviation divided by sqrt(2).
        norm: The clipping's norm. With "l1" the guarantee does not depend on the number of coordinates;
            with "l2" it worsens with every coordinate.
        dimension: Coordinates that are noised, at most; None: any number.

    Guarantees:
        * The noise drawn has the law of `event` (test: test_noise_has_the_law_of_its_event).
        * No more coordinates are released than the event says (test:
          test_more_coordinates_than_are_accounted_for_are_refused).

    Draws are float64 numbers on a grid that depends on their size, as everywhere in floating point;
    what can be learned from their last bits (Mironov 2012, "On significance of the least significant
    bits for differential privacy") is not accounted for.

    Source:
        Dwork, McSherry, Nissim and Smith (2006), theorem 1.
    """

    noise_multiplier: float
    norm: Norm = "l1"
    dimension: int | None = None

    def __post_init__(self) -> None:
        self.event()  # checks the fields, which are its own

    def event(self) -> Laplace:
        return Laplace(self.noise_multiplier, self.norm, self.dimension)

    def release(self, summed: ClippedSum, *, sensitivity: float, coins: Coins) -> NoisySum:
        check_dimension("LaplaceNoise", summed, self.dimension)
        scale = self.noise_multiplier * sensitivity / math.sqrt(2)

        def draw(count: int, device: torch.device) -> Tensor:
            return laplace(count, device, coins).mul_(scale)

        return released(summed, lambda tensor: add_in_blocks(tensor, draw))

    def with_noise_multiplier(self, noise_multiplier: float) -> LaplaceNoise:
        return dataclasses.replace(self, noise_multiplier=noise_multiplier)
