"""Who owns which example, and which of a user's examples are used: a few of many, drawn fairly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from torch import Tensor

from hf_dp._validate import one_of, positive_integer
from hf_dp.coins import Coins
from hf_dp.errors import ConfigurationError, explain
from hf_dp.sampling._uniform import Indices, uniform_subset

Selection = Literal["random", "longest", "first"]
SELECTIONS = ("random", "longest", "first")

_NOTHING = frozenset({"", "nan", "None", "NaT", "<NA>"})  # as text
_SEVERAL = (list, tuple, set, frozenset, np.ndarray, Tensor)


@dataclass(frozen=True, eq=False, repr=False)
class Users:
    """Which examples belong to which user. PRIVATE: nothing but the number of users may be shown.

    Attributes:
        examples: All examples, one user's after the other's, each user's in their own order, ``(n,)``.
        starts: Where each user's begin, and the end of the last, ``(num_users + 1,)``.

    Guarantees:
        * What is chosen of a user's examples depends on that user's data and fresh coins alone.
    """

    examples: Indices
    starts: Indices

    @classmethod
    def of(cls, ids: Iterable[object], num_examples: int, *, owner: str, shown: object) -> Self:
        """Group examples by the id of their user.

        Args:
            ids: One id per example; examples with equal ids belong to the same user.
            num_examples: How many there must be.
            owner: The argument that messages name, "DPTrainer.users" for example.
            shown: What they show of it; never an id.

        Raises:
            ConfigurationError: An id is missing or cannot be compared, an example has several owners,
                there are more or fewer ids than examples, or one user owns everything.
        """
        _check_sequence(ids, owner, shown)
        values = plain_ids(ids)
        if len(values) != num_examples:
            raise ConfigurationError(
                explain(
                    owner,
                    shown,
                    "one id for each example of train_dataset",
                    "An example without a user could be protected with nobody's.",
                    "Give as many ids as train_dataset has examples, in their order.",
                )
            )
        kinds = set(map(type, values)) - {type(None)}
        _check_kinds(kinds, owner, shown)
        number = {value: place for place, value in enumerate(dict.fromkeys(values))}
        _check_missing(number, owner, shown)
        _check_mixture(kinds, owner, shown)
        if len(number) < 2:
            raise ConfigurationError(
                explain(
                    owner,
                    shown,
                    "the examples of at least two users",
                    "One user owns everything, and nothing that is learned from one user alone can be "
                    "hidden.",
                    "Give every example the id of its own user, or protect single examples with "
                    "privacy_unit='example'.",
                )
            )
        codes = np.fromiter(map(number.__getitem__, values), np.int64, len(values))
        counts = np.bincount(codes, minlength=len(number))
        return cls(
            np.argsort(codes, kind="stable"), np.concatenate(([0], np.cumsum(counts))).astype(int)
        )

    @property
    def num_users(self) -> int:
        """Different ids."""
        return len(self.starts) - 1

    @property
    def num_examples(self) -> int:
        """Examples of all users."""
        return len(self.examples)

    def num_kept(self, most: int) -> int:
        """Examples that are left where each user keeps at most `most`."""
        return int(np.minimum(np.diff(self.starts), most).sum())

    def num_cut(self, most: int) -> int:
        """Users with more than `most` examples."""
        return int((np.diff(self.starts) > most).sum())

    def fresh(self, user: int, most: int | None, coins: Coins) -> list[int]:
        """At most `most` different examples of a user, each such set equally likely; None for all."""
        own = self.examples[self.starts[user] : self.starts[user + 1]]
        size = len(own) if most is None else min(most, len(own))
        return [int(example) for example in own[uniform_subset(size, len(own), coins)]]

    def bounded(
        self,
        most: int,
        selection: str,
        coins: Coins,
        lengths: Sequence[int] | Indices | None = None,
    ) -> Indices:
        """Examples of which each user owns at most `most`, in increasing order.

        Args:
            most: Kept of one user, > 0.
            selection: "random", "longest" or "first" (in the order of the data).
            coins: Draw the random ones.
            lengths: Of every example, for "longest".

        Raises:
            ConfigurationError: `most` or `selection` is none, or lengths are missing.
        """
        positive_integer(
            "Users.bounded.most", most, "It bounds a user's part of the data.", "Use at least 1."
        )
        one_of("Users.bounded.selection", selection, SELECTIONS, "It says which examples are kept.")
        order = self.examples
        if selection == "random":
            order = self._shuffled(coins)
        elif selection == "longest":
            if lengths is None or len(lengths) != self.num_examples:
                raise ConfigurationError(
                    "Users.bounded.lengths: expected the length of every example. Only they tell which "
                    "are longest. Pass lengths, or choose selection='random'."
                )
            size = np.asarray(lengths, dtype=np.int64)
            order = self.examples[np.lexsort((-size[self.examples], self._owners()))]
        place = np.arange(self.num_examples) - self.starts[self._owners()]
        return np.sort(order[place < most])

    def _owners(self) -> Indices:
        """The user of each of `examples`, ``(n,)``."""
        owners: Indices = np.repeat(np.arange(self.num_users), np.diff(self.starts))
        return owners

    def _shuffled(self, coins: Coins) -> Indices:
        """`examples` with each user's in an order of which all are equally likely."""
        owners = self._owners()
        while True:
            keys = coins.bits(self.num_examples)
            order = np.lexsort((keys, owners))
            tied = (keys[order][1:] == keys[order][:-1]) & (owners[1:] == owners[:-1])
            if not tied.any():  # else a tie, which must not favour the first
                shuffled: Indices = self.examples[order]
                return shuffled


def _check_sequence(ids: object, owner: str, shown: object) -> None:
    if isinstance(ids, str | bytes | dict) or not hasattr(ids, "__iter__"):
        raise ConfigurationError(
            explain(
                owner,
                shown,
                "a sequence with one id for each example",
                "It tells which examples are protected together.",
                "Pass a list, an array, or the name of a column as user_column.",
            )
        )


def plain_ids(ids: Any) -> list[Any]:
    """The ids as Python's own values; tensors and arrays would compare by identity, or not at all."""
    for convert in ("to_pylist", "tolist"):  # of pyarrow, of numpy and others
        if hasattr(ids, convert):
            ids = getattr(ids, convert)()
            break
    values = list(ids)
    kinds = {type(value) for value in values}
    if any(hasattr(kind, "as_py") for kind in kinds):
        values = [value.as_py() if hasattr(value, "as_py") else value for value in values]
    if kinds & {Tensor, np.ndarray}:
        values = [value.item() if _is_scalar(value) else value for value in values]
    return values


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor | np.ndarray) and value.ndim == 0


def _check_kinds(kinds: set[type], owner: str, shown: object) -> None:
    if any(issubclass(kind, _SEVERAL) for kind in kinds):
        raise ConfigurationError(
            explain(
                owner,
                shown,
                "one user for each example",
                "An example of several users is part of what each of them is protected by, which "
                "clipping user by user does not bound.",
                "Keep examples with one user only, or give those that share examples one common id, so "
                "that they are protected together.",
            )
        )
    for kind in kinds:
        by_value: Any = kind.__hash__  # None where there is none, object's where identity counts
        if by_value is None or by_value is object.__hash__:
            raise ConfigurationError(
                explain(
                    owner,
                    shown,
                    "ids that can be hashed and compared by value, such as numbers or strings",
                    f"Of {kind.__name__} nobody could say whether two examples have the same user.",
                    "Turn the ids into strings.",
                )
            )


def _check_mixture(kinds: set[type], owner: str, shown: object) -> None:
    if len({issubclass(kind, str) for kind in kinds}) == 2:
        raise ConfigurationError(
            explain(
                owner,
                shown,
                "ids of one kind, either strings or not",
                "The same user, once by a string and once by a number, would be protected as two.",
                "Turn all ids into strings.",
            )
        )


def _check_missing(found: Iterable[Any], owner: str, shown: object) -> None:
    if any(_is_missing(value) for value in found):
        raise ConfigurationError(
            explain(
                owner,
                shown,
                "an id for every example",
                "An id that is missing (None, NaN, an empty string, or the text of nothing: 'nan', 'None', "
                "'NaT', '<NA>') does not tell with whom the example is protected.",
                "Leave such examples out, or give them an id of their own if they have no other; whoever "
                "bears such a name needs another id.",
            )
        )


def _is_missing(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, str | bytes):
        text = value if isinstance(value, str) else value.decode(errors="replace")
        return text.strip() in _NOTHING
    try:
        return bool(value != value)  # NaN, and what stands for no time
    except (TypeError, ValueError):  # what pandas uses for nothing refuses to be compared
        return True
