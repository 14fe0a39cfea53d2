"""From a draw of users to micro-batches that hold each of them whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_dp.engines.owners import Owners, UserReduction
from hf_dp.training.batches import LogicalBatch, LogicalBatchCollator, OwnedRows

APART = "collated apart"
"""The one field of a micro-batch of one user whose examples were collated each by itself: their batches."""

_User = list[Any]


@dataclass(eq=False)
class UserCollator(LogicalBatchCollator):
    """Packs whole users into micro-batches; one who is too large for any has one alone.

    Users with as many examples stand together, and among them those with examples of like length. What
    a user is packed with changes no user's share, as each is clipped as one.

    Attributes:
        reduction: How a user's losses make one.
    """

    reduction: UserReduction = "mean"

    def __call__(self, examples: list[Any]) -> LogicalBatch:
        """Collate one draw; an empty one gives no micro-batch."""
        packs = list(self._packs(_users(examples)))
        owned = [self._owned(pack) for pack in packs]
        batches = [self._collated_users(pack) for pack in packs]
        if batches and not self.one_by_one:
            ordered = sorted(examples, key=self._length, reverse=True)
            self._require_marked_padding(ordered, batches)
        return LogicalBatch(batches, getattr(examples, "place", None), owned)

    def _packs(self, users: list[_User]) -> Iterator[list[_User]]:
        """Users that go together, none of them in two packs."""
        pack: list[_User] = []
        for user in sorted(
            users, key=lambda user: (len(user), self._longest([user])), reverse=True
        ):
            more = [*pack, user]
            if pack and sum(map(len, more)) > self._at_once(self._longest(more)):
                yield pack
                more = [user]
            pack = more
        if pack:
            yield pack

    def _owned(self, pack: list[_User]) -> OwnedRows:
        sizes = tuple(map(len, pack))
        return OwnedRows(Owners(sizes, self.reduction), self._at_once(self._longest(pack)))

    def _collated_users(self, pack: list[_User]) -> Any:
        rows = [row for user in pack for row in user]
        if self.one_by_one and len(rows) > 1:
            return {APART: [self._collated([row]) for row in rows]}
        return self._collated(rows)

    def _longest(self, users: list[_User]) -> int:
        return max(self._length(row) for user in users for row in user)


def _users(examples: list[Any]) -> list[_User]:
    """The rows of each drawn user."""
    users, start = [], 0
    for size in getattr(examples, "sizes", None) or ():
        users.append(list(examples[start : start + size]))
        start += size
    return users


def apart(inputs: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The batches of examples that were collated each by itself; None in an ordinary micro-batch."""
    return inputs.get(APART)
