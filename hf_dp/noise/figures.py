"""How large a mechanism's noise is, in the figures by which noise is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from hf_dp._validate import one_of, positive
from hf_dp.noise.base import NoiseMechanism
from hf_dp.noise.gaussian import GaussianNoise
from hf_dp.noise.laplace import LaplaceNoise
from hf_dp.noise.scale_mixture import ScaleMixtureNoise
from hf_dp.scale_law import ScaleLaw

Objective = Literal["variance", "mean_absolute", "usefulness", "entropy"]
"""What is made least: the noise's variance, its mean absolute value, the chance that it is larger than
a radius (usefulness is the chance that it is not), or its entropy."""


@dataclass(frozen=True)
class Figures:
    """The size of the noise on one coordinate of the sum.

    Attributes:
        deviation: Standard deviation.
        mean_absolute: Mean absolute value.
        entropy: Differential entropy, in nats.
        usefulness: P(abs(noise) <= radius); None if no radius was asked about.
        beyond: 1 - usefulness, with all its digits.
    """

    deviation: float
    mean_absolute: float
    entropy: float
    usefulness: float | None = None
    beyond: float | None = None

    @classmethod
    def of(
        cls, noise: NoiseMechanism, *, clipping_norm: float = 1.0, radius: float | None = None
    ) -> Figures:
        """The figures of a Gaussian, a Laplace or a scale mixture.

        Args:
            noise: The mechanism.
            clipping_norm: Sensitivity of the sum, > 0; it scales the noise.
            radius: In the sum's own units, as `clipping_norm` is.
        """
        if isinstance(noise, GaussianNoise):
            return cls._of_gaussian(noise.noise_multiplier * clipping_norm, radius)
        return cls._of_law(law_of(noise).scaled(1 / clipping_norm), radius)

    @classmethod
    def _of_gaussian(cls, deviation: float, radius: float | None) -> Figures:
        beyond = None if radius is None else math.erfc(radius / deviation / math.sqrt(2))
        return cls(
            deviation=deviation,
            mean_absolute=deviation * math.sqrt(2 / math.pi),
            entropy=0.5 * math.log(2 * math.pi * math.e) + math.log(deviation),
            usefulness=None if beyond is None else 1 - beyond,
            beyond=beyond,
        )

    @classmethod
    def _of_law(cls, law: ScaleLaw, radius: float | None) -> Figures:
        return cls(
            deviation=law.deviation,
            mean_absolute=law.mean_absolute,
            entropy=law.entropy(),
            usefulness=None if radius is None else float(law.usefulness(radius)),
            beyond=None if radius is None else float(law.tail(radius)),
        )

    def score(self, objective: Objective) -> float:
        """What is compared, the less the better, on a logarithmic scale."""
        match objective:
            case "variance":
                return math.log(self.deviation)
            case "mean_absolute":
                return math.log(self.mean_absolute)
            case "entropy":
                return self.entropy
            case "usefulness":
                return math.log(max(self.beyond or 0.0, 1e-300))


def law_of(noise: NoiseMechanism) -> ScaleLaw:
    """The law of the inverse scale of Laplace noise, plain or mixed, at sensitivity 1."""
    if isinstance(noise, ScaleMixtureNoise):
        return noise.law
    if isinstance(noise, LaplaceNoise):
        inverse_scale = math.sqrt(2) / noise.noise_multiplier
        return ScaleLaw(uniform_low=inverse_scale, uniform_high=inverse_scale)
    raise TypeError(f"{type(noise).__name__} is not Laplace noise")


def check_objective(objective: str, radius: float | None) -> None:
    """Refuse an objective that is not known, or usefulness without a radius."""
    why = "It decides which noise is best."
    one_of("search_noise.objective", objective, get_args(Objective), why)
    if objective == "usefulness" or radius is not None:
        positive(
            "search_noise.radius",
            radius,
            "Usefulness is the chance that the noise is at most so large.",
            "Pass a radius in the units of clipping_norm, or choose another objective.",
        )
