"""All modules and parameters of a model, as torch walks them, in a fraction of its time.

Torch's own walk is a generator inside a generator for every level of the model; engines look a model
over on every micro-batch.
"""

from __future__ import annotations

from torch import nn


def named_modules_of(model: nn.Module) -> dict[nn.Module, str]:
    """Module -> its first name, each once, in the order of ``model.named_modules()``."""
    found: dict[nn.Module, str] = {}
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module in found:
            continue
        found[module] = name
        prefix = f"{name}." if name else ""
        for key in reversed(module._modules):
            child = module._modules[key]
            if child is not None:
                waiting.append((prefix + key, child))
    return found


def named_parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """``dict(model.named_parameters())``: name -> parameter, each once."""
    if type(model).named_parameters is not nn.Module.named_parameters:
        return dict(model.named_parameters())  # a wrapper's own names
    seen: set[nn.Parameter] = set()
    found: dict[str, nn.Parameter] = {}
    for module, name in named_modules_of(model).items():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                found[f"{name}.{key}" if name else key] = parameter
    return found
