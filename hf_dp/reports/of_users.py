"""What a report says where all examples of a user are protected together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from hf_dp.events import PoissonSampledContributions, PrivacyEvent

TRUSTED = (
    "The examples of a user are those with the same id, and ids are trusted: who appears under two ids is "
    "protected as two users, and what others wrote about a person is not protected with that person."
)

_Event = TypeVar("_Event", bound=PrivacyEvent)


def in_words(claimed: Mapping[str, Any]) -> str:
    """What a drawn user brings, or what users keep, from the ledger's header."""
    most = claimed.get("max_examples_per_user")
    if claimed.get("sampling") == "examples":
        return (
            f"at most {most} examples of each are kept ({claimed.get('selection')}), "
            f"{claimed.get('kept_examples')} in all; examples are drawn and clipped one by one"
        )
    brought = "all examples" if most is None else f"at most {most} fresh examples"
    return (
        f"drawn whole, each with {brought}; "
        f"the {claimed.get('reduction')} of their gradients is clipped as one"
    )


def largest_bound(event: PrivacyEvent) -> int:
    """Examples that one user may have had in a batch; 0 where no release bounds them."""
    own = event.max_contributions if isinstance(event, PoissonSampledContributions) else 0
    return max([own, *(largest_bound(part) for part in _parts(event))])


def bounded_to(event: _Event, most: int) -> _Event:
    """The same releases as they are for a user who has at most `most` examples."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(event):  # type: ignore[arg-type]
        value = getattr(event, field.name)
        if isinstance(value, PrivacyEvent):
            changed[field.name] = bounded_to(value, most)
        elif isinstance(value, tuple):
            changed[field.name] = tuple(bounded_to(part, most) for part in value)
    if isinstance(event, PoissonSampledContributions):
        changed["max_contributions"] = min(most, event.max_contributions)
    return dataclasses.replace(event, **changed)  # type: ignore[type-var]


def fewer_than(most: int) -> Iterator[int]:
    """1, 2, 4, ... below `most`."""
    size = 1
    while size < most:
        yield size
        size *= 2


def _parts(event: PrivacyEvent) -> Iterator[PrivacyEvent]:
    for field in dataclasses.fields(event):  # type: ignore[arg-type]
        value = getattr(event, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, PrivacyEvent):
                yield part
