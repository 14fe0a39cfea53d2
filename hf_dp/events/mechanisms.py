"""The base of all events, and what a mechanism releases of a sum whose sensitivity is 1."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, get_args

from hf_dp._validate import one_of, positive, positive_integer

if TYPE_CHECKING:
    from hf_dp.scale_law import ScaleLaw

PrivacyUnit = Literal["example", "user"]
Norm = Literal["l1", "l2"]
ScaleDraw = Literal["iid", "shared"]


class NeighboringRelation(StrEnum):
    """Which pairs of datasets must be hard to tell apart (names as in dp-accounting)."""

    ADD_OR_REMOVE_ONE = "add_or_remove_one"
    """One unit is present or absent. Sampling probability and number of steps are constants."""
    REPLACE_ONE = "replace_one"
    """One unit is replaced by any other."""
    REPLACE_SPECIAL = "replace_special"
    """One unit is replaced by one that contributes nothing ('zero-out'): the number of units is public."""


class PrivacyEvent:
    """Base of all events. Subclasses are frozen dataclasses of JSON values and events."""


@dataclass(frozen=True)
class Gaussian(PrivacyEvent):
    """A sum of L2 sensitivity 1 released with N(0, noise_multiplier^2) on every coordinate."""

    noise_multiplier: float

    def __post_init__(self) -> None:
        positive(
            "Gaussian.noise_multiplier",
            self.noise_multiplier,
            "Without noise nothing is private.",
            "Use transformers.Trainer to train without privacy.",
        )


@dataclass(frozen=True)
class Laplace(PrivacyEvent):
    """A sum of sensitivity 1 released with independent Laplace noise on every coordinate.

    Attributes:
        noise_multiplier: The noise's standard deviation, > 0; its scale b is that over sqrt(2).
        norm: The norm in which one unit moves the sum by at most 1.
        dimension: Coordinates that are noised, at most; None: any number.
    """

    noise_multiplier: float
    norm: Norm = "l1"
    dimension: int | None = None

    def __post_init__(self) -> None:
        positive(
            "Laplace.noise_multiplier",
            self.noise_multiplier,
            "Without noise nothing is private.",
            "Use transformers.Trainer to train without privacy.",
        )
        _check_release("Laplace", self.norm, self.dimension)


@dataclass(frozen=True)
class ScaleMixtureLaplace(PrivacyEvent):
    """A sum of sensitivity 1 released with Laplace noise whose inverse scale is itself drawn.

    Attributes:
        gamma_shape: This and the next four are the law of the inverse scale (`ScaleLaw`).
        gamma_scale: Scale of its Gamma part.
        exponential_mean: Mean of its Exponential part.
        uniform_low: Lower end of its Uniform part.
        uniform_high: Upper end of its Uniform part.
        draw: "iid": a fresh inverse scale for every coordinate, never shown; "shared": one for the
            whole release, which counts as released.
        norm: The norm in which one unit moves the sum by at most 1.
        dimension: Coordinates that are noised, at most; None: any number.
    """

    gamma_shape: float
    gamma_scale: float
    exponential_mean: float
    uniform_low: float
    uniform_high: float
    draw: ScaleDraw = "iid"
    norm: Norm = "l1"
    dimension: int | None = None

    def __post_init__(self) -> None:
        _ = self.law  # refuses what is no law
        one_of(
            "ScaleMixtureLaplace.draw",
            self.draw,
            get_args(ScaleDraw),
            "It says whether coordinates share the inverse scale.",
        )
        _check_release("ScaleMixtureLaplace", self.norm, self.dimension)

    @property
    def law(self) -> ScaleLaw:
        """The law of the inverse scale and of the noise."""
        from hf_dp.scale_law import ScaleLaw  # NumPy is loaded where there is such an event

        return ScaleLaw(*astuple(self)[:5])

    @property
    def noise_multiplier(self) -> float:
        """The noise's standard deviation; inf where the variance is infinite."""
        return self.law.deviation


@dataclass(frozen=True)
class NonPrivate(PrivacyEvent):
    """A release without any guarantee; every accountant answers epsilon = inf."""

    reason: str


def _check_release(owner: str, norm: object, dimension: object) -> None:
    one_of(f"{owner}.norm", norm, get_args(Norm), "It is the norm of the sum's sensitivity.")
    if dimension is not None:
        positive_integer(
            f"{owner}.dimension",
            dimension,
            "It counts the coordinates that are noised.",
            "Use None where their number is not bounded.",
        )
