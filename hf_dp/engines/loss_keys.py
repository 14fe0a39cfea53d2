"""What tells one loss function from another, where each call may bring a new object."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from types import FunctionType, MethodType
from typing import Any

_DEPTH = 5
_KINDS = (bool, type(None), type)
_VALUES = (int, float, str)


def loss_key(loss: Any, *, numbers: bool) -> Hashable:
    """The same for two losses that run the same code on the same settings.

    Functions count by their code, what they close over and their defaults; objects by their class and
    attributes; tensors and other values by their kind.

    Args:
        loss: A function or a callable object.
        numbers: Whether settings that are numbers or words count. One that is new at every step, a
            counter, say, would make every step's loss a new one.
    """
    return _key(loss, numbers, _DEPTH)


def _key(value: Any, numbers: bool, depth: int) -> Hashable:
    if isinstance(value, _KINDS):
        return value
    if isinstance(value, _VALUES):
        return value if numbers else type(value).__qualname__
    if depth == 0:
        return (type(value),)
    inner = functools.partial(_key, numbers=numbers, depth=depth - 1)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        kept = (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return value.__code__, tuple(map(inner, kept))
    if isinstance(value, MethodType):
        return inner(value.__func__), inner(value.__self__)
    if isinstance(value, functools.partial):
        return inner(value.func), tuple(map(inner, (*value.args, *value.keywords.values())))
    if callable(value) and hasattr(value, "__dict__"):
        return type(value), tuple((name, inner(kept)) for name, kept in vars(value).items())
    return (type(value),)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a name that is not bound yet
        return False
    return True
