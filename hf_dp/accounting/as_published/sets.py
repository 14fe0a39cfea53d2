"""The parameter sets of LMO-DP's released code, in its own letters, and the tasks that they were used for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_dp.scale_law import ScaleLaw

Reading = Literal["sampled", "accounted"]
"""How the parameter `lambda_E` is read: as a scale, by the released sampler, or as a rate, by the
released accountant."""

READINGS: tuple[Reading, ...] = ("sampled", "accounted")

DELTA = 1e-10
"""Of the one-step labels, and of the classification tasks."""


@dataclass(frozen=True)
class PublishedNoise:
    """One released set: 1 / b = a1 Gamma(k, theta) + a3 Exponential(lambda_E) + a4 Uniform[u_a, u_b].

    Attributes:
        name: As the released file is named: the nominal label.
        nominal: That label, from which the matched Gaussian's noise is computed.
        a1: Weight of the Gamma part; a3, a4: of the exponential and of the uniform one.
        theta: Scale of the Gamma part; k: its shape.
        lambda_e: Parameter of the exponential part; see `Reading`.
        u_a: Lower end of the uniform part; u_b: its upper end.
    """

    name: str
    nominal: float
    a1: float
    a3: float
    a4: float
    theta: float
    k: float
    lambda_e: float
    u_a: float
    u_b: float

    def law(self, reading: Reading) -> ScaleLaw:
        """The law of 1 / b at sensitivity 1."""
        mean = self.lambda_e if reading == "sampled" else 1 / self.lambda_e
        return ScaleLaw(
            gamma_shape=self.k,
            gamma_scale=self.a1 * self.theta,
            exponential_mean=self.a3 * mean,
            uniform_low=self.a4 * self.u_a,
            uniform_high=self.a4 * self.u_b,
        )


@dataclass(frozen=True)
class PublishedTask:
    """A data set, as the released runs pass over it.

    Attributes:
        name: As in GLUE, or E2E.
        num_examples: To train on.
        num_steps: Of the whole run.
        batch_size: Of a step of training.
        accounted_batch_size: Of a step in the released accounting.
        delta: Of the total.
        dimension: Trainable parameters of the largest model that was trained.
        sets: Names of the sets that it was trained with.
    """

    name: str
    num_examples: int
    num_steps: int
    batch_size: int
    accounted_batch_size: int
    delta: float
    dimension: int
    sets: tuple[str, ...]

    @property
    def sampling_probability(self) -> float:
        """That of Poisson sampling with training's batch size (training shuffled)."""
        return self.batch_size / self.num_examples


def _first(name: str, u_a: float) -> PublishedNoise:
    return PublishedNoise(name, float(name), 0.1, 0.1, 0.1, 0.5, 1, 5, u_a, u_a + 1)


SETS: tuple[PublishedNoise, ...] = (
    PublishedNoise("0.15", 0.15, 0.1, 0.1, 0.1, 7.5, 1, 0.5, 0, 1),
    _first("0.2", 0),
    _first("0.3", 1),
    _first("0.4", 2),
    _first("0.5", 3),
    _first("0.6", 4),
    _first("0.7", 5),
    _first("0.8", 6),
    _first("0.9", 7),
    _first("1", 8),
    PublishedNoise("2", 2, 0.1, 0.1, 0.2, 1, 2, 5, 7, 8),
    PublishedNoise("3", 3, 0.1, 0.1, 0.9, 1, 2, 5, 2, 3),
    PublishedNoise("4", 4, 0.1, 0.1, 0.9, 2, 2, 1, 1, 2),
    PublishedNoise("5", 5, 0.1, 0.9, 0.7, 7.5, 1, 1, 6, 7),
    PublishedNoise("usefulness 0.3", 0.3, 0.1, 0.9, 0.1, 7.5, 1, 1, 1, 2),
    PublishedNoise("usefulness 0.7", 0.7, 0.1, 0.9, 0.1, 7.5, 1, 1, 5, 6),
    PublishedNoise("usefulness 2", 2, 0.1, 0.9, 0.2, 7.5, 1, 1, 8, 9),
    PublishedNoise("usefulness 3", 3, 0.3, 0.1, 0.3, 3, 2, 5, 8, 9),
)

_ROBERTA_LARGE = 355_000_000
_GPT2 = 124_000_000
_CLASSIFIED = ("0.3", "0.7", "2", "3", "5")

TASKS: tuple[PublishedTask, ...] = (
    PublishedTask("SST-2", 67_350, 192, 2048, 2048, DELTA, _ROBERTA_LARGE, _CLASSIFIED),
    PublishedTask("MNLI", 392_703, 1146, 2048, 2048, DELTA, _ROBERTA_LARGE, _CLASSIFIED),
    PublishedTask("QNLI", 104_744, 306, 2048, 2048, DELTA, _ROBERTA_LARGE, _CLASSIFIED),
    PublishedTask("QQP", 363_847, 1062, 2048, 2048, DELTA, _ROBERTA_LARGE, _CLASSIFIED),
    PublishedTask("E2E", 42_061, 410, 1024, 16, 8e-6, _GPT2, _CLASSIFIED[:4]),
)


def set_named(name: str) -> PublishedNoise:
    """The released set of that name."""
    return next(noise for noise in SETS if noise.name == name)
