"""Data of which no loss can be computed: a run would stop, in words that do not say why."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from hf_dp.errors import ConfigurationError, explain
from hf_dp.training.batches import without_column
from hf_dp.training.own_forward import parameters_of
from hf_dp.training.tasks import unwrapped

_LABELS = ("label", "labels", "label_ids")


def refuse_missing_labels(
    rows: Any, collate: Callable[[list[Any]], Any], names: Iterable[str], column: str | None
) -> None:
    """Refuse rows without a label that the collator does not take as it takes rows with one.

    Tables and lists are looked through; a dataset of one's own is not read for it.

    Args:
        rows: What the loader reads.
        collate: Makes a batch of a row.
        names: Fields of labels, beside the usual ones.
        column: A field that no collator may see, or None.

    Raises:
        ConfigurationError: There is such a row.
    """
    for name in dict.fromkeys((*names, *_LABELS)):
        found = _with_and_without(_values(rows, name))
        if found is not None:
            labelled, bare = (without_column(rows[place], column) for place in found)
            if not _are_taken_alike(labelled, bare, collate):
                raise _missing(name)


def refuse_unread_columns(model: nn.Module, columns: Iterable[str]) -> None:
    """Refuse columns of which the model reads none, where the loss is the one that it returns for them.

    Args:
        model: Its signature is read; one that names nothing, and takes anything, is left alone.
        columns: What the collator makes of an example; only their names are looked at.

    Raises:
        ConfigurationError: The model names none of them.
    """
    inner = unwrapped(model)
    named = parameters_of(inner.forward)
    if named and named.isdisjoint(columns):
        raise ConfigurationError(
            explain(
                "data_collator",
                sorted(columns),
                f"a column that {type(inner).__name__}.forward takes, or example_loss",
                "The loss is the one that the model returns for these columns. Pairs, such as chosen_* and "
                "rejected_*, are not what it takes.",
                "Pass DPTrainer an example_loss, (model, batch) -> (B,), which calls the model on each part, "
                "and set TrainingArguments.remove_unused_columns=False.",
            )
        )


def _values(rows: Any, name: str) -> Sequence[Any]:
    """The labels of every row; none where rows do not say, or all have one."""
    if isinstance(rows, list | tuple):
        return [row.get(name) for row in rows if isinstance(row, Mapping)]
    if name in (getattr(rows, "column_names", None) or ()) and hasattr(rows, "with_format"):
        data = getattr(rows, "data", None)
        if data is None or data.column(name).null_count > 0:
            return list(rows.with_format(None).select_columns([name])[:][name])
    return []


def _with_and_without(values: Sequence[Any]) -> tuple[int, int] | None:
    """The first place with a label and the first without; None where all are alike."""
    bare = [value is None for value in values]
    return (bare.index(False), bare.index(True)) if len(set(bare)) == 2 else None


def _are_taken_alike(labelled: Any, bare: Any, collate: Callable[[list[Any]], Any]) -> bool:
    try:
        one, other = (set(collate([copy.deepcopy(row)])) for row in (labelled, bare))
    except Exception:  # whatever a collator raises may show what rows hold
        return False
    return one == other


def _missing(name: str) -> ConfigurationError:
    return ConfigurationError(
        explain(
            f"train_dataset[{name!r}]",
            None,
            "a label in every row, or a collator that does without",
            "A row that has none stops the run once it is drawn.",
            "Leave such rows out, or label them; -100 stands for no label where a loss ignores it.",
        )
    )
