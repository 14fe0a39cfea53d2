"""What a layer rule is, and how inputs of any rank become units x positions x width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeGuard

from torch import Tensor, nn

from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.factors import Factor

LayerRule = Callable[[nn.Module, Tensor, Tensor, int], Iterator[tuple[nn.Parameter, Factor]]]
"""``rule(module, inputs, output_grads, num_units)`` yields a factor for each trainable parameter.

`inputs` and `output_grads` have the units on their first axis. A rule answers for every trainable
parameter that the module owns; it is pure.
"""

LayerRules = Mapping[type[nn.Module], LayerRule]


def positions(tensor: Tensor, num_units: int) -> Tensor:
    """View ``(B, ..., width)`` as ``(B, T, width)``; the units' axis must come first."""
    if tensor.shape[0] != num_units:
        raise UncoveredParameterError(
            f"layer input of shape {tuple(tensor.shape)}: expected {num_units} units on the first axis. "
            "Without that axis one unit's gradient cannot be told from another's. "
            "Use engine='sequential'."
        )
    return tensor.reshape(num_units, -1, tensor.shape[-1])


def trains(parameter: nn.Parameter | None) -> TypeGuard[nn.Parameter]:
    """Whether the optimizer changes `parameter`.

    Taps switch ``requires_grad`` off only while a module runs, so rules may ask at any other time.
    """
    return parameter is not None and parameter.requires_grad
