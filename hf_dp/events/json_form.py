"""Events as plain JSON, as the ledger keeps them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hf_dp.errors import ConfigurationError, explain
from hf_dp.events.mechanisms import Gaussian, Laplace, NonPrivate, PrivacyEvent, ScaleMixtureLaplace
from hf_dp.events.sampled import (
    BallsInBins,
    Composed,
    Continued,
    PoissonSampled,
    PoissonSampledContributions,
    SampledWithoutReplacement,
    SelfComposed,
    Shuffled,
    TruncatedPoissonSampled,
)

EVENT_TYPES: Mapping[str, type[PrivacyEvent]] = {
    cls.__name__: cls
    for cls in (
        Gaussian,
        Laplace,
        ScaleMixtureLaplace,
        PoissonSampled,
        PoissonSampledContributions,
        TruncatedPoissonSampled,
        SampledWithoutReplacement,
        Shuffled,
        BallsInBins,
        Continued,
        SelfComposed,
        Composed,
        NonPrivate,
    )
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
