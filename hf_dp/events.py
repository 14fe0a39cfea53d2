"""What one step released, as frozen data.

A mechanism and a sampler *emit* events, the ledger *stores* them, an accountant *reads* them; none of
the three needs to know another. Rules of evolution: never remove an event, never change the meaning
of a field, new fields are optional. The names follow dp-accounting's ``DpEvent``s, to which every
event here can be converted, so that a ledger can be replayed there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from hf_dp._validate import positive, positive_integer, probability
from hf_dp.errors import ConfigurationError, explain

PrivacyUnit = Literal["example", "user"]


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
class PoissonSampled(PrivacyEvent):
    """`event` applied to a batch that holds each unit independently with `sampling_probability`."""

    sampling_probability: float
    event: PrivacyEvent

    def __post_init__(self) -> None:
        probability(
            "PoissonSampled.sampling_probability",
            self.sampling_probability,
            "It is the chance that a unit is in the batch.",
            "Use expected_batch_size / num_examples.",
        )


@dataclass(frozen=True)
class SelfComposed(PrivacyEvent):
    """`event`, `count` times in a row, each with fresh randomness."""

    event: PrivacyEvent
    count: int

    def __post_init__(self) -> None:
        positive_integer(
            "SelfComposed.count", self.count, "It counts releases.", "Use at least one release."
        )


@dataclass(frozen=True)
class Composed(PrivacyEvent):
    """All of `events`, one after another, each free to depend on what came before."""

    events: tuple[PrivacyEvent, ...]


@dataclass(frozen=True)
class NonPrivate(PrivacyEvent):
    """A release without any guarantee; every accountant answers epsilon = inf."""

    reason: str


EVENT_TYPES: Mapping[str, type[PrivacyEvent]] = {
    cls.__name__: cls for cls in (Gaussian, PoissonSampled, SelfComposed, Composed, NonPrivate)
}


def to_json(event: PrivacyEvent) -> dict[str, Any]:
    """A plain JSON object: ``{"type": class name, field: value, ...}``, nested for nested events."""

    def plain(value: object) -> object:
        if isinstance(value, PrivacyEvent):
            return to_json(value)
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value

    fields = {f.name: plain(getattr(event, f.name)) for f in _fields(type(event))}
    return {"type": type(event).__name__, **fields}


def from_json(data: Mapping[str, Any]) -> PrivacyEvent:
    """The event that `to_json` wrote. An unknown type or field is refused, never skipped."""

    def rich(value: object) -> object:
        if isinstance(value, Mapping):
            return from_json(value)
        if isinstance(value, list):
            return tuple(rich(item) for item in value)
        return value

    name = str(data.get("type"))
    if name not in EVENT_TYPES:
        raise ConfigurationError(
            explain(
                "PrivacyEvent.type",
                name,
                f"one of {sorted(EVENT_TYPES)}",
                "An event that is not understood cannot be accounted for.",
                "Read this ledger with the version of hf_dp that wrote it.",
            )
        )
    cls = EVENT_TYPES[name]
    fields = {key: rich(value) for key, value in data.items() if key != "type"}
    known = {f.name: f.default is dataclasses.MISSING for f in _fields(cls)}
    needed = {field for field, required in known.items() if required}
    if not needed <= set(fields) <= set(known):
        raise ConfigurationError(
            explain(
                f"{name}.fields",
                sorted(fields),
                f"{sorted(needed)}, and no others than {sorted(known)}",
                "A field that is not understood may change the meaning of the event.",
                "Read this ledger with the version of hf_dp that wrote it.",
            )
        )
    return cls(**fields)


def _fields(cls: type[PrivacyEvent]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)  # type: ignore[arg-type]  # every event is a dataclass
