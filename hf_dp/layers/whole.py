"""One whole call of a module, and how to run it again for one unit: what the generic rule rests on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.base import SHARED, UnitAxis
from hf_dp.layers.factors import wide
from hf_dp.layers.randomness import Randomness, kept_randomness


class _Forward(nn.Module):
    """A module's own forward: hooks on the module itself, which surround it, are not run again."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return self.inner.forward(*args, **kwargs)


@dataclass
class WholeCall:
    """What one call of a module was given, and the gradients of what it gave back.

    Attributes:
        module: The module.
        parameters: Those whose gradients are sought; replaced in the module's whole subtree.
        arguments: The leaves of ``(args, kwargs)``.
        spec: Their structure.
        axes: Where each leaf has the units; `SHARED` where it has none.
        tapped: Which leaves of the output have gradients.
        output_grads: Their gradients; None where nothing depends on one.
        output_axes: Where they have the units.
        num_units: B.
        drawn: The generators before and after the call, if it drew from them.
        quiet: Within this context no tap is active.
        autocast: Whether it was on, and its dtype.
    """

    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    arguments: list[Any]
    spec: TreeSpec
    axes: Sequence[UnitAxis]
    tapped: Sequence[int]
    output_grads: list[Tensor | None]
    output_axes: Sequence[UnitAxis]
    num_units: int
    drawn: tuple[Randomness, Randomness] | None
    quiet: Callable[[], contextlib.AbstractContextManager[object]]
    autocast: tuple[bool, torch.dtype]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parameters[0].device

    @property
    def numel(self) -> int:
        """How many numbers one unit's gradient has."""
        return sum(parameter.numel() for parameter in self.parameters)

    def run(self, values: Sequence[Tensor], arguments: Sequence[Any]) -> list[Tensor]:
        """The tapped outputs with `values` in place of the parameters, wherever they are used.

        No other parameter records a gradient.
        """
        replaced = dict(zip(map(id, self.parameters), values, strict=True))
        tensors = {
            f"inner.{name}": replaced.get(id(p), p.detach())
            for name, p in self.module.named_parameters(remove_duplicate=False)
        }
        args, kwargs = tree_unflatten(list(arguments), self.spec)
        enabled, dtype = self.autocast
        with self.quiet(), torch.autocast(self.device.type, dtype=dtype, enabled=enabled):
            output = functional_call(
                _Forward(self.module), tensors, (args, kwargs), tie_weights=False
            )
        leaves = tree_leaves(output)
        return [leaves[index] for index in self.tapped]

    def unit_arguments(self, unit: int) -> list[Any]:
        """What the module would be given for one unit alone."""
        return [
            self._of_unit(leaf, axis, unit) if isinstance(leaf, Tensor) else leaf
            for leaf, axis in zip(self.arguments, self.axes, strict=True)
        ]

    def unit_grads(self, unit: int) -> list[Tensor]:
        """One unit's gradient of each parameter, from this unit's numbers alone."""
        values = [p.detach().requires_grad_() for p in self.parameters]
        with torch.enable_grad():
            if self.drawn is None:
                outputs = self.run(values, self.unit_arguments(unit))
            else:
                outputs = self._with_the_same_draws(values, unit)
            pairs = [
                (output, self._of_unit(grad, axis, unit))
                for output, grad, axis in zip(
                    outputs, self.output_grads, self.output_axes, strict=True
                )
                if grad is not None and output.requires_grad
            ]
        if not pairs:
            return [torch.zeros_like(wide(value)) for value in values]
        found = torch.autograd.grad(
            [output for output, _ in pairs], values, [g for _, g in pairs], allow_unused=True
        )
        return [
            torch.zeros_like(wide(value)) if grad is None else wide(grad)
            for value, grad in zip(values, found, strict=True)
        ]

    def _of_unit(self, tensor: Tensor, axis: UnitAxis, unit: int) -> Tensor:
        if axis.dim is None or self.num_units == 1:
            return tensor
        if axis.folded:
            return axis.units_first(tensor, self.num_units)[unit]
        if axis.added:
            return tensor[unit]
        return tensor.narrow(axis.dim, unit, 1)

    def _with_the_same_draws(self, values: Sequence[Tensor], unit: int) -> list[Tensor]:
        """The unit's outputs under the masks that were drawn for it.

        Every unit is replaced by this one, so the shapes and hence the draws are those of the call,
        and nothing of another unit, say a NaN, comes near.
        """
        if self.drawn is None:
            raise ValueError("the call drew nothing")
        before, after = self.drawn
        arguments = [
            self._repeated(leaf, axis) if isinstance(leaf, Tensor) else leaf
            for leaf, axis in zip(self.unit_arguments(unit), self.axes, strict=True)
        ]
        with kept_randomness(self.device):
            before.restore()
            outputs = self.run(values, arguments)
            if not Randomness.now(self.device).same(after):
                raise UncoveredParameterError(
                    f"{type(self.module).__qualname__}: expected it to draw the same random numbers when "
                    "it is run again. How many it draws depends on the examples, so its dropout masks "
                    "cannot be repeated. Switch its dropout off, or use engine='sequential'."
                )
        return [
            output if axis.added else self._of_unit(output, axis, unit)
            for output, axis in zip(outputs, self.output_axes, strict=True)
        ]

    def _repeated(self, leaf: Tensor, axis: UnitAxis) -> Tensor:
        if axis.dim is None or self.num_units == 1:
            return leaf
        times = [1] * leaf.dim()
        times[axis.dim] = self.num_units
        return leaf.repeat(times)

    def vmapped_grads(self) -> list[Tensor]:
        """Every unit's gradient of each parameter, ``(B, *shape)``, in one vectorised run.

        Raises:
            Exception: Whatever the module raises when it is vectorised.
        """
        places = [
            index
            for index, (leaf, axis) in enumerate(zip(self.arguments, self.axes, strict=True))
            if isinstance(leaf, Tensor) and axis.dim is not None
        ]
        inputs = [self._stacked(self.arguments[i], self.axes[i]) for i in places]
        kept = [i for i, grad in enumerate(self.output_grads) if grad is not None]
        grads = [self._stacked(self.output_grads[i], self.output_axes[i]) for i in kept]

        def of_one(inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
            arguments = list(self.arguments)
            for place, leaf in zip(places, inputs, strict=True):
                arguments[place] = leaf

            def product(values: tuple[Tensor, ...]) -> Tensor:
                outputs = self.run(values, arguments)
                total = wide(values[0]).sum() * 0
                for index, grad in zip(kept, grads, strict=True):
                    total = total + (outputs[index] * grad).sum()
                return total

            found: tuple[Tensor, ...] = torch.func.grad(product)(
                tuple(p.detach() for p in self.parameters)
            )
            return found

        found = torch.func.vmap(of_one, randomness="error")(inputs, grads)
        return [wide(grad) for grad in found]

    def _stacked(self, tensor: Tensor | None, axis: UnitAxis) -> Tensor:
        if tensor is None:
            raise ValueError("an output without gradient has nothing to stack")
        if self.num_units == 1:
            return tensor[None]
        return axis.apart(tensor, self.num_units)


def all_of_one(leaves: Sequence[Any]) -> list[UnitAxis]:
    """The axes when the batch is one unit: every tensor is its own as a whole."""
    return [SHARED for _ in leaves]
