"""Whether all code that a forward pass runs comes from libraries whose models treat examples alike.

What torch, transformers, peft and accelerate do with a batch is read off the graph (`by_content`), and
a family of theirs is proved once. Of code from elsewhere nothing is known: it is proved on every batch.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from hf_dp.engines.walk import named_modules_of

_LIBRARIES = frozenset(
    {
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "hf_dp",
        "numpy",
        "huggingface_hub",
        "safetensors",
    }
)

# Classes of torch whose forward pass is somebody else's code.
_MADE_OF_CODE = frozenset({"GraphModule", "ScriptModule"})

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EVERYWHERE = tuple(f"_global{name}" for name in _HOOKS)

# Where transformers keeps functions that its users may add to, or replace by their own.
_REGISTRIES = (
    ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
    ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    ("transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS"),
    ("transformers.activations", "ACT2FN"),
)

_DEPTH = 3  # of lists in lists


def foreign_code(model: nn.Module) -> str:
    """What of the model's classes, methods, hooks and functions is from elsewhere; "" if nothing is."""
    return next(_foreign(model), "")


def _foreign(model: nn.Module) -> Iterator[str]:
    kinds = {id(kind): kind for kind in map(type, model.modules())}.values()
    for kind in kinds:
        if not _is_familiar_class(kind):
            yield f"class {kind.__module__}.{kind.__qualname__}"
    for file in {kind.__module__ for kind in kinds}:
        if not _is_familiar_file(file):
            yield f"a function put into {file}"
    for file, registry in _REGISTRIES:
        if not _holds_known(getattr(sys.modules.get(file), registry, None)):
            yield f"an entry of {registry}"
    for name, module in model.named_modules():
        if not (_has_known_values(module) and _is_unchanged(module)):
            yield f"a value, hook or method of module {name!r}"
    if not still_familiar(model):
        yield "a hook on all modules"


def still_familiar(model: nn.Module) -> bool:
    """Whether nobody has put a hook or a method on a familiar model since it was looked over."""
    if any(_foreign_hooks(getattr(torch_module, name, None)) for name in _EVERYWHERE):
        return False
    return all(map(_is_unchanged, named_modules_of(model)))


def is_from_library(function: object) -> bool:
    """Whether a function, or a callable object, was written in one of the libraries."""
    if isinstance(function, functools.partial):
        inner = (function.func, *function.args, *function.keywords.values())
        return all(_is_known_value(value, _DEPTH) for value in inner)
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, nn.Module) and not _known_class(type(owner)):
        return False
    function = getattr(function, "__func__", function)
    while isinstance(function, FunctionType):
        if not _known_name(function.__globals__.get("__name__")):
            return False  # a decorator may have copied another function's name
        function = getattr(function, "__wrapped__", None)
    return function is None or _known_class(
        function if isinstance(function, type) else type(function)
    )


def _is_unchanged(module: nn.Module) -> bool:
    own = vars(module)
    if any(map(own.get, _HOOKS)) and any(_foreign_hooks(own.get(name)) for name in _HOOKS):
        return False
    forward, hook = own.get("forward"), own.get("_hf_hook")
    if hook is not None and not _is_known_hook(hook):
        return False
    return forward is None or is_from_library(forward)


def _is_known_hook(hook: Any) -> bool:
    """Whether a hook of accelerate's, and those that it calls one after the other, are the library's."""
    held = getattr(hook, "__dict__", {}).values()
    return _known_class(type(hook)) and all(_is_known_value(value, _DEPTH) for value in held)


def _is_familiar_class(kind: type[Any]) -> bool:
    bases = [base for base in kind.__mro__ if base is not object]
    if any(base.__name__ in _MADE_OF_CODE for base in bases) or not all(map(_known_class, bases)):
        return False
    methods = (value for base in bases for value in vars(base).values())
    return all(map(_is_known_method, methods))


def _is_known_method(value: Any) -> bool:
    if isinstance(value, property):
        return all(map(is_from_library, (value.fget, value.fset)))
    value = getattr(value, "__func__", value)  # of class methods and static ones
    return is_from_library(value) if isinstance(value, FunctionType) else True


def _is_familiar_file(name: str) -> bool:
    """Whether nobody has put functions of their own into a library's file."""
    values = vars(sys.modules[name]).values() if name in sys.modules else ()
    return all(is_from_library(value) for value in values if isinstance(value, FunctionType))


def _has_known_values(module: nn.Module) -> bool:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return all(_known_class(type(tensor)) for tensor in tensors) and all(
        name in _HOOKS or _is_known_value(value, _DEPTH) for name, value in vars(module).items()
    )


def _is_known_value(value: Any, depth: int) -> bool:
    if isinstance(value, nn.Module):
        return True  # looked at by itself
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return depth == 0 or all(_is_known_value(inner, depth - 1) for inner in _inside(value))
    if isinstance(value, type):
        return _known_class(value)
    return is_from_library(value) if callable(value) else _known_class(type(value))


def _inside(value: Any) -> Iterator[Any]:
    return iter(value.values() if isinstance(value, Mapping) else value)


def _holds_known(registry: Any) -> bool:
    return registry is None or all(_is_known_value(value, _DEPTH) for value in registry.values())


def _foreign_hooks(hooks: Any) -> bool:
    return bool(hooks) and not all(map(is_from_library, hooks.values()))


def _known_class(kind: type[Any]) -> bool:
    return _known_name(kind.__module__)


@functools.cache
def _known_name(module: str | None) -> bool:
    """Whether a module of this name is part of a library, or of Python."""
    root = str(module).partition(".")[0]
    if root in _LIBRARIES or root == "builtins":
        return True
    if root not in sys.stdlib_module_names:
        return False
    file = getattr(
        sys.modules.get(root), "__file__", None
    )  # a script of one's own may be called code.py
    return file is None or str(file).startswith(
        tuple(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib"))
    )
