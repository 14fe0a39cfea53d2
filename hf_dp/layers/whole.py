"""One whole call of a module, and how to run it again for one unit: what the generic rule rests on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.base import UnitAxis
from hf_dp.layers.factors import dense, wide
from hf_dp.layers.randomness import Randomness, kept_randomness
from hf_dp.layers.repeats import Marks

# vmap runs a kernel that it has no rule for once for each unit; who trains can do nothing about it. Once
# and for all: a filter around each call would make Python forget which other warnings it has shown.
warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")


class _Forward(nn.Module):
    """A module's own forward: hooks on the module itself, which surround it, are not run again."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(
        self, args: Sequence[Any], kwargs: dict[str, Any], then: Callable[[Any], Any]
    ) -> Any:
        return then(self.inner.forward(*args, **kwargs))


def _named_once(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter, as `_Forward` names it, once for each module that holds it.

    A module that is registered in two places has two names; what is replaced under both would be put
    back as it was under the first, then as it was under the second: replaced.
    """
    for prefix, part in module.named_modules(prefix="inner"):
        for key, parameter in part._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{key}", parameter


@contextlib.contextmanager
def _left_registered(module: nn.Module) -> Iterator[None]:
    """Parameters are parameters afterwards, also where a forward registers anew what it is given.

    PEFT's does with ``LoraConfig(target_parameters=)``: it makes buffers of the plain tensors there.
    """
    before = [(part, dict(part._parameters)) for part in module.modules()]
    try:
        yield
    finally:
        for part, parameters in before:
            if part._parameters.keys() != parameters.keys():
                for name in parameters:
                    part._buffers.pop(name, None)
                part._parameters.clear()
                part._parameters.update(parameters)


def _as_it_is(outputs: list[Tensor]) -> list[Tensor]:
    return outputs


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
        marks: What it gave, as a rerun must show it.
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
    marks: Marks

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parameters[0].device

    @property
    def numel(self) -> int:
        """How many numbers one unit's gradient has."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def rounds(self) -> bool:
        """Whether numbers may be rounded to fewer digits than float32 has."""
        enabled, autocast = self.autocast
        dtypes = [*[p.dtype for p in self.parameters], *[autocast] * enabled]
        dtypes += [grad.dtype for grad in self.output_grads if grad is not None]
        least = torch.finfo(torch.float32).eps
        return self.device.type != "cpu" or any(torch.finfo(dtype).eps > least for dtype in dtypes)

    def run(
        self,
        values: Sequence[Tensor],
        arguments: Sequence[Any],
        then: Callable[[list[Tensor]], list[Tensor]] = _as_it_is,
    ) -> list[Tensor]:
        """What `then` makes of the tapped outputs with `values` in place of the parameters.

        No other parameter records a gradient. A backward pass must be part of `then`, since checkpoints
        within the module run parts of it again, which must find the same values.
        """
        replaced = dict(zip(map(id, self.parameters), values, strict=True))
        tensors = {
            name: replaced.get(id(parameter), parameter.detach())
            for name, parameter in _named_once(self.module)
        }
        args, kwargs = tree_unflatten(list(arguments), self.spec)
        enabled, dtype = self.autocast

        def finish(output: Any) -> list[Tensor]:
            leaves = tree_leaves(output)
            with torch.autocast(self.device.type, enabled=False):
                return then([leaves[index] for index in self.tapped])

        autocast = torch.autocast(self.device.type, dtype=dtype, enabled=enabled)
        with self.quiet(), autocast, _left_registered(self.module):
            made: list[Tensor] = functional_call(
                _Forward(self.module), tensors, (args, kwargs, finish), tie_weights=False
            )
        return made

    def unit_arguments(self, unit: int) -> list[Any]:
        """What the module would be given for one unit alone."""
        return [
            self._of_unit(leaf, axis, unit) if isinstance(leaf, Tensor) else leaf
            for leaf, axis in zip(self.arguments, self.axes, strict=True)
        ]

    def unit_grads(self, unit: int) -> list[Tensor]:
        """One unit's gradient of each parameter, from this unit's numbers alone."""
        values = [p.detach().requires_grad_() for p in self.parameters]

        def grads_of(outputs: list[Tensor]) -> list[Tensor]:
            place = torch.tensor(unit, device=self.device)
            self.check(self.marks.of_unit(outputs, place), unit)
            grads = self.grads_of(outputs, values, unit)
            return [
                torch.zeros_like(wide(value)) if grad is None else dense(grad)
                for value, grad in zip(values, grads, strict=True)
            ]

        with torch.enable_grad():
            if self.drawn is None:
                return self.run(values, self.unit_arguments(unit), grads_of)
            return self._with_the_same_draws(values, unit, grads_of)

    def check(self, found: Sequence[Tensor], unit: int | None = None) -> None:
        """Refuse outputs of a rerun, for one unit or for all, that are not what the call gave.

        Raises:
            UnrepeatedError: They are not.
        """
        described = type(self.module).__qualname__
        self.marks.check(found, unit, coarse=self.rounds, described=described)

    def misses(self) -> bool:
        """Whether the module also reaches a parameter by a way that replacing it by name leaves open.

        Such a use, say through a list of parameters, would be left out of every gradient.
        """
        originals = [p for p in self.parameters if p.requires_grad]

        def reached(outputs: list[Tensor]) -> list[Tensor]:
            return [grad for grad in self.grads_of(outputs, originals, 0) if grad is not None]

        with torch.enable_grad():
            values = [p.detach() for p in self.parameters]
            return bool(self.run(values, self.unit_arguments(0), reached))

    def grads_of(
        self,
        outputs: Sequence[Tensor],
        values: Sequence[Tensor],
        unit: int | None = None,
        *,
        weights: Tensor | None = None,
    ) -> Sequence[Tensor | None]:
        """Gradients of `values`, from outputs of one unit alone or of all; None where none flows.

        With `weights`, ``(B,)``, from outputs of all, each unit's loss times its weight; the graph is kept.
        """

        def flowing(grad: Tensor, axis: UnitAxis) -> Tensor:
            if weights is not None:
                return axis.scaled(grad, weights)
            return grad if unit is None else self._of_unit(grad, axis, unit)

        pairs = [
            (output, flowing(grad, axis))
            for output, grad, axis in zip(outputs, self.output_grads, self.output_axes, strict=True)
            if grad is not None and output.requires_grad
        ]
        if not pairs:
            return [None for _ in values]
        found: Sequence[Tensor | None] = torch.autograd.grad(
            [output for output, _ in pairs],
            list(values),
            [grad for _, grad in pairs],
            allow_unused=True,
            retain_graph=weights is not None,
        )
        return found

    def _of_unit(self, tensor: Tensor, axis: UnitAxis, unit: int) -> Tensor:
        if axis.dim is None or self.num_units == 1:
            return tensor
        if axis.folded:
            return axis.units_first(tensor, self.num_units)[unit]
        if axis.added:
            return tensor[unit]
        return tensor.narrow(axis.dim, unit, 1)

    def _with_the_same_draws(
        self,
        values: Sequence[Tensor],
        unit: int,
        then: Callable[[list[Tensor]], list[Tensor]],
    ) -> list[Tensor]:
        """What `then` makes of the unit's outputs under the masks that were drawn for it.

        Every unit is replaced by this one, so the shapes and hence the draws are those of the call,
        and nothing of another unit, say a NaN, comes near.
        """
        assert self.drawn is not None
        before, after = self.drawn
        arguments = [
            self._repeated(leaf, axis) if isinstance(leaf, Tensor) else leaf
            for leaf, axis in zip(self.unit_arguments(unit), self.axes, strict=True)
        ]

        def of_unit(outputs: list[Tensor]) -> list[Tensor]:
            if not Randomness.now(self.device).same(after):
                raise UncoveredParameterError(
                    f"{type(self.module).__qualname__}: expected it to draw the same random numbers when "
                    "it is run again. How many it draws depends on the examples, so its dropout masks "
                    "cannot be repeated. Switch its dropout off, or use engine='sequential'."
                )
            return then(
                [
                    output if axis.added else self._of_unit(output, axis, unit)
                    for output, axis in zip(outputs, self.output_axes, strict=True)
                ]
            )

        with kept_randomness(self.device):
            before.restore()
            return self.run(values, arguments, of_unit)

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

        def of_one(
            inputs: Sequence[Tensor], grads: Sequence[Tensor], unit: Tensor
        ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
            arguments = list(self.arguments)
            for place, leaf in zip(places, inputs, strict=True):
                arguments[place] = leaf

            def product(values: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
                outputs = self.run(values, arguments)
                total = wide(values[0]).sum() * 0
                for index, grad in zip(kept, grads, strict=True):
                    total = total + (outputs[index] * grad).sum()
                return total, self.marks.of_unit(outputs, unit)

            found: tuple[tuple[Tensor, ...], list[Tensor]] = torch.func.grad(product, has_aux=True)(
                tuple(p.detach() for p in self.parameters)
            )
            return found

        units = torch.arange(self.num_units, device=self.device)
        found, shown = torch.func.vmap(of_one, randomness="error")(inputs, grads, units)
        self.check(shown)
        return [wide(grad) for grad in found]

    def _stacked(self, tensor: Tensor | None, axis: UnitAxis) -> Tensor:
        assert tensor is not None
        if self.num_units == 1:
            return tensor[None]
        return axis.apart(tensor, self.num_units)
