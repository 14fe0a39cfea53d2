"""A model to try things on: without dropout, and afterwards as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

_DROPPING = (
    *((F, name) for name in ("dropout", "dropout1d", "dropout2d", "dropout3d")),
    *((F, name) for name in ("alpha_dropout", "feature_alpha_dropout")),
    *((torch, name) for name in ("dropout", "dropout_", "feature_dropout", "feature_dropout_")),
)
_DROPOUT_ARGUMENT = 4  # of scaled_dot_product_attention
_SMALL = 0.02  # what a parameter that is all zero is tried with
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@contextlib.contextmanager
def undisturbed(model: nn.Module, *, dropout: bool = False) -> Iterator[None]:
    """Dropout off unless it is asked for, rows of zeros filled; afterwards the model is `as_it_was`.

    The model keeps its mode, since in evaluation mode other code would run than in training. A
    trainable parameter that is zero (a new head, LoRA's second matrix) would hide all that lies before
    it, and a row of zeros (of the padding token) what reads it, so small numbers from a public seed
    stand in for them meanwhile.
    """
    with as_it_was(model), contextlib.ExitStack() as stack:
        stack.callback(_restore_parameters, _filled(model))
        if not dropout:
            stack.enter_context(without_dropout())
        stack.enter_context(without_fast_path())
        yield


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back buffers, submodules, numbers, words and flags of every module, and torch's generators.

    A model may change itself by what it is given (BigBird: by too few tokens for its blocks), and what
    it was given here was made up. What modules hold in lists, and what they did not have before, stays.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        modules = list(model.modules())
        stack.callback(_restore_buffers, [_buffers_of(module) for module in modules])
        stack.callback(_restore_plain, [(m, _plain_of(m), dict(m._modules)) for m in modules])
        yield


def evaluation_flags(model: nn.Module) -> None:
    """Set every flag, but call no ``eval()``, which may be overridden and do more than that."""
    for module in model.modules():
        module.training = False


@torch.no_grad()
def draws(run: Callable[[], object]) -> bool:
    """Whether `run` takes anything from a global generator."""
    before = _generators()
    run()
    return _generators() != before


def _generators() -> tuple[object, ...]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    on_device = torch.cuda.get_rng_state().tolist() if torch.cuda.is_initialized() else None
    state = torch.random.get_rng_state().tolist()
    return random.getstate(), kind, np.asarray(keys).tolist(), rest, state, on_device


def _hands_on(input: Tensor, *_: object, **__: object) -> Tensor:
    return input


def _keeping_all(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def kept(*args: Any, **kwargs: Any) -> Tensor:
        drops = len(args) > _DROPOUT_ARGUMENT
        args = (*args[:_DROPOUT_ARGUMENT], *(0.0,) * drops, *args[_DROPOUT_ARGUMENT + 1 :])
        return attention(*args, **(kwargs | ({"dropout_p": 0.0} if "dropout_p" in kwargs else {})))

    return kept


@contextlib.contextmanager
def without_dropout() -> Iterator[None]:
    """Every dropout hands its input on, in recomputations during a backward pass as well.

    A mode of torch's overrides would not do: it is off while ``torch.autograd.grad`` runs.
    """
    with contextlib.ExitStack() as stack:
        for place, name in _DROPPING:
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, _hands_on)
        attention = F.scaled_dot_product_attention  # maybe somebody's own
        stack.callback(setattr, F, "scaled_dot_product_attention", attention)
        F.scaled_dot_product_attention = _keeping_all(attention)
        yield


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Torch's transformer layers run as with gradients, not joined in nested tensors of no size."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _filled(model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Put stand-ins in the place of rows of zeros; return what belongs there."""
    generator = torch.Generator().manual_seed(0)  # public: nothing private is involved
    before = []
    for parameter in model.parameters():
        values = parameter.data
        rows = (-1,) + (1,) * (values.dim() - 1)
        zeros = ~values.flatten(1).any(1).view(rows) if values.dim() > 1 else ~values.any()
        if parameter.requires_grad and bool(zeros.any()):
            small = torch.randn(values.shape, generator=generator) * _SMALL
            parameter.data = torch.where(zeros, small.to(values), values)
            before.append((parameter, values))
    return before


def _restore_parameters(before: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, values in before:
        parameter.data = values


_Buffers = tuple[nn.Module, dict[str, Tensor | None], dict[str, Tensor]]


def _buffers_of(module: nn.Module) -> _Buffers:
    held = dict(module._buffers)
    return module, held, {name: b.clone() for name, b in held.items() if b is not None}


@torch.no_grad()
def _restore_buffers(before: list[_Buffers]) -> None:
    for module, held, values in before:
        module._buffers.clear()
        module._buffers.update(held)
        for name, value in values.items():
            buffer = held[name]
            if buffer is not None and not torch.equal(buffer, value):
                buffer.copy_(value)


_Plain = tuple[nn.Module, dict[str, Any], dict[str, nn.Module | None]]


def _plain_of(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}


def _restore_plain(before: list[_Plain]) -> None:
    for module, plain, children in before:
        # past __setattr__, which may do more; a parameter of that name would be hidden
        vars(module).update({n: v for n, v in plain.items() if n not in module._parameters})
        if children != module._modules:
            module._modules.clear()
            module._modules.update(children)
