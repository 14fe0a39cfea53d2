"""Whether a data collator makes rows of several examples, as mixup does: tried with made-up neighbours."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_dp.errors import ConfigurationError, explain

logger = logging.getLogger(__name__)

_ITEMS = 6
_DRAWS = 8  # partners and shares are drawn: that an example goes unmixed in all of them is unlikely

_SHARE = 0.5

Collator = Callable[[list[Any]], Any]


def refuse_mixing(collator: Collator, item: Any) -> None:
    """Collate an example next to others of its lengths and next to copies of itself, with equal draws.

    One of the rows must be the same. What draws from a generator of its own, or cannot take the made-up
    neighbours, is not tried.

    Args:
        collator: The host's.
        item: An example.

    Raises:
        ConfigurationError: A neighbour's content changes the example's row.
    """
    if not _mixes(collator, item):
        return
    inner = getattr(collator, "data_collator", collator)
    raise ConfigurationError(
        explain(
            "data_collator",
            getattr(inner, "__name__", type(inner).__name__),
            "rows that are made of one example each",
            "Where examples are mixed, as by mixup, one of them is in several rows, each of which is clipped "
            "by itself.",
            "Augment each example by itself, or collate without mixing.",
        )
    )


def _mixes(collator: Collator, item: Any) -> bool:
    try:
        others = [_altered(item)] * (_ITEMS - 1)
        for draw in range(_DRAWS):
            among = _collated(collator, [item, *others], draw)
            copies, again = (_collated(collator, [item] * _ITEMS, draw) for _ in range(2))
            if not _holds(again, copies):
                return False
            if not _holds(among, copies):
                return True
    except Exception as error:  # a foreign collator may refuse made-up examples in any way
        logger.debug("the collator was not tried: %s", type(error).__name__)
    return False


def _collated(collator: Collator, items: list[Any], draw: int) -> dict[str, Tensor]:
    """The columns that have a row for each item."""
    random.seed(draw)  # for the trial alone: the caller puts the generators back
    np.random.seed(draw)  # noqa: NPY002
    torch.manual_seed(draw)
    made = collator(copy.deepcopy(items))
    whole = {name: v for name, v in made.items() if isinstance(v, Tensor) and v.dim() > 0}
    return {name: value for name, value in whole.items() if len(value) == len(items)}


def _holds(batch: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> bool:
    """Whether one of the batch's rows is the first of the copies; other shapes say something of padding."""
    shared = [
        (value, copies[name][0])
        for name, value in batch.items()
        if name in copies and value.shape == copies[name].shape
    ]
    return any(all(_same(value[row], first) for value, first in shared) for row in range(_ITEMS))


def _same(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _altered(item: Any) -> Any:
    """The same lengths with other content: sequences and pictures turned round, numbers made smaller."""
    if isinstance(item, Mapping):
        turned: Any = copy.copy(item)
        for name, value in item.items():
            turned[name] = _altered(value)
        return turned
    if isinstance(item, Tensor):
        turned = item.flatten().flip(0).reshape(item.shape)
        return turned * _SHARE if item.is_floating_point() else turned
    if isinstance(item, np.ndarray):
        turned = item.reshape(-1)[::-1].reshape(item.shape).copy()
        return turned * item.dtype.type(_SHARE) if item.dtype.kind == "f" else turned
    if isinstance(item, list | tuple):
        numbers = all(isinstance(value, int | float) for value in item)
        turned = list(reversed(item)) if numbers else [_altered(value) for value in item]
        return type(item)._make(turned) if hasattr(item, "_make") else type(item)(turned)
    return item.rotate(180) if type(item).__module__.startswith("PIL.") else item
