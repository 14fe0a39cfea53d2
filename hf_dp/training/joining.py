"""Micro-batches out of batches of one example each: a data collator never sees two examples together.

So it cannot mix them, nor cut, pad, scale or name the columns of one by what another holds. Examples whose
columns are alike are put one under the other; those that are shorter are filled up on the right where
``attention_mask`` marks it, in the columns in which the collator itself fills up. Others stay apart, and
so does an example whose mask is another than those of the made-up examples on which padding was tried:
where nothing is attended to, attention is spread over all positions, padding included.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_dp.engines.rows import OneExample, batch_size
from hf_dp.training.padding import padded_on_the_left
from hf_dp.training.positions import axis_of
from hf_dp.training.positions import width_of as width_in
from hf_dp.training.reductions import IGNORED

logger = logging.getLogger(__name__)

Collator = Callable[[list[Any]], Any]
Fills = Mapping[str, int | float]
"""Column -> what shorter examples are filled up with."""

MASK, TARGET_MASK = "attention_mask", "decoder_attention_mask"
USUAL_FILLS: Fills = {
    "input_ids": 0,
    "token_type_ids": 0,
    "position_ids": 0,
    "labels": IGNORED,
    "decoder_input_ids": 0,
    TARGET_MASK: 0,
    MASK: 0,
}
"""Where no collator says otherwise; that it does not matter which is tried before training."""

_FIXED = frozenset({"labels", TARGET_MASK, MASK})  # nothing else marks what is no example's
_TARGETS = ("labels", "decoder_input_ids")
_OF_THE_TARGET = frozenset({*_TARGETS, TARGET_MASK})


@dataclass(frozen=True)
class Tried:
    """What was tried of padding: examples that differ from that are not filled up.

    Attributes:
        least: Positions of the shortest example.
        translates: Whether targets have lengths of their own; else they are as long as the text.
        closing: A token of which examples that are taken together must have as many; None for none.
        most: Positions of the longest; None for any.
    """

    least: int = 1
    translates: bool = True
    closing: int | None = None
    most: int | None = None

    def may_be_filled_up(self, batch: Mapping[str, Any]) -> bool:
        """Whether an example is covered, and not too long."""
        width = width_in(batch)
        return self.covers(batch) and (self.most is None or width is None or width <= self.most)

    def covers(self, batch: Mapping[str, Any]) -> bool:
        """Whether an example's masks are ones and then zeros, if anything, as made-up examples' are."""
        axis = axis_of(batch)
        marks = ((MASK, axis + 1, self.least), (TARGET_MASK, 2, 1))
        return all(
            marks_a_beginning(mask, least)
            for name, dims, least in marks
            if isinstance(mask := batch.get(name), Tensor) and mask.dim() == dims
        )


def marks_a_beginning(mask: Tensor, least: int = 1) -> bool:
    """Whether each row of a mask, ``(..., T)``, begins with as many ones, and the rest is zeros."""
    counts = (mask == 1).sum(-1, keepdim=True)
    expected = (torch.arange(mask.shape[-1], device=mask.device) < counts).to(mask.dtype)
    return torch.equal(mask, expected) and bool((counts >= least).all())


def fills_of(collate: Collator, item: Any) -> dict[str, int | float]:
    """What a collator fills columns up with, seen where it batches an example with its double.

    Args:
        collate: The data collator; here alone it sees two examples, of which one is made up.
        item: An example; of the result nothing but the padding is looked at.
    """
    try:
        alone = collate([copy.deepcopy(item)])
        both = collate([copy.deepcopy(item), _doubled(copy.deepcopy(item))])
        found = {name: _fill(alone[name], both[name], both) for name in alone}
    except Exception as error:  # a foreign collator may want anything
        logger.debug("the collator's padding is not known: %s", type(error).__name__)
        return {}
    return {name: f for name, f in found.items() if f is not None and name not in _FIXED}


def kind_of(batch: Mapping[str, Any], fills: Fills, tried: Tried | None = None) -> Hashable:
    """What two batches of one example have in common if `join` may put them together."""
    if isinstance(batch, OneExample):
        return id(batch)
    tried = tried or Tried()
    if not tried.may_be_filled_up(batch):
        fills = {}
    columns = sorted(batch.items())
    kinds = tuple((name, _kind(name, value, batch, fills, tried)) for name, value in columns)
    return type(batch), kinds, _count(tried.closing, batch.get("input_ids"))


def join(batches: Sequence[Mapping[str, Any]], fills: Fills) -> Mapping[str, Any]:
    """One batch of all the examples, in their order.

    Args:
        batches: Of one example each and of one kind (`kind_of`).
        fills: For columns along which examples differ in length.
    """
    if len(batches) == 1:
        return batches[0]
    joined: Any = copy.copy(batches[0])
    for name in batches[0]:
        joined[name] = _joined([batch[name] for batch in batches], fills.get(name, 0))
    return joined  # type: ignore[no-any-return]


def differ_in_size(batches: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `join` fills some of them up."""
    sizes = (
        {n: v.shape[1:] for n, v in batch.items() if isinstance(v, Tensor)} for batch in batches
    )
    first = next(sizes)
    return any(size != first for size in sizes)


def width_of(batch: Mapping[str, Any], key: str) -> int:
    """Positions of an example, by the model's main input or else by its mask; 0 where it has none.

    Those of all its texts, where it has several to choose from.
    """
    for name in (key, MASK):
        value = batch.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[1:][: axis_of(batch)].numel()
    return 0


def as_one_example(batch: Any, key: str) -> Any:
    """`batch`, marked as `OneExample` if it has one main input and other tensors have other numbers of rows.

    Args:
        batch: What a collator made of one example: all of it is that example's.
        key: The model's main input.
    """
    main = batch.get(key) if isinstance(batch, Mapping) else None
    if not isinstance(main, Tensor) or main.dim() < 2 or len(main) != 1:
        return batch
    rows = [len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim() > 0]
    return OneExample(batch) if set(rows) != {1} else batch


def is_blank(example: Any, key: str) -> bool:
    """Whether an item of the dataset has no position: an empty line, say, that a tokenizer leaves empty.

    Args:
        example: As the collator gets it.
        key: The model's main input; where the example has none, all of its sequences must be empty.
    """
    if not isinstance(example, Mapping):
        return False
    named = {key: example[key]} if key in example else example
    sized: list[Any] = [
        v for v in named.values() if isinstance(v, Sized) and getattr(v, "ndim", 1) > 0
    ]
    sizes = [sum(map(len, value)) if _is_nested(value) else len(value) for value in sized]
    return bool(sizes) and not any(sizes)


def has_no_positions(batch: Mapping[str, Any], key: str) -> bool:
    """Whether there is nothing to compute a loss of in a collated batch, or nothing is attended to.

    Args:
        batch: Of one example or several.
        key: The model's main input.
    """
    columns = [v for v in map(batch.get, (key, MASK, *_TARGETS)) if isinstance(v, Tensor)]
    if any(value.dim() >= 2 and value.numel() == 0 for value in columns):
        return True
    return not bool(attended(batch).any())


def attended(batch: Mapping[str, Any]) -> Tensor:
    """Which examples, ``(B,)``, have a position that the model attends to, in each text to choose from."""
    mask = batch.get(MASK)
    if not isinstance(mask, Tensor) or mask.dim() != axis_of(batch) + 1:
        return torch.ones(batch_size(batch), dtype=torch.bool)
    return (mask != 0).any(-1).flatten(1).all(1) if mask.dim() > 2 else (mask != 0).any(-1)


def ignores_all(labels: Any) -> bool:
    """Whether targets, as a dataset or a collator gives them, are none, or ignored ones only."""
    if isinstance(labels, Tensor):
        return labels.dim() > 0 and bool((labels == IGNORED).all())
    sequence = isinstance(labels, list | tuple | np.ndarray)
    return sequence and bool((np.asarray(labels, dtype=object) == IGNORED).all())


def with_a_position(batch: Mapping[str, Any], padding: int | None) -> Mapping[str, Any]:
    """A batch of nothing but empty lines with one masked position in each; any other as it is.

    Args:
        batch: Collated.
        padding: The model's padding token.
    """
    empty = {n: v for n, v in batch.items() if isinstance(v, Tensor) and v.shape[1:] == (0,)}
    if "input_ids" not in empty:
        return batch
    fills = {**USUAL_FILLS, "input_ids": padding or 0}
    made = {n: empty[n].new_full((len(empty[n]), 1), fills[n]).long() for n in fills if n in empty}
    return {**batch, **made}


def _count(token: int | None, ids: Any) -> int:
    return int((ids == token).sum()) if token is not None and isinstance(ids, Tensor) else 0


def _kind(name: str, value: Any, batch: Mapping[str, Any], fills: Fills, tried: Tried) -> Hashable:
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            return id(value)
        if value.dim() == 0:
            return value.dtype, value.device, value.item()
        free = _is_filled_up(name, value, batch, fills, tried)
        axis = axis_of(batch) if free else 0
        others = (*value.shape[1:axis], None, *value.shape[axis + 1 :]) if free else value.shape[1:]
        return value.dtype, value.device, others
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape[1:]
    if isinstance(value, Mapping):
        return kind_of(value, {})
    if isinstance(value, list | tuple):
        return type(value)
    return type(value), value if isinstance(value, Hashable) else id(value)


def _is_filled_up(
    name: str, value: Tensor, batch: Mapping[str, Any], fills: Fills, tried: Tried
) -> bool:
    mask, axis = batch.get(MASK), axis_of(batch)
    if not isinstance(mask, Tensor) or mask.dim() != axis + 1 or value.dim() < mask.dim():
        return False
    if name not in fills or (name == "labels" and value.is_floating_point()):
        return False
    if tried.translates and name in _OF_THE_TARGET:
        return True
    return value.shape[: axis + 1] == mask.shape


def _joined(values: Sequence[Any], fill: int | float) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        if first.dim() == 0:
            return first
        if all(value.shape == first.shape for value in values):
            return torch.cat(list(values))
        sizes = [max(along) for along in zip(*(value.shape[1:] for value in values), strict=True)]
        made = first.new_full((len(values), *sizes), fill)
        for row, value in zip(made, values, strict=True):
            row[tuple(map(slice, value.shape[1:]))] = value[0]
        return made
    if isinstance(first, np.ndarray):
        return np.concatenate(values) if first.ndim else first
    if isinstance(first, Mapping):
        return join(values, {})
    if isinstance(first, list | tuple):
        return [one for value in values for one in value]
    return first


def _fill(one: Any, two: Any, batch: Mapping[str, Any]) -> int | float | None:
    """The one value that stands behind, or before, the first example where the second is longer."""
    axis, mask = axis_of(batch), batch.get(MASK)
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return None
    if not axis < one.dim() == two.dim() or two.shape[axis] <= one.shape[axis]:
        return None
    left = False
    if isinstance(mask, Tensor) and mask.dim() == axis + 1:
        left = padded_on_the_left(mask[:1].flatten(0, -2))
    width, more = one.shape[axis], two.shape[axis] - one.shape[axis]
    values = two[:1].narrow(axis, 0 if left else width, more).unique()
    return values.item() if len(values) == 1 else None


def _doubled(value: Any) -> Any:
    """An example twice as long: sequences of numbers and texts, one after the other."""
    if isinstance(value, Mapping):
        several = _is_nested(value.get("input_ids"))  # texts to choose from: each gets longer
        return {
            name: [_doubled(text) for text in inner]
            if several and _is_nested(inner)
            else _doubled(inner)
            for name, inner in value.items()
        }
    if isinstance(value, str):
        return f"{value} {value}"
    if isinstance(value, list | tuple):
        return type(value)([*value, *value])
    if isinstance(value, Tensor) and value.dim() > 0:
        return torch.cat([value, value])
    if isinstance(value, np.ndarray) and value.ndim > 0:
        return np.concatenate([value, value])
    return value


def _is_nested(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(inner, list | tuple) for inner in value)
    )
