"""Runs with samplers other than Poisson's, as the command line describes them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from hf_dp._validate import one_of, positive_integer, probability
from hf_dp.cli.run import GAUSSIAN, PoissonRun
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import (
    BallsInBins,
    Gaussian,
    Laplace,
    NeighboringRelation,
    PrivacyEvent,
    PrivacyUnit,
    SampledWithoutReplacement,
    SelfComposed,
    Shuffled,
    TruncatedPoissonSampled,
)

RELATIONS: Mapping[str, NeighboringRelation] = {
    "poisson": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "balls_in_bins": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "truncated_poisson": NeighboringRelation.REPLACE_SPECIAL,
    "shuffled": NeighboringRelation.REPLACE_SPECIAL,
    "fixed_size": NeighboringRelation.REPLACE_ONE,
}
"""Every sampling by the name that people write, and the neighbours that its guarantee is about."""

PASSES: Mapping[str, Callable[[int, PrivacyEvent], PrivacyEvent]] = {
    "balls_in_bins": BallsInBins,
    "shuffled": Shuffled,
}


@dataclass(frozen=True)
class SampledRun:
    """One sampling and one kind of noise, the same in every step; an accountant can choose how much.

    Attributes:
        sampling: A key of `RELATIONS`, other than "poisson".
        sampling_probability: Batch size / number of examples, in (0, 1].
        num_steps: > 0; a pass that they do not finish counts whole.
        num_examples: Needed by "fixed_size" and "truncated_poisson".
        max_batch_size: The cap of "truncated_poisson"; None for ten standard deviations above the mean.
        noise_multiplier: > 0.
        kind: The noise; its own multiplier is not used.
    """

    sampling: str
    sampling_probability: float
    num_steps: int
    num_examples: int | None = None
    max_batch_size: int | None = None
    noise_multiplier: float = 1.0
    kind: Gaussian | Laplace = GAUSSIAN

    unit: ClassVar[PrivacyUnit] = "example"

    @property
    def relation(self) -> NeighboringRelation:
        """Which datasets count as neighbours."""
        return RELATIONS[self.sampling]

    def event(self) -> PrivacyEvent:
        """What the whole run releases."""
        q = probability(
            "hf-dp.sampling_probability", self.sampling_probability, _WHY_CHANCE, _REMEDY_CHANCE
        )
        positive_integer("hf-dp.num_steps", self.num_steps, "It counts releases.", "Use 1 or more.")
        noise = dataclasses.replace(self.kind, noise_multiplier=self.noise_multiplier)
        if self.sampling in PASSES:
            num_batches = round(1 / q)
            num_passes = math.ceil(self.num_steps / num_batches)
            return SelfComposed(PASSES[self.sampling](num_batches, noise), num_passes)
        return SelfComposed(self._step(q, noise), self.num_steps)

    def with_noise_multiplier(self, noise_multiplier: float) -> SampledRun:
        """The same run with other noise."""
        return dataclasses.replace(self, noise_multiplier=noise_multiplier)

    def _step(self, q: float, noise: PrivacyEvent) -> PrivacyEvent:
        units = self.num_examples
        if units is None:
            raise ConfigurationError(
                explain(
                    "hf-dp.num_examples",
                    None,
                    f"a whole number with sampling {self.sampling!r}",
                    "What such a batch costs depends on the number of examples.",
                    "Give --num-examples.",
                )
            )
        positive_integer(
            "hf-dp.num_examples", units, "It is who may be drawn.", "Use the size of the data."
        )
        size = q * units
        if self.sampling == "truncated_poisson":
            cap = self.max_batch_size
            if cap is None:
                cap = min(units, math.ceil(size + 10 * math.sqrt(size)))
            return TruncatedPoissonSampled(units, q, cap, noise)
        if abs(size - round(size)) > 1e-6 * size:
            raise ConfigurationError(
                explain(
                    "hf-dp.sampling_probability",
                    q,
                    f"a whole number of {units} examples in a batch, not {size:.6g}",
                    "Every batch has exactly this size.",
                    "Use batch size / number of examples.",
                )
            )
        return SampledWithoutReplacement(units, round(size), noise)


def run_of(
    sampling: str,
    sampling_probability: float,
    num_steps: int,
    *,
    num_examples: int | None = None,
    max_batch_size: int | None = None,
    noise_multiplier: float = 1.0,
    kind: Gaussian | Laplace = GAUSSIAN,
) -> PoissonRun | SampledRun:
    """The run that the options of a subcommand describe; see `SampledRun` for the arguments.

    Raises:
        ConfigurationError: No sampling has that name, or it has no such option.
    """
    one_of("hf-dp.sampling", sampling, RELATIONS, "The cost of a step depends on who is in it.")
    if max_batch_size is not None and sampling != "truncated_poisson":
        raise ConfigurationError(
            explain(
                "hf-dp.max_batch_size",
                max_batch_size,
                f"nothing with sampling {sampling!r}",
                "Only 'truncated_poisson' has a cap.",
                "Leave it out.",
            )
        )
    if sampling == "poisson":
        return PoissonRun(sampling_probability, num_steps, noise_multiplier, kind)
    return SampledRun(
        sampling,
        sampling_probability,
        num_steps,
        num_examples,
        max_batch_size,
        noise_multiplier,
        kind,
    )


_WHY_CHANCE = "It is the part of the data that is in a batch."
_REMEDY_CHANCE = "Use expected batch size / number of examples."
