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


def refuse_other_rows(dataset: Any, rows: Any, column: str) -> None:
    """Refuse rows that may not be those of `dataset`, in its order.

    Args:
        dataset: Whose users are known.
        rows: What the host's loader reads.
        column: Where a row may say whose it is; then each is checked as it is read.

    Raises:
        PrivacyError: A host that reads other rows, or the same in another order.
    """
    if rows is dataset:
        return
    tables = [hasattr(one, "column_names") and hasattr(one, "_data") for one in (dataset, rows)]
    if len(rows) == len(dataset):
        if all(tables) and _in_order(dataset, rows):
            return
        if not any(tables) and isinstance(rows[0], Mapping) and column in rows[0]:
            return
    raise PrivacyError(
        f"train_dataset: expected its rows to be used in their order, found a {type(rows).__name__} of the "
        "host's that may have others. Users are known by the place of their rows. Prepare the data before "
        "it is given to the trainer, and keep a column of it, best the one with the users."
    )


def _in_order(one: Any, other: Any) -> bool:
    """Whether two tables of `datasets` show the same rows, by what they have in common."""
    places = [table._indices for table in (one, other)]
    if (places[0] is None) != (places[1] is None):
        return False
    if places[0] is not None and not places[0].column(0).equals(places[1].column(0)):
        return False
    shared = [name for name in one.column_names if name in other.column_names]
    alike = [_alike(one._data.column(name), other._data.column(name)) for name in shared]
    return True in alike and False not in alike


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
