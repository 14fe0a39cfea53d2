"""Taps: one autograd function behind each module, through which its gradients are seen.

A tap saves the module's input with ``save_for_backward`` (so that checkpointing recomputes it) and
receives the gradient of the module's output. The parameters' ``requires_grad`` is off while their
module runs, so no ordinary weight gradient is ever computed, and a use of a trainable parameter
outside its tapped module shows in the graph.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_dp.engines.coverage import Coverage, TapPoint, UnitAxis
from hf_dp.errors import UncoveredParameterError


@dataclass
class Call:
    """What one call of a tapped module left behind: input and output gradient."""

    point: TapPoint
    inputs: Tensor
    output_grads: Tensor


@dataclass
class Recording:
    """One forward pass, and its backward passes.

    Attributes:
        parameters: The trainable parameters.
        anchor: A scalar that every tap depends on, so that a graph exists.
        on_call: What the running backward pass does with each call, as soon as its gradient is there.
        uses: Parameter's id -> how often the forward pass used it; a call that did not contribute to
            the losses counts, a recomputation of a checkpoint does not.
    """

    parameters: Sequence[nn.Parameter]
    anchor: Tensor
    on_call: Callable[[Call], None] | None = None
    uses: Counter[int] = field(default_factory=Counter)

    def backward(
        self,
        losses: Tensor,
        names: Sequence[str],
        on_call: Callable[[Call], None],
        *,
        again: bool = False,
    ) -> None:
        """Run a backward pass, handing each call to `on_call`; `again` keeps the graph for one more.

        Raises:
            UncoveredParameterError: A trainable parameter was used outside its tapped module.
        """
        if not losses.requires_grad:
            return  # no trainable parameter took part: every gradient is zero
        self.on_call = on_call
        targets = [self.anchor, *self.parameters]
        found = torch.autograd.grad(losses.sum(), targets, retain_graph=again, allow_unused=True)[
            1:
        ]
        used = [name for name, grad in zip(names, found, strict=True) if grad is not None]
        if used:
            raise UncoveredParameterError(
                f"parameters {used}: expected every use to be inside a module with a layer rule. "
                "A use elsewhere has a gradient that is not clipped. "
                "Use engine='sequential', freeze them, or add a rule for the module that uses them."
            )


class _Tap(torch.autograd.Function):
    """Identity forward; backward hands the output gradient to the recording."""

    @staticmethod
    def forward(
        ctx: Any,
        recording: Recording,
        point: TapPoint,
        anchor: Tensor,
        output: Tensor,
        inputs: Tensor,
    ) -> Tensor:
        ctx.recording, ctx.point = recording, point
        ctx.save_for_backward(inputs)
        return output.detach()  # returning an input would make a view and break in-place operations

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grads: Tensor) -> Any:
        (inputs,) = ctx.saved_tensors
        ctx.recording.on_call(Call(ctx.point, inputs.detach(), output_grads))
        return None, None, ctx.recording.anchor.new_zeros(()), output_grads, None


@contextlib.contextmanager
def recording(coverage: Coverage, num_units: int) -> Iterator[Recording]:
    """Tap every point of `coverage`; hooks and ``requires_grad`` are put back on the way out."""
    parameters = list(coverage.parameters.values())
    anchor = torch.zeros((), device=parameters[0].device, requires_grad=True)
    record = Recording(parameters, anchor)
    with contextlib.ExitStack() as stack:
        stack.callback(_enable, parameters)
        for point in coverage.points:
            axis = (coverage.axes or {}).get(point.name, UnitAxis.FIRST)
            tap = _PointTap(record, point, axis, num_units)
            tap.attach(stack)
        yield record


def _enable(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)


class _PointTap:
    """The hooks of one tap point."""

    def __init__(self, record: Recording, point: TapPoint, axis: UnitAxis, num_units: int) -> None:
        self.record = record
        self.point = point
        self.axis = axis
        self.num_units = num_units

    def attach(self, stack: contextlib.ExitStack) -> None:
        if self.point.method == "forward":
            module = self.point.module
            # next to the module's own forward: other people's hooks stay outside
            stack.enter_context(module.register_forward_pre_hook(self._before))
            after = module.register_forward_hook(self._after, prepend=True, with_kwargs=True)
            stack.enter_context(after)
        else:
            self._wrap_method(stack)

    def _before(self, *_: object) -> None:
        self._set_requires_grad(False)

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        self._set_requires_grad(True)
        inputs = self.point.sole_input(args, kwargs)
        return self._tapped(inputs, output, first=inputs.shape[0])

    def _wrap_method(self, stack: contextlib.ExitStack) -> None:
        """Tap a method's output instead, for ``compute_bias``, whose table has no unit axis."""
        module, name = self.point.module, self.point.method
        table = module.get_submodule("relative_attention_bias")
        original = getattr(module, name)
        seen: list[Tensor] = []

        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            self._set_requires_grad(False)
            handle = table.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            try:
                output = original(*args, **kwargs)
            finally:
                handle.remove()
                self._set_requires_grad(True)
            return self._tapped(seen.pop(), output, first=output.shape[0])

        vars(module)[name] = wrapped
        stack.callback(vars(module).pop, name)

    def _tapped(self, inputs: Tensor, output: Tensor, *, first: int) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        shared = self.axis is UnitAxis.SHARED or self.point.method != "forward"
        if first != (1 if shared else self.num_units):
            raise UncoveredParameterError(
                f"module {self.point.name!r} got an input with {first} rows on its first axis: expected "
                f"{'one row for all examples' if shared else 'one row per example'}. "
                "Without that axis one example's gradient cannot be told from another's. "
                "Use engine='sequential'."
            )
        if shared and self.num_units > 1:
            output = output.expand(self.num_units, *output.shape[1:])
            if self.point.method == "forward":
                inputs = inputs.expand(self.num_units, *inputs.shape[1:])
        if self.record.on_call is None:
            self.record.uses.update(map(id, self.point.parameters))
        apply: Callable[..., Tensor] = _Tap.apply
        tapped = apply(self.record, self.point, self.record.anchor, output, inputs)
        return tapped

    def _set_requires_grad(self, value: bool) -> None:
        for parameter in self.point.parameters:
            parameter.requires_grad_(value)
