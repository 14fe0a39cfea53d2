"""What tells one loss function from another, where each call may bring a new object."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any


def code_of(loss: Callable[..., Any]) -> tuple[object, ...]:
    """The same for two losses that run the same code, whatever they are set to.

    Args:
        loss: A function, a method or a callable object; of partials and decorators what they wrap, too.
    """
    return tuple(_codes(loss))


def _codes(loss: Any) -> Iterator[object]:
    if isinstance(loss, functools.partial):
        for inner in (loss.func, *loss.args, *loss.keywords.values()):
            if callable(inner):
                yield from _codes(inner)
        return
    function = getattr(loss, "__func__", loss)
    yield getattr(function, "__code__", None) or type(function)
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        yield from _codes(wrapped)
