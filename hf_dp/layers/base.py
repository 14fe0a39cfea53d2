"""What a layer rule is, where a tensor has its units, and how inputs become units x positions x width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class UnitAxis:
    """Where a tensor has the units.

    Attributes:
        dim: The axis; None if the tensor serves all units alike.
        folded: The axis holds k consecutive rows of each unit, ``B * k`` in all.
        added: The axis was put in front of a tensor that served all units alike.
        row: A tensor that serves all units alike has a first axis of length 1.
    """

    dim: int | None
    folded: bool = False
    added: bool = False
    row: bool = False

    def units_first(self, tensor: Tensor, num_units: int) -> Tensor:
        """``(B, ...)``: the units' axis moved to the front, folded rows as an axis of their own."""
        if self.folded:
            apart: Tensor = tensor.unflatten(0, (num_units, -1))
            return apart
        return tensor if self.dim in (0, None) else tensor.movedim(self.dim, 0)

    def apart(self, tensor: Tensor, num_units: int) -> Tensor:
        """``(B, *shape)``, where ``shape`` is what the module is given for one unit alone."""
        assert self.dim is not None
        first = self.units_first(tensor, num_units)
        return first if self.folded or self.added else first.unsqueeze(self.dim + 1)

    def scaled(self, tensor: Tensor, weights: Tensor) -> Tensor:
        """Each unit's numbers times its weight, ``(B,)``."""
        if self.dim is None:
            return tensor
        first = self.units_first(tensor, len(weights))
        scale = weights.view(-1, *[1] * (first.dim() - 1)).to(first)
        return (
            (first * scale).reshape(tensor.shape)
            if self.folded
            else ((first * scale).movedim(0, self.dim))
        )


FIRST = UnitAxis(0)
FOLDED = UnitAxis(0, folded=True)
SHARED = UnitAxis(None)
ROW = UnitAxis(None, row=True)
ADDED = UnitAxis(0, added=True)


def repeated(tensor: Tensor, axis: UnitAxis | None, num_units: int) -> tuple[Tensor, UnitAxis]:
    """A tensor that served all units alike, once for each; and where the units then are."""
    if axis is not None and axis.row:
        return tensor.expand(num_units, *tensor.shape[1:]), FIRST
    return tensor.expand(num_units, *tensor.shape), ADDED


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
