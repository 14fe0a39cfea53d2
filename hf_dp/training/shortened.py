"""A large model with few of its layers, on which to try what all layers of a kind do alike."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from torch import nn

from hf_dp.training.tasks import unwrapped

_PLAIN = (bool, int, float, str, type(None))
_PLACES = frozenset({"layer_idx", "layer_id", "layer_number", "block_idx", "i"})
"""Where in the model a layer is: by this alone layers of one kind differ."""


@contextlib.contextmanager
def shortened(model: nn.Module) -> Iterator[None]:
    """Within it every list of layers ends once each kind of them has come up.

    Layers are of a kind if they are made of the same classes with the same settings, and the configuration's
    ``layer_types`` are the same: how padding is masked hangs on nothing else in the libraries' models.

    Args:
        model: Its lists are put back.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    with contextlib.ExitStack() as stack:
        for layers in lists:
            whole = layers._modules
            stack.callback(setattr, layers, "_modules", whole)
            few = _first_of_each_kind(list(layers), _types_of(model, len(layers)))
            layers._modules = dict(list(whole.items())[:few])
        yield


def _first_of_each_kind(layers: Sequence[nn.Module], types: Sequence[Hashable]) -> int:
    """How many of the first there must be."""
    seen: set[Hashable] = set()
    few = 0
    for place, (layer, kind) in enumerate(zip(layers, types, strict=True), start=1):
        made_of = kind, tuple(_settings(module) for module in layer.modules())
        if made_of not in seen:
            seen.add(made_of)
            few = place
    return few


def _settings(module: nn.Module) -> Hashable:
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and name not in _PLACES
    }
    return type(module), tuple(sorted(plain.items(), key=lambda pair: pair[0]))


def _types_of(model: nn.Module, count: int) -> Sequence[Hashable]:
    config: Any = getattr(unwrapped(model), "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    named = getattr(config, "layer_types", None)
    return named if isinstance(named, list) and len(named) == count else [None] * count
