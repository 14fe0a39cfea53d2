"""Laplace noise whose scale is itself drawn: the family of LMO-DP."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_dp.coins import Coins
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import Norm, ScaleDraw, ScaleMixtureLaplace
from hf_dp.noise.base import NoiseMechanism, check_dimension, released
from hf_dp.noise.draws import add_in_blocks, inverse_scales, laplace, laplace_of_drawn_scale
from hf_dp.scale_law import ScaleLaw
from hf_dp.sums import ClippedSum, NoisySum


@dataclass(frozen=True)
class ScaleMixtureNoise(NoiseMechanism):
    """Laplace noise of scale sensitivity / lambda on every coordinate, lambda drawn from `law`.

    Attributes:
        law: The law of the inverse scale lambda at sensitivity 1. The noise must have a variance.
        draw: "iid": every coordinate has a lambda of its own, which is never shown; "shared": one
            lambda for the whole release, accounted for as if it were released.
        norm: The clipping's norm.
        dimension: Coordinates that are noised, at most; None: any number.

    Guarantees:
        * The noise drawn has the law of `event` (test: test_noise_has_the_law_of_its_event).
        * No more coordinates are released than the event says (test:
          test_more_coordinates_than_are_accounted_for_are_refused).

    Floating point is not accounted for, as in `LaplaceNoise`.

    Source:
        LMO-DP (arXiv 2405.18776); with a Gamma part alone PLRV-O (arXiv 2509.06264).
    """

    law: ScaleLaw
    draw: ScaleDraw = "iid"
    norm: Norm = "l1"
    dimension: int | None = None

    def __post_init__(self) -> None:
        """Check the fields, which are the event's."""
        self.event()
        if math.isinf(self.noise_multiplier):
            raise ConfigurationError(
                explain(
                    "ScaleMixtureNoise.law",
                    self.law,
                    "a law under which the noise has a variance",
                    "Scales near 0 are too likely: a few draws would drown every sum.",
                    "Take gamma_shape above 2, add parts, or set uniform_low above 0.",
                )
            )

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of one coordinate's noise, divided by the sensitivity."""
        return self.law.deviation

    def event(self) -> ScaleMixtureLaplace:
        law = dataclasses.asdict(self.law)
        return ScaleMixtureLaplace(**law, draw=self.draw, norm=self.norm, dimension=self.dimension)

    def release(self, summed: ClippedSum, *, sensitivity: float, coins: Coins) -> NoisySum:
        check_dimension("ScaleMixtureNoise", summed, self.dimension)
        if self.draw == "shared":
            shared = sensitivity / float(inverse_scales(self.law, 1, torch.device("cpu"), coins))

        def draw(count: int, device: torch.device) -> Tensor:
            if self.draw == "shared":
                return laplace(count, device, coins).mul_(shared)
            return laplace_of_drawn_scale(self.law, count, device, coins).mul_(sensitivity)

        return released(summed, lambda tensor: add_in_blocks(tensor, draw))

    def with_noise_multiplier(self, noise_multiplier: float) -> ScaleMixtureNoise:
        return dataclasses.replace(self, law=self.law.with_deviation(noise_multiplier))
