"""Whether a training item is the same however many were read before it: tried under equal global coins.

A dataset that draws from a generator of its own, or keeps something from one reading to the next, makes
one example's augmentation depend on whether another is drawn. Global generators are seeded in secret.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_dp.errors import ConfigurationError, explain
from hf_dp.layers.randomness import Randomness, kept_randomness

logger = logging.getLogger(__name__)

_ITEMS = 8
_PASSES = 4  # what is drawn may come out the same now and then: an image that is turned over or not

_CPU = torch.device("cpu")


def refuse_own_draws(dataset: Any, size: int) -> None:
    """Read a few items over and over, each time with equal coins and in another order.

    Args:
        dataset: As training reads it.
        size: How many items it has.

    Raises:
        ConfigurationError: An item is not what it was before.
    """
    places = some_places(size)
    with kept_randomness(_CPU):
        coins = Randomness.now(_CPU)
        first: dict[int, Any] = {}
        for number in range(_PASSES):
            for place in places if number % 2 == 0 else reversed(places):
                coins.restore()
                item = dataset[place]
                if place not in first:
                    first[place] = _copied(item)
                elif not same_item(first[place], item):
                    raise ConfigurationError(
                        explain(
                            "train_dataset[...]",
                            f"a {type(item).__name__}",
                            "the same item under the same global coins, whichever were read before",
                            "With a generator of its own, or a memory, what an example is turned into "
                            "tells which others are drawn, and no clipping bounds that.",
                            "Draw from the global generators (torch.rand, random, numpy.random), which hf_dp "
                            "seeds in secret, or make the generator from the index in __getitem__.",
                        )
                    )


def some_places(size: int) -> list[int]:
    """A few places of a dataset, the first and the last among them."""
    return sorted({index * (size - 1) // (_ITEMS - 1) for index in range(_ITEMS)})


def _copied(item: Any) -> Any:
    """A copy, since a dataset may hand out, and change, the same object."""
    try:
        return copy.deepcopy(item)
    except Exception as error:  # an open file, say
        logger.debug("an item was not copied: %s", type(error).__name__)
        return item


def same_item(one: Any, other: Any) -> bool:
    """Whether two items are equal; what cannot be compared counts as equal."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_item(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_item, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _same_tensor(one, other)
    if type(one).__module__.startswith("PIL.") or isinstance(one, np.ndarray | np.generic):
        return _same_array(np.asarray(one), np.asarray(other))
    if isinstance(one, float):
        return bool(one == other) or (one != one and other != other)
    if isinstance(one, str | bytes | int | complex | None):
        return bool(one == other)
    inside = getattr(one, "__dict__", None)  # a data class, say
    return not inside or same_item(inside, getattr(other, "__dict__", None))


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
        return False
    if one.is_sparse:
        one, other = one.to_dense(), other.to_dense()
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _same_array(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype == object:
        return all(map(same_item, one.ravel(), other.ravel()))
    return one.tobytes() == other.tobytes()
