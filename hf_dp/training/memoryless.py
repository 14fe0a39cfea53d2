"""Whether a data collator keeps something from one example to the next: tried with one of them twice."""

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

_BETWEEN = 3
_SHARE = 0.5

Collator = Callable[[list[Any]], Any]


def refuse_memory(collator: Collator, item: Any) -> None:
    """Collate an example, then others, then the first again, with the global generators as at first.

    Args:
        collator: The host's; as in training, it is given one example at a time.
        item: An example.

    Raises:
        ConfigurationError: It is not collated as at first.
    """
    try:
        first = _collated(collator, item)
        for number in range(_BETWEEN):
            _collated(collator, _altered(item), seed=number + 1)
        again = _collated(collator, item)
    except Exception as error:  # a foreign collator may refuse made-up examples in any way
        logger.debug("the collator was not tried: %s", type(error).__name__)
        return
    if not _same(first, again):
        inner = getattr(collator, "data_collator", collator)
        raise ConfigurationError(
            explain(
                "data_collator",
                getattr(inner, "__name__", type(inner).__name__),
                "the same batch for the same example and the same global draws",
                "It keeps something of earlier examples, or draws from a generator of its own: then one "
                "example changes what the others are.",
                "Keep nothing, and draw from the global generators of torch, NumPy or Python, which are "
                "seeded in secret.",
            )
        )


def _collated(collator: Collator, item: Any, seed: int = 0) -> Any:
    random.seed(seed)  # for the trial alone: the caller puts the generators back
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    return collator([copy.deepcopy(item)])


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(v, other[name]) for name, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype
        return alike and torch.allclose(
            one.to_dense(), other.to_dense(), rtol=0, atol=0, equal_nan=True
        )
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    return type(one) is type(other) and (not isinstance(one, int | float | str) or one == other)


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
