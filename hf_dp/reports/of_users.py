"""What a report says where all examples of a user are protected together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TRUSTED = (
    "The examples of a user are those with the same id, and ids are trusted: who appears under two ids is "
    "protected as two users, and what others wrote about a person is not protected with that person."
)


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


def fewer_than(most: int) -> Iterator[int]:
    """1, 2, 4, ... below `most`."""
    size = 1
    while size < most:
        yield size
        size *= 2
