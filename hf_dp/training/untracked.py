"""Models whose gradients do not come by where they are clipped: compiled ones, and inference tensors."""

from __future__ import annotations

import torch
from torch import nn

from hf_dp.errors import ConfigurationError, explain


def refuse_untracked(model: nn.Module) -> None:
    """Refuse compiled modules, and parameters that autograd cannot track.

    Raises:
        ConfigurationError: There is one; the message names it.
    """
    for name, module in model.named_modules():
        if _is_compiled(module):
            raise ConfigurationError(
                explain(
                    f"model.{name}".rstrip("."),
                    type(module).__name__,
                    "a module that is not compiled",
                    "Compiled code may run without the hooks that see per-example gradients.",
                    "Pass the model as it was before torch.compile or torch.jit.",
                )
            )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_inference():
            raise ConfigurationError(
                explain(
                    f"model.{name}",
                    "a tensor made in inference mode",
                    "a parameter that autograd can track",
                    "It has no gradient, so nothing could be clipped or trained.",
                    "Build the model outside torch.inference_mode().",
                )
            )


def _is_compiled(module: nn.Module) -> bool:
    forward = vars(module).get("forward", type(module).forward)
    return (
        "_orig_mod" in module._modules
        or module._compiled_call_impl is not None
        or hasattr(forward, "_torchdynamo_orig_callable")
        or isinstance(module, torch.jit.ScriptModule)
    )
