"""Whether a data collator makes rows of several examples, as mixup does: tried with made-up neighbours."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_dp.errors import ConfigurationError, explain

_DRAWS = 8  # partners and shares are drawn: that an example goes unmixed in all of them is unlikely

_SHARE = 0.5

Collator = Callable[[list[Any]], Any]


def refuse_mixing(collator: Collator, item: Any) -> None:
    """Collate an example next to others of its lengths and next to copies of itself, with equal draws.

    Its row must be the same. What draws from a generator of its own, or cannot take the made-up
    neighbours, is not tried.

    Args:
        collator: The host's.
        item: An example.

    Raises:
        ConfigurationError: A neighbour's content changes the example's row.
    """
    other = _altered(item)
    for draw in range(_DRAWS):
        among = _row(collator, [item, other, other], draw)
        copies, again = (_row(collator, [item] * 3, draw) for _ in range(2))
        if among is None or copies is None or again is None or _differ(copies, again):
            return
        if _differ(among, copies):
            inner = getattr(collator, "data_collator", collator)
            raise ConfigurationError(
                explain(
                    "data_collator",
                    getattr(inner, "__name__", type(inner).__name__),
                    "rows that are made of one example each",
                    "Where examples are mixed, as by mixup, one of them is in several rows, each of which is "
                    "clipped by itself.",
                    "Augment each example by itself, or collate without mixing.",
                )
            )


def _row(collator: Collator, items: list[Any], draw: int) -> dict[str, Tensor] | None:
    """What becomes of the first item; None if that cannot be seen."""
    random.seed(draw)  # for the trial alone: the caller puts the generators back
    np.random.seed(draw)  # noqa: NPY002
    torch.manual_seed(draw)
    try:
        made = collator(copy.deepcopy(items))
    except Exception:  # a foreign collator may refuse made-up examples in any way
        return None
    if not isinstance(made, Mapping):
        return None
    whole = {k: v for k, v in made.items() if isinstance(v, Tensor) and v.dim() > 0}
    return {name: value[0] for name, value in whole.items() if len(value) == len(items)}


def _differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether numbers of the same shape differ: other shapes say something of padding alone."""
    return any(
        name in other and value.shape == other[name].shape and not _same(value, other[name])
        for name, value in one.items()
    )


def _same(one: Tensor, other: Tensor) -> bool:
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
    if type(item) in (list, tuple):
        return type(item)(reversed(item))
    return item.rotate(180) if hasattr(item, "rotate") else item  # a picture of PIL
