"""Whose the training examples are: read once per dataset, and turned into rows at every draw."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from hf_dp.coins import Coins
from hf_dp.errors import ConfigurationError, explain
from hf_dp.sampling.users import Users, plain_ids
from hf_dp.training.arguments import DPArguments
from hf_dp.training.batches import Draw
from hf_dp.training.same_rows import SameOwners, refuse_other_rows

logger = logging.getLogger(__name__)


class Ownership:
    """The users of a trainer's data, where users are protected."""

    def __init__(self, dp_args: DPArguments, ids: Sequence[Any] | None, first: Any) -> None:
        """Read the users of `first`, the dataset as it is given, before the host works on it.

        Args:
            dp_args: Whether users are protected, and the column that tells them.
            ids: The user of each example, in place of a column.
            first: A dataset, or None.

        Raises:
            ConfigurationError: `ids` are given where single examples are protected.
        """
        self.dp_args = dp_args
        self.ids = ids
        if ids is not None and not self.protects:
            raise ConfigurationError(
                explain(
                    "DPTrainer.users",
                    type(ids).__name__,
                    f"None with privacy_unit={dp_args.privacy_unit!r}",
                    "Single examples are protected, whoever owns them.",
                    "Set DPArguments(privacy_unit='user'), or leave it out.",
                )
            )
        self._known: tuple[Any, Users] | None = None
        self._seen: list[Any] | None = None  # the column, where rows have it
        self._given = first if self.protects else None  # as it was before the host worked on it
        self._early = None if ids is not None or not self.protects else self._column(first)

    @property
    def protects(self) -> bool:
        """Whether all examples of a user are protected together."""
        return self.dp_args.privacy_unit == "user"

    @property
    def column(self) -> str | None:
        """The column that neither collator nor model may see."""
        return self.dp_args.user_column if self.protects else None

    def of(self, dataset: Any) -> Users | None:
        """Who owns which example of `dataset`; None where single examples are protected.

        Raises:
            ConfigurationError: It is not known, or not for every example; see `Users.of`.
        """
        if not self.protects:
            return None
        known = self._known
        if known is None or known[0] is not dataset or known[1].num_examples != len(dataset):
            if known is not None and self.ids is not None and len(dataset) == len(self.ids):
                raise _other_dataset(type(self.ids).__name__)
            known = self._known = (dataset, self._read(dataset))
        return known[1]

    def check_of(self, dataset: Any, rows: Any) -> SameOwners | None:
        """What each row is checked by as it is read; None where that is not needed, or not possible.

        Args:
            dataset: Whose users are known.
            rows: The same as the loader reads it.

        Raises:
            PrivacyError: They may not be the same.
        """
        if self.of(dataset) is None:
            return None
        column = self.dp_args.user_column
        refuse_other_rows(dataset, rows, None if self._seen is None else column)
        return None if self._seen is None else SameOwners(column, self._seen)

    def _read(self, dataset: Any) -> Users:
        ids, early, given = self.ids, self._early, self._given
        self._early = self._given = None  # for the host's own version, and for no other
        read = None if ids is not None else early if dataset is given else self._column(dataset)
        by_place = ids is not None or (early is not None and read is None)
        if by_place and given is not None and len(given) == len(dataset):
            refuse_other_rows(given, dataset, None)
        if ids is not None:
            return Users.of(ids, len(dataset), owner="DPTrainer.users", shown=type(ids).__name__)
        self._seen = None if read is None else plain_ids(read)
        ids = early if read is None else read
        column = self.dp_args.user_column
        if ids is None:
            raise ConfigurationError(
                explain(
                    "DPArguments.user_column",
                    column,
                    "a column of train_dataset",
                    "It tells which examples belong to the same user.",
                    "Name the column with the ids, or pass users= to DPTrainer, one id per example.",
                )
            )
        return Users.of(ids, len(dataset), owner="DPArguments.user_column", shown=column)

    def _column(self, dataset: Any) -> list[Any] | None:
        """The ids in `dataset`, or None where it has no such column."""
        name = self.dp_args.user_column
        if not _has_rows(dataset):
            return None
        if hasattr(dataset, "column_names") and hasattr(dataset, "with_format"):
            if name not in dataset.column_names:
                return None
            plain = dataset.with_format(None).select_columns([name])  # past every transform
            return list(plain[:][name])
        if (
            dataset is None
            or not hasattr(dataset, "__getitem__")
            or not hasattr(dataset, "__len__")
        ):
            return None
        ids = []
        for index in range(len(dataset)):
            row = dataset[index]
            if not isinstance(row, Mapping) or (index == 0 and name not in row):
                return None
            ids.append(row.get(name))
        return ids

    def examples_of(
        self, dataset: Any, rows: Any, length_key: str, coins: Coins
    ) -> Callable[[list[int]], Draw]:
        """What turns a draw into rows of the data.

        Args:
            dataset: Whose users are asked for.
            rows: The same as the loader reads it.
            length_key: The field whose length counts, where the longest examples are kept.
            coins: For examples that are chosen at random.
        """
        users, given = self.of(dataset), self.dp_args
        if users is None:
            return Draw
        if given.draws_users or given.max_examples_per_user is None:
            return WholeUsers(users, given.max_examples_per_user, coins)
        lengths = _lengths(rows, length_key) if given.user_selection == "longest" else None
        return Contributions(
            users.bounded(given.max_examples_per_user, given.user_selection, coins, lengths)
        )

    def num_cut(self, dataset: Any) -> int | None:
        """How many users have more examples than `max_examples_per_user`; None where nothing is cut."""
        users, most = self.of(dataset), self.dp_args.max_examples_per_user
        return None if users is None or most is None else users.num_cut(most)

    def claimed(self, users: Users | None) -> dict[str, Any] | None:
        """What of the users is public, for the claim; None where single examples are protected."""
        if users is None:
            return None
        given, most = self.dp_args, self.dp_args.max_examples_per_user
        claimed = {"sampling": given.user_sampling, "max_examples_per_user": most}
        if given.draws_users or most is None:
            return {**claimed, "reduction": given.user_reduction}
        return {**claimed, "selection": given.user_selection, "kept_examples": users.num_kept(most)}


def _other_dataset(shown: str) -> ConfigurationError:
    return ConfigurationError(
        explain(
            "DPTrainer.users",
            shown,
            "the train_dataset that it was given with",
            "Ids belong to examples by their place, and another data set, or another order of the same, "
            "has others there.",
            "Put the ids in a column (DPArguments.user_column), or make a new trainer.",
        )
    )


class WholeUsers:
    """Turns drawn users into examples, fresh ones at every draw."""

    def __init__(self, users: Users, most: int | None, coins: Coins) -> None:
        """Each brings `most` examples at most; None for all."""
        self.users = users
        self.most = most
        self.coins = coins

    def __call__(self, drawn: list[int]) -> Draw:
        """The rows of the drawn users, one after the other."""
        own = [self.users.fresh(user, self.most, self.coins) for user in drawn]
        rows = Draw(row for brought in own for row in brought)
        rows.sizes = tuple(map(len, own))
        return rows


class Contributions:
    """Turns places among the kept examples into examples.

    What users keep is chosen anew where training is resumed. That costs nothing: what a step guarantees
    holds for any examples that were chosen by a user's own data and fresh coins, as long as they are at
    most so many; and steps are composed one by one, whatever the choice before was.
    """

    def __init__(self, kept: np.ndarray) -> None:
        """Draw from `kept`, examples of which no user owns more than is accounted for."""
        self.kept = kept

    def __call__(self, drawn: list[int]) -> Draw:
        """The rows at these places."""
        return Draw(int(self.kept[place]) for place in drawn)


def _has_rows(dataset: Any) -> bool:
    """Whether it is a map-style dataset; the host, or a later check, refuses any other."""
    if isinstance(dataset, IterableDataset | Mapping):
        return False
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def announce_users(dp_args: DPArguments, rows: int, max_tokens: int | None) -> None:
    """Say aloud where most users are larger than a micro-batch, which makes training slow."""
    most = dp_args.max_examples_per_user
    if dp_args.draws_users and max_tokens is None and most is not None and most > rows:
        logger.warning(
            "hf_dp: a user with more than %d examples in a batch is taken alone, one after the other, since "
            "micro-batches are no larger: exact, but slow. For speed let per_device_train_batch_size be at "
            "least max_examples_per_user (%d).",
            rows,
            most,
        )


def given_dataset(
    host: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    name: str = "train_dataset",
) -> Any | None:
    """The training data, or other data, among the arguments of a host's constructor."""
    try:
        named = inspect.signature(host).bind_partial(*args, **kwargs).arguments
    except TypeError:  # the host will say it better
        return None
    return named.get(name, kwargs.get(name))


def _lengths(rows: Any, key: str) -> np.ndarray:
    """The length of every example, as the collator would find it."""
    try:
        return np.fromiter((len(rows[place][key]) for place in range(len(rows))), np.int64)
    except (TypeError, KeyError, IndexError):
        raise ConfigurationError(
            explain(
                "DPArguments.user_selection",
                "longest",
                f"examples with a field {key!r} that has a length",
                "Without it nobody knows which examples are longest.",
                "Tokenize the dataset before training, or choose user_selection='random'.",
            )
        ) from None
