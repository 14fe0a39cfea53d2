"""Whether the rows that training reads are the rows whose users are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_dp.errors import PrivacyError
from hf_dp.sampling.users import plain_ids


@dataclass(frozen=True)
class SameOwners:
    """Checks each row, as it is read, against the user that it had when users were told apart.

    Attributes:
        column: Where a row says whose it is; rows that do not say it are not checked.
        ids: The user of each row, then.
    """

    column: str
    ids: Sequence[Any]

    def __call__(self, index: int, row: Any) -> None:
        """Refuse a row of another user.

        Raises:
            PrivacyError: The data was put in another order, or does not always give the same row.
        """
        if not isinstance(row, Mapping) or self.column not in row:
            return
        [now] = plain_ids([row[self.column]])
        if now != self.ids[index]:
            raise PrivacyError(
                "train_dataset: expected rows that keep their place and their user from the moment the "
                f"trainer reads {self.column!r}. Another user's row came up, so a user's examples would not "
                "be clipped as one. Do not reorder the data afterwards, nor draw rows at random inside it."
            )


def refuse_other_rows(dataset: Any, rows: Any, column: str | None) -> None:
    """Refuse rows that may not be those of `dataset`, in its order.

    Args:
        dataset: Whose users are known.
        rows: What the host's loader reads.
        column: Where a row may say whose it is, if each is then checked as it is read; None if not.

    Raises:
        PrivacyError: A host that reads other rows, or the same in another order.
    """
    if rows is dataset:
        return
    one, other = table_of(dataset), table_of(rows)
    if len(rows) == len(dataset):
        if one is not None and other is not None and one.shows_the_rows_of(other):
            return
        named = column is not None and isinstance(rows[0], Mapping) and column in rows[0]
        if one is None and other is None and named:
            return
    raise PrivacyError(
        f"train_dataset: expected its rows to be used in their order, found a {type(rows).__name__} of the "
        "host's that may have others. Users are known by the place of their rows. Prepare the data before "
        "it is given to the trainer, and keep a column of it, best the one with the users."
    )


@dataclass(frozen=True)
class Table:
    """What a dataset of `datasets` shows: places in columns of Arrow.

    Attributes:
        columns: Names.
        data: The columns.
        places: Which rows of them, in which order; None for all in theirs.
    """

    columns: Sequence[str]
    data: Any
    places: Any

    def shows_the_rows_of(self, other: Table) -> bool:
        """Whether both show the same rows in the same order, by the columns that they have in common."""
        if (self.places is None) != (other.places is None):
            return False
        if self.places is not None and not self.places.column(0).equals(other.places.column(0)):
            return False
        shared = [name for name in self.columns if name in other.columns]
        alike = [_alike(self.data.column(name), other.data.column(name)) for name in shared]
        return True in alike and False not in alike


def table_of(rows: Any) -> Table | None:
    """The parts of a table of `datasets`; None for other data.

    The places are no part of its public interface. A version that has them elsewhere gives None, so that
    rows are refused unless each names its user.
    """
    columns, data = getattr(rows, "column_names", None), getattr(rows, "data", None)
    if columns is None or not hasattr(data, "column") or not hasattr(rows, "_indices"):
        return None
    return Table(columns, data, rows._indices)


def _alike(one: Any, other: Any) -> bool | None:
    """Whether two columns are equal; None where that does not show, as nan is unlike itself."""
    if one.equals(other):
        return True
    kind = str(one.type)
    if "float" not in kind and "double" not in kind:
        return False
    if kind not in ("float", "double", "halffloat") or other.type != one.type:
        return None
    return bool(np.array_equal(one.to_numpy(), other.to_numpy(), equal_nan=True))
