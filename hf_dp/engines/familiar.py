"""Whether all code that a forward pass runs comes from libraries whose models treat examples alike.

What torch, transformers, peft and accelerate do with a batch is read off the graph (`by_content`), and
a family of theirs is proved once. Of code from elsewhere nothing is known: it is proved on every batch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_LIBRARIES = frozenset({"torch", "transformers", "peft", "accelerate", "hf_dp", "builtins"})

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_EVERYWHERE = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks",
               "_global_backward_pre_hooks")  # fmt: skip

# By name, what transformers computes attention with; others come from its users.
_ATTENTION = frozenset(
    {
        "eager",
        "sdpa",
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "flex_attention",
    }
)

_CALLABLE: dict[type[Any], bool] = {}  # kind of value -> whether it is a function, or can be called


def is_familiar(model: nn.Module) -> bool:
    """Whether classes, methods, hooks and functions of all modules are those of known libraries."""
    if any(_foreign_hooks(getattr(torch_module, name, None)) for name in _EVERYWHERE):
        return False
    modules = list(model.modules())
    kinds = {id(kind): kind for kind in map(type, modules)}
    return all(map(_is_familiar_class, kinds.values())) and all(map(_is_familiar, modules))


def is_from_library(function: object) -> bool:
    """Whether a function, or a callable object, was written in one of the libraries."""
    while isinstance(function, functools.partial):
        function = function.func
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, nn.Module) and not _known(type(owner)):
        return False
    return _known(function) if hasattr(function, "__qualname__") else _known(type(function))


def _is_familiar_class(kind: type[nn.Module]) -> bool:
    """Looked up each time: another method may be put in a class."""
    bases = [base for base in kind.__mro__ if base not in (object, nn.Module)]
    methods = (value for base in bases for value in vars(base).values() if callable(value))
    return all(map(_known, bases)) and _known(nn.Module.__call__) and all(map(_known, methods))


def _is_familiar(module: nn.Module) -> bool:
    own = vars(module)
    if any(_foreign_hooks(own.get(name)) for name in _HOOKS):
        return False
    implementation = getattr(own.get("config"), "_attn_implementation", None)
    if isinstance(implementation, str) and implementation not in _ATTENTION:
        return False
    return all(map(is_from_library, _functions(own.values())))


def _functions(values: Any) -> Iterator[object]:
    """What is kept on the instance and may be called in its forward pass, a replaced ``forward`` too."""
    return (value for value in values if _is_function(type(value)))


def _is_function(kind: type[Any]) -> bool:
    if kind not in _CALLABLE:
        calls = any("__call__" in vars(base) for base in kind.__mro__)
        _CALLABLE[kind] = calls and not issubclass(kind, nn.Module | type)
    return _CALLABLE[kind]


def _foreign_hooks(hooks: Any) -> bool:
    return bool(hooks) and not all(map(is_from_library, hooks.values()))


def _known(thing: Any) -> bool:
    name = getattr(thing, "__module__", None)
    if name is None:  # compiled functions
        return True
    root = str(name).partition(".")[0]
    return root in _LIBRARIES or root in sys.stdlib_module_names
