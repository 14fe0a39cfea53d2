"""Cutting a collated batch into its examples, without knowing what the tensors mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hf_dp.errors import ConfigurationError, explain

# Models broadcast one row of positions over the batch: it belongs to no example, so all get it.
_SHARED_BY_ALL = frozenset({"position_ids"})


class OneExample(dict[str, Any]):
    """A batch of one example, whatever the sizes of its tensors: the patches of all its pictures, say.

    It has one row, which is all of it. Only plain autograd is right for it, so every engine hands it to
    the sequential one.
    """


def batch_size(inputs: Mapping[str, Any]) -> int:
    """How many examples the batch holds.

    Args:
        inputs: What a collator returned: tensors, arrays and lists with one row per example;
            numbers, flags, strings, None and 0-d tensors are settings that all examples share. Or
            `OneExample`.

    Returns:
        The common leading size of every tensor, array and list.

    Raises:
        ConfigurationError: If there is none, or they disagree, or a value cannot be cut.
    """
    if isinstance(inputs, OneExample):
        return 1
    sizes = {name: size for name, value in inputs.items() for size in _leading_sizes(name, value)}
    if not sizes:
        raise ConfigurationError(
            explain(
                "batch",
                sorted(inputs),
                "at least one tensor with a row per example",
                "Gradients are clipped example by example, so the batch must be divisible.",
                "Return tensors such as input_ids and labels from the data collator.",
            )
        )
    if len(set(sizes.values())) > 1:
        raise ConfigurationError(
            explain(
                "batch",
                sorted(sizes),
                "the same number of rows in every tensor",
                "A tensor whose rows are not the examples cannot be attributed to one of them.",
                "Let the data collator return one row per example. Where a model takes the patches of all "
                "pictures in one tensor, as Qwen2-VL does, pass hf_dp.engines.OneExample(batch) for each "
                "example; DPTrainer does so by itself.",
            )
        )
    return next(iter(sizes.values()))


def row(inputs: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The example at `index` as a batch of one: a new dict whose tensors are views."""
    size = batch_size(inputs)
    if not 0 <= index < size:
        raise IndexError("the batch has no such row")
    return rows(inputs, index, index + 1)


def rows(inputs: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The examples from `start` to before `stop` as a smaller batch: a new dict whose tensors are views."""
    if isinstance(inputs, OneExample):
        return OneExample(_the_only(inputs, range(start, stop)))
    return {name: _cut(name, value, slice(start, stop)) for name, value in inputs.items()}


def select_rows(inputs: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """The examples at `indices`, in that order, as a smaller batch: a new dict of copies."""
    batch_size(inputs)
    if isinstance(inputs, OneExample):
        return OneExample(_the_only(inputs, indices))
    return {name: _pick(name, value, list(indices)) for name, value in inputs.items()}


def _the_only(inputs: OneExample, indices: Sequence[int]) -> OneExample:
    if list(indices) != [0]:
        raise IndexError("a batch of one example has one row, which cannot be left out or repeated")
    return inputs


def _leading_sizes(name: str, value: object) -> Iterator[int]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _leading_sizes(name, inner)
    elif _has_rows(name, value):
        yield len(value)  # type: ignore[arg-type]


def _has_rows(name: str, value: object) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0 and not (name in _SHARED_BY_ALL and len(value) == 1)
    if hasattr(value, "__array__") and getattr(value, "shape", None):
        raise ConfigurationError(
            explain(
                f"batch[{name!r}]",
                f"a {type(value).__name__}",
                "a tensor, an array or a list",
                "What is not cut would be given to every example alike, with the others' rows in it.",
                "Let the data collator return a tensor.",
            )
        )
    return isinstance(value, list | tuple)


def _cut(name: str, value: Any, rows: slice) -> Any:
    if isinstance(value, Mapping):
        return {key: _cut(name, inner, rows) for key, inner in value.items()}
    return value[rows] if _has_rows(name, value) else value


def _pick(name: str, value: Any, indices: list[int]) -> Any:
    if isinstance(value, Mapping):
        return {key: _pick(name, inner, indices) for key, inner in value.items()}
    if not _has_rows(name, value):
        return value
    whole = isinstance(value, Tensor | np.ndarray)
    return value[indices] if whole else [value[index] for index in indices]


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in nested mappings, tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from tensors_in(inner)
