"""Whether data to evaluate on holds rows of the training data, by where the rows are kept.

Copies are not seen: rows that were mapped, or read from a file again, are kept elsewhere.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from hf_dp.errors import ConfigurationError, explain
from hf_dp.training.same_rows import Table, table_of

_PLAIN = (str, bytes, int, float, complex, bool, type(None))  # may be one object by chance


class Stretch(NamedTuple):
    """Places in one store: all from `start` to `stop`, or `picked` moved by `start`."""

    start: int
    stop: int
    picked: np.ndarray | None

    def places(self) -> np.ndarray:
        return np.arange(self.start, self.stop) if self.picked is None else self.picked + self.start


Kept = tuple[Hashable, Stretch]  # a store, and places in it


def refuse_evaluation(train_dataset: Any, evaluated: Any, nonprivate_metrics: bool) -> None:
    """Refuse to evaluate on training data, whole or in part.

    Args:
        train_dataset: What is protected.
        evaluated: A dataset, a dict of them, or None.
        nonprivate_metrics: Whether exact metrics were asked for; then nothing is refused.

    Raises:
        ConfigurationError: One of them is the training dataset, or has rows in common with it.
    """
    others = evaluated.values() if isinstance(evaluated, Mapping) else [evaluated]
    if nonprivate_metrics or train_dataset is None:
        return
    for other in others:
        if train_dataset is other or getattr(other, "dataset", None) is train_dataset:
            raise _refused("the training dataset")
        if have_rows_in_common(train_dataset, other):
            raise _refused("rows of the training dataset")


def have_rows_in_common(one: Any, other: Any) -> bool:
    """Whether a row of `one` is kept at the same place in memory as a row of `other`."""
    second = _by_store(other)
    first = _by_store(one) if second else {}
    return any(
        bool(np.isin(_all(first[store]), _all(second[store])).any())
        for store in first.keys() & second.keys()
    )


def _by_store(rows: Any) -> dict[Hashable, list[Stretch]]:
    found: dict[Hashable, list[Stretch]] = {}
    for store, stretch in _kept(rows, None):
        found.setdefault(store, []).append(stretch)
    return found


def _all(stretches: list[Stretch]) -> np.ndarray:
    return np.concatenate([stretch.places() for stretch in stretches])


def _kept(rows: Any, chosen: np.ndarray | None) -> Iterator[Kept]:
    """Where rows are kept; of those, only the `chosen` ones."""
    if isinstance(rows, str | Mapping) or not (
        hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    ):
        return
    if isinstance(rows, Subset):
        places = _whole(rows.indices, len(rows.dataset))  # type: ignore[arg-type]
        yield from _kept(rows.dataset, places if chosen is None else places[chosen])
    elif isinstance(rows, ConcatDataset):
        start = 0
        for part in rows.datasets:
            size = len(part)  # type: ignore[arg-type]
            yield from _kept(part, None if chosen is None else _within(chosen, start, size))
            start += size
    elif (table := table_of(rows)) is not None:
        yield from _in_columns(table, chosen)
    else:
        yield from _as_objects(rows, chosen)


def _as_objects(rows: Any, chosen: np.ndarray | None) -> Iterator[Kept]:
    """A list's rows are objects, found again in other lists; anybody's own dataset is one object."""
    if isinstance(rows, list | tuple):
        picked = rows if chosen is None else [rows[place] for place in chosen]
        ids = [id(row) for row in picked if not isinstance(row, _PLAIN)]
        yield "objects", Stretch(0, 0, np.array(ids, dtype=np.int64))
    else:
        yield ("dataset", id(rows)), Stretch(0, len(rows) if chosen is None else 0, chosen)


def _in_columns(table: Table, chosen: np.ndarray | None) -> Iterator[Kept]:
    """A row of a table is kept in its columns' buffers, which slices and selections share."""
    picked = None if table.places is None else table.places.column(0).to_numpy()
    if chosen is not None:
        picked = chosen if picked is None else picked[chosen]
    picked = None if picked is None else np.sort(picked.astype(np.int64))
    for name in table.columns:
        start = 0
        for chunk in table.data.column(name).chunks:
            store = tuple(buffer.address for buffer in chunk.buffers() if buffer is not None)
            size, offset = len(chunk), chunk.offset
            if store and picked is None:
                yield store, Stretch(offset, offset + size, None)
            elif store and picked is not None:
                first, last = np.searchsorted(picked, [start, start + size])
                yield store, Stretch(offset - start, 0, picked[first:last])
            start += size


def _within(chosen: np.ndarray, start: int, size: int) -> np.ndarray:
    return chosen[(chosen >= start) & (chosen < start + size)] - start


def _whole(indices: Any, size: int) -> np.ndarray:
    """Indices as an array, those from the end counted from the beginning."""
    places = np.asarray(indices, dtype=np.int64)
    return np.where(places < 0, places + size, places)


def _refused(found: str) -> ConfigurationError:
    return ConfigurationError(
        explain(
            "eval_dataset",
            found,
            "data held out from training",
            "Evaluation metrics are exact, so they would leak the protected examples.",
            "Hold some examples out, for instance with train_test_split, or set "
            "DPArguments.nonprivate_metrics=True.",
        )
    )
