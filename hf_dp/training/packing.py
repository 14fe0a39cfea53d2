"""From a draw of users to micro-batches that hold each of them whole."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_dp.engines.owners import Owners, UserReduction
from hf_dp.training.batches import LogicalBatch, LogicalBatchCollator, OwnedRows
from hf_dp.training.joining import differ_in_size, join

APART = "collated apart"
"""The one field of a micro-batch whose examples stay apart: their batches."""

_User = list[Mapping[str, Any]]


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
        alike: dict[Hashable, list[_User]] = defaultdict(list)
        for user in _users(examples):
            rows = self._collated(user)
            if not rows:
                continue
            kinds = set(map(self._kind, rows))
            alike[kinds.pop() if len(kinds) == 1 else id(rows)].append(rows)
        packs = list(itertools.chain.from_iterable(map(self._packs, alike.values())))
        owned = [self._owned(pack) for pack in packs]
        together = [[row for user in pack for row in user] for pack in packs]
        batches = [self._joined(pack) for pack in together]
        alone = [
            pack if differ_in_size(pack) and not apart(batch) else None
            for pack, batch in zip(together, batches, strict=True)
        ]
        return LogicalBatch(batches, getattr(examples, "place", None), owned, alone)

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

    def _joined(self, rows: _User) -> Mapping[str, Any]:
        kinds = set(map(self._kind, rows))
        if len(rows) > 1 and (self.one_by_one or len(kinds) > 1):
            return {APART: rows}
        return join(rows, self.fills)

    def _longest(self, users: list[_User]) -> int:
        return max(self._length(row) for user in users for row in user)


def _users(examples: list[Any]) -> list[list[Any]]:
    """The rows of each drawn user."""
    users, start = [], 0
    for size in getattr(examples, "sizes", None) or ():
        users.append(list(examples[start : start + size]))
        start += size
    return users


def apart(inputs: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The batches of examples that stay apart; None in an ordinary micro-batch."""
    return inputs.get(APART)
