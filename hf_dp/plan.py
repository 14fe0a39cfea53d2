"""The plan of a private run: the parts that belong together, and the events they emit.

What the plan *does* (draw, clip, add noise) and what is *accounted* come from the same frozen object,
so the claim cannot drift from the code.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hf_dp._validate import positive, positive_integer
from hf_dp.clipping.base import ClippingPolicy
from hf_dp.clipping.loss import LossRelease
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import (
    Composed,
    Continued,
    NeighboringRelation,
    PrivacyEvent,
    PrivacyUnit,
    SelfComposed,
    to_json,
)
from hf_dp.noise.base import NoiseMechanism
from hf_dp.sampling.base import BatchSampler


@dataclass(frozen=True)
class PrivacyPlan:
    """Sampler, clipping, noise and number of steps of one run.

    Attributes:
        sampler: Draws the logical batches.
        clipping: Bounds one unit's share of the sum (its sensitivity is the joint one, loss included).
        noise: Turns the sum into a release.
        num_steps: Releases planned, > 0.
        expected_batch_size: The public constant by which every noisy sum is divided, > 0.
        loss_release: The private loss's coordinate, or None.
    """

    sampler: BatchSampler
    clipping: ClippingPolicy
    noise: NoiseMechanism
    num_steps: int
    expected_batch_size: float
    loss_release: LossRelease | None = None

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together."""
        positive_integer(
            "PrivacyPlan.num_steps",
            self.num_steps,
            "Every step is a release, so their number is fixed before training.",
            "Set max_steps or num_train_epochs.",
        )
        positive(
            "PrivacyPlan.expected_batch_size",
            self.expected_batch_size,
            "The sum is divided by a constant fixed before training, never by the drawn batch's size.",
            "Use sampling_probability * num_examples.",
        )
        if self.clipping.norm != self.noise.norm:
            raise ConfigurationError(
                explain(
                    "PrivacyPlan.noise",
                    type(self.noise).__name__,
                    f"noise for sensitivity in the {self.clipping.norm} norm, like the clipping",
                    "Noise sized for another norm does not cover what one unit can move.",
                    "Choose a clipping policy and a mechanism with the same norm.",
                )
            )

    @property
    def unit(self) -> PrivacyUnit:
        """Whose data is protected together."""
        return self.sampler.unit

    @property
    def relation(self) -> NeighboringRelation:
        """Which datasets count as neighbours."""
        return self.sampler.relation

    @property
    def pass_length(self) -> int:
        """Steps whose batches are drawn together and accounted for as one; 1 with most samplers."""
        return self.sampler.pass_length

    @property
    def step_event(self) -> PrivacyEvent:
        """What one step releases; where steps share a pass, all of it, written down at its first step."""
        return self._with_extra(self.sampler.event(self.noise.event()))

    @property
    def later_event(self) -> PrivacyEvent:
        """What is written down at the other steps of a pass; `step_event` where each step is a pass."""
        if self.pass_length == 1:
            return self.step_event
        return self._with_extra(Continued(self.sampler.event(self.noise.event())))

    @property
    def pass_event(self) -> PrivacyEvent:
        """What all steps of one pass release."""
        extra = self.clipping.event()
        if extra is None or self.pass_length == 1:
            return self.step_event
        whole = self.sampler.event(self.noise.event())
        return Composed((SelfComposed(extra, self.pass_length), whole))

    @property
    def num_passes(self) -> int:
        """Passes that the planned steps begin; one that is not finished counts whole."""
        return -(-self.num_steps // self.pass_length)

    def event(self) -> PrivacyEvent:
        """What the whole planned run releases."""
        return SelfComposed(self.pass_event, self.num_passes)

    def _with_extra(self, release: PrivacyEvent) -> PrivacyEvent:
        extra = self.clipping.event()
        return release if extra is None else Composed((extra, release))

    def with_noise_multiplier(self, noise_multiplier: float) -> PrivacyPlan:
        """The same plan with other noise of the same kind."""
        return dataclasses.replace(self, noise=self.noise.with_noise_multiplier(noise_multiplier))

    def describe(self) -> dict[str, Any]:
        """Every part by qualified name and public fields, as plain JSON (the ledger's header)."""

        def part(value: object) -> object:
            if not dataclasses.is_dataclass(value) or isinstance(value, type):
                return value if isinstance(value, str | int | float | None) else _qualified(value)
            fields = {f.name: part(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return {"type": _qualified(value), **fields}

        parts = {f.name: part(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {
            **parts,
            "unit": self.unit,
            "relation": str(self.relation),
            "sensitivity": self.clipping.sensitivity,
            "step_event": to_json(self.step_event),
        }


def _qualified(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
