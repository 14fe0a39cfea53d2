"""Whether a model's loss is computed by code of known libraries, or by somebody's own.

A vectorised form that agrees with a library's loss on made-up examples agrees everywhere; somebody's own
may weigh a rare class, or leave out a token, that no made-up example has.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch import nn

from hf_dp.engines.familiar import is_from_library
from hf_dp.training.tasks import unwrapped

_TARGETS = frozenset({"labels", "start_positions", "end_positions"})
_FUSED_HEADS = "trl.trainer.utils"
_OF_THE_CONFIGURATION = (
    *("problem_type", "num_labels", "loss_type", "output_router_logits", "router_aux_loss_coef"),
    *("label_smoothing", "classifier_dropout", "pad_token_id"),
)


def has_library_loss(model: nn.Module) -> bool:
    """Whether forward and loss function of the model, and of all inside that take labels, are a library's."""
    return all(map(_is_a_librarys, _that_take_labels(model)))


def state_of_loss(model: nn.Module) -> Hashable:
    """What decides which loss a model computes; a change of it asks for another choice.

    Functions are referred to, not numbered: another may come to lie where one was.
    """
    config = getattr(unwrapped(model), "config", None)
    return (
        tuple((_named(_forward(m)), _named(_loss_function(m))) for m in _that_take_labels(model)),
        tuple(str(getattr(config, name, None)) for name in _OF_THE_CONFIGURATION),
    )


def _that_take_labels(model: nn.Module) -> Iterator[nn.Module]:
    yield model
    for module in model.modules():
        if module is not model and _takes_labels(module):
            yield module


def _takes_labels(module: nn.Module) -> bool:
    return not _TARGETS.isdisjoint(parameters_of(_forward(module)))


def parameters_of(function: Callable[..., Any]) -> frozenset[str]:
    """Names of what a function takes by name; none where it does not say."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled code says nothing
        return frozenset()
    various = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return frozenset(one.name for one in found if one.kind not in various)


def _is_a_librarys(module: nn.Module) -> bool:
    function = _loss_function(module)
    return is_from_library(_forward(module)) and (function is None or is_from_library(function))


def _forward(module: nn.Module) -> Callable[..., Any]:
    found: Callable[..., Any] = vars(module).get("forward", type(module).forward)
    return _below_fused_head(found)


def _below_fused_head(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward that TRL's fused head stands before, which runs wherever that head is not asked for."""
    function = getattr(forward, "__func__", forward)
    if getattr(function, "__globals__", {}).get("__name__") != _FUSED_HEADS:
        return forward
    below: Callable[..., Any] = inspect.getclosurevars(function).nonlocals.get(
        "original_forward", forward
    )
    return below


def _loss_function(module: nn.Module) -> object:
    function = getattr(module, "loss_function", None)
    return getattr(function, "__func__", function)


def _named(function: object) -> Hashable:
    """Equal while the function lives; keeps neither it nor the model that it may hold alive."""
    function = getattr(function, "__func__", function)
    return None if function is None else weakref.ref(function)
