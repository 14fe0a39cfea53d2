"""Whether a data collator keeps something from one example to the next: tried with some of them twice."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_dp.errors import ConfigurationError, explain

logger = logging.getLogger(__name__)

_SHARE = 0.5
_SCALARS = (int, float, str)

Collator = Callable[[list[Any]], Any]


def refuse_memory(collator: Collator, items: Sequence[Any]) -> None:
    """Collate examples, then others made of them, then the first again, each under the same global draws.

    Args:
        collator: The host's; as in training, it is given one example at a time.
        items: Several examples, since one may be blank and change nothing that is kept.

    Raises:
        ConfigurationError: One of them is not collated as at first.
    """
    try:
        first = [_collated(collator, item) for item in items]
        for number, item in enumerate(items):
            for other in _others(item):
                with contextlib.suppress(Exception):  # made up, so refused in any way
                    _collated(collator, other, seed=number + 1)
        again = [_collated(collator, item) for item in reversed(items)]
    except Exception as error:  # of real examples, so the run will show it
        logger.debug("the collator was not tried: %s", type(error).__name__)
        return
    if not all(map(_same, first, reversed(again))):
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


def _others(item: Any) -> Iterator[Any]:
    """Longer sequences; other numbers and words beside the same; and other content in the same lengths."""
    with contextlib.suppress(Exception):  # items may be of any kind
        yield _changed(item, _doubled)
    if isinstance(item, Mapping):
        yield _with(item, {name: _turned(v) for name, v in item.items() if isinstance(v, _SCALARS)})
    with contextlib.suppress(Exception):
        yield _changed(item, _turned)


def _changed(item: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(item, Mapping):
        return _with(item, {name: _changed(value, change) for name, value in item.items()})
    if isinstance(item, list | tuple) and not _is_numbers(item):
        made = [_changed(value, change) for value in item]
        return type(item)._make(made) if hasattr(item, "_make") else type(item)(made)
    return change(item)


def _with(item: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    changed: Any = copy.copy(item)
    for name, value in values.items():
        changed[name] = value
    return changed


def _turned(value: Any) -> Any:
    """Sequences, words and pictures turned round, numbers made smaller; lengths stay."""
    if isinstance(value, Tensor):
        turned = value.flatten().flip(0).reshape(value.shape)
        return turned * _SHARE + 1 if value.is_floating_point() else turned
    if isinstance(value, np.ndarray):
        array = value.reshape(-1)[::-1].reshape(value.shape).copy()
        return array * value.dtype.type(_SHARE) + 1 if value.dtype.kind == "f" else array
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return abs(value - 1)  # still a class, if it was one of two or more
    if isinstance(value, float):
        return _SHARE * value + 1
    if isinstance(value, str | list | tuple):
        return value[::-1]
    return value.rotate(180) if type(value).__module__.startswith("PIL.") else value


def _doubled(value: Any) -> Any:
    return 2 * value if isinstance(value, str | list | tuple) else value


def _is_numbers(value: Any) -> bool:
    return all(isinstance(one, int | float) for one in value)
