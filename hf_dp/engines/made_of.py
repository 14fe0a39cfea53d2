"""What a model is made of: modules, methods and settings, as they were when it was looked over.

Whoever swaps a module, patches a method of an object or of a class, or sets a recognised module otherwise
may change what the model computes: it is then looked over anew.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import nn

from hf_dp.engines.walk import named_modules_of

_PLAIN = (int, float, complex, str, torch.dtype, type(None))
_CODE = frozenset({FunctionType, property, classmethod, staticmethod})

State = tuple[tuple[Any, ...], tuple[Any, ...]]


def state_of(module: nn.Module) -> State:
    """The plain values that a module holds, and the versions of its buffers."""
    plain = tuple(
        (name, value)
        for name, value in vars(module).items()
        if _is_plain(value) and name != "training"
    )
    buffers = tuple(
        (name, id(buffer), buffer._version)
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    )
    return plain, buffers


def _is_plain(value: object) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def made_of(model: nn.Module) -> tuple[list[Any], ...]:
    """Every module, its class, what it does in its class's place, and the methods of all classes."""
    modules = list(named_modules_of(model))
    kinds: list[type[nn.Module]] = list(map(type, modules))
    different = dict.fromkeys(kinds)
    bases = {base: None for kind in different for base in kind.__mro__}
    others = (base for base in bases if not base.__module__.startswith("torch."))
    methods = [
        *(kind.forward for kind in different),
        *(value for base in others for value in vars(base).values() if type(value) in _CODE),
    ]
    held = [vars(module) for module in modules]
    own = [mine[name] for mine in held for name in ("forward", "_apply_gate") if name in mine]
    return modules, kinds, own, methods
