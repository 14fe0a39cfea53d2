"""The tap behind a module that has a formula: one tensor in, one tensor out."""

from __future__ import annotations

import contextlib
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.engines.coverage import Coverage, Layout, NotTappableError, TapPoint, takes_folded
from hf_dp.engines.tap import PointTap, Recording, note_sizes
from hf_dp.layers.base import FIRST, FOLDED, repeated

_EVERY_UNIT_FIRST = Layout((FIRST,), (FIRST,))


class FormulaTap(PointTap):
    """A module with one input and one output, for which there is a formula."""

    def __init__(self, record: Recording, point: TapPoint, coverage: Coverage) -> None:
        """As `PointTap`."""
        super().__init__(record, point, coverage)
        known = self.layouts.get(None)
        self._usual = (
            record.num_units > 1
            and not self.counts
            and known is not None
            and known.inputs == known.outputs == (FIRST,)
        )

    def attach(self, stack: contextlib.ExitStack) -> None:
        if self.point.method == "forward":
            self._wrap_forward(stack)
        else:
            self._wrap_method(stack)

    def _wrap_forward(self, stack: contextlib.ExitStack) -> None:
        """Tap the forward method itself: a fifth of what torch's hooks take, and as far inside."""
        module = self.point.module
        own = vars(module)
        original, replaced = module.forward, own.get("forward")
        own["forward"] = _Forward(self, original, replaced)
        stack.callback(_put_back, own, replaced)

    def tapped(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        inputs = self.point.sole_input(args, kwargs)
        if self._usual and inputs.shape[0] == self.record.num_units:
            return self.record.through(self.point, FIRST, (output,), (inputs,))[0]
        units = self.record.num_units
        if units == 1:
            layout = _of_one(inputs, output)
            if layout.inputs[0] == FOLDED and not takes_folded(self.point):
                raise NotTappableError(
                    self.point,
                    f"{self.point.described} got a first axis of {inputs.shape[0]} for one example: "
                    "expected 1. Its layer rule does not know what folded rows do to the gradient. "
                    "Use engine='sequential', or freeze it.",
                )
        else:
            known = self.layouts.get(None)
            if known is None:
                raise self.unseen()
            layout = known
            self.check_rows(layout, 0, layout.inputs[0], inputs)
            if self.counts and layout.inputs[0] == FIRST:
                note_sizes(self.record.sizes, self.point.name, inputs)
            if layout.shared:
                inputs = repeated(inputs, layout.inputs[0], units)[0]
                output = repeated(output, layout.outputs[0], units)[0]
        axis = FIRST if layout.shared else layout.inputs[0]
        return self.record.through(self.point, axis, (output,), (inputs,))[0]

    def _wrap_method(self, stack: contextlib.ExitStack) -> None:
        """Tap a method's output instead, for ``compute_bias``, whose table has no unit axis."""
        module, name = self.point.module, self.point.method
        table = module.get_submodule("relative_attention_bias")
        original = getattr(module, name)
        seen: list[Tensor] = []

        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            if self.record.silent:
                out: Tensor = original(*args, **kwargs)
                return out
            self.set_requires_grad(False)
            handle = table.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            try:
                output: Tensor = original(*args, **kwargs)
            finally:
                handle.remove()
                self.set_requires_grad(True)
            ids = seen.pop()
            if not torch.is_grad_enabled():
                return output
            if output.dim() != 4 or output.shape[0] != 1:
                raise self.unseen()
            output = output.expand(self.record.num_units, *output.shape[1:])
            return self.record.through(self.point, FIRST, (output,), (ids,))[0]

        vars(module)[name] = wrapped
        stack.callback(vars(module).pop, name)


class _Forward:
    """A module's forward with the tap behind it; copies of the module, as pickles, get it without."""

    def __init__(self, tap: FormulaTap, original: Any, replaced: Any) -> None:
        self._tap, self._original, self._replaced = tap, original, replaced
        self._record, self._parameters = tap.record, tap.point.parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._record.silent:
            return self._original(*args, **kwargs)
        for parameter in self._parameters:
            parameter.requires_grad = False
        try:
            output = self._original(*args, **kwargs)
        finally:
            for parameter in self._parameters:
                parameter.requires_grad = True
        if torch.is_grad_enabled():
            return self._tap.tapped(args, kwargs, output)
        self._record.without = True
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        if self._replaced is not None:
            return _itself, (self._replaced,)
        return _own_forward, (self._tap.point.module,)


def _own_forward(module: nn.Module) -> MethodType:
    return MethodType(type(module).forward, module)


def _itself(given: Any) -> Any:
    return given


def _put_back(own: dict[str, Any], replaced: Any) -> None:
    if replaced is None:
        own.pop("forward", None)
    else:
        own["forward"] = replaced


def _of_one(inputs: Tensor, output: Tensor) -> Layout:
    """All rows of a batch of one are the one's."""
    if inputs.shape[0] == 1 and output.shape[0] == 1:
        return _EVERY_UNIT_FIRST
    whole = FOLDED
    return Layout((whole,), (whole,))
