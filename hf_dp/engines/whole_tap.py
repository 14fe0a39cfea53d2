"""The tap behind a module without a formula: everything that goes in and comes out."""

from __future__ import annotations

import enum
import types
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hf_dp.engines.coverage import Layout, NotTappableError, TapPoint
from hf_dp.engines.tap import Call, PointTap, Recording
from hf_dp.layers.base import FIRST, SHARED, UnitAxis, repeated
from hf_dp.layers.randomness import Randomness
from hf_dp.layers.repeats import Marks
from hf_dp.layers.whole import WholeCall

# What a module may be given beside tensors, because it cannot hold a gradient or change on the way.
_INERT = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    slice,
    range,
    enum.Enum,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
    torch.Size,
    torch.layout,
    torch.memory_format,
    frozenset,
)


class NoOutputAxisError(NotTappableError):
    """The loss depends on an output that serves all examples alike."""


@dataclass
class Leaves:
    """The leaves of what a module was given, or gave back, and their structure."""

    values: list[Any]
    spec: TreeSpec

    @classmethod
    def of(cls, tree: Any) -> Leaves:
        """Flatten lists, tuples, dicts and whatever is registered with torch's pytree."""
        return cls(*tree_flatten(tree))

    @property
    def tensors(self) -> list[int]:
        """The places of the tensors."""
        return [i for i, leaf in enumerate(self.values) if isinstance(leaf, Tensor)]

    @property
    def floating(self) -> list[int]:
        """The places of the tensors that may have a gradient."""
        return [i for i in self.tensors if self.values[i].is_floating_point()]

    @property
    def any_complex(self) -> bool:
        """Whether some tensor is complex."""
        return any(self.values[i].is_complex() for i in self.tensors)

    def opaque(self) -> str | None:
        """The type of a leaf that may hold tensors unseen, in words; None if there is none."""
        for leaf in self.values:
            if not isinstance(leaf, Tensor) and not isinstance(leaf, _INERT):
                name = type(leaf).__qualname__
                return f"{name} (use_cache=False leaves it out)" if "Cache" in name else name
        return None


def kind_of_call(given: Leaves, returned: Leaves) -> Hashable:
    """What calls must have in common for the examples to be in the same places."""
    return (given.spec, returned.spec)


@dataclass
class _Noted:
    """What a tap keeps of a call beside its tensors."""

    arguments: list[Any]  # None in place of tensors
    spec: TreeSpec
    places: list[int]
    axes: list[UnitAxis]
    output_axes: list[UnitAxis]
    tapped: list[int]
    drawn: tuple[Randomness, Randomness] | None
    autocast: tuple[bool, torch.dtype]
    marks: Marks


class WholeTap(PointTap):
    """Taps all outputs of a module and keeps all its inputs."""

    def __init__(self, record: Recording, point: TapPoint, *args: Any) -> None:
        """As `PointTap`; calls of one module may be nested."""
        super().__init__(record, point, *args)
        self.begun: list[tuple[Randomness, list[tuple[Tensor, int]]]] = []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().before(module, args, kwargs)
        if self.record.silent:
            return
        given = Leaves.of((args, kwargs))
        versions = [(leaf, leaf._version) for leaf in given.values if _counted(leaf)]
        self.begun.append((Randomness.now(self.record.anchor.device), versions))

    def tapped(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        drew, versions = self.begun.pop()
        given, returned = Leaves.of((args, kwargs)), Leaves.of(output)
        self._refuse_hidden(given, returned, versions)
        layout = self._layout(given, returned)
        tapped = returned.floating
        outputs = [returned.values[index] for index in tapped]
        axes = [layout.outputs[index] or SHARED for index in tapped]
        if self._repeats:
            for place, axis in enumerate(axes):
                if axis.dim is None and outputs[place].dim() > 0:
                    outputs[place], axes[place] = repeated(
                        outputs[place], axis, self.record.num_units
                    )
        now = Randomness.now(drew.device)
        device = drew.device.type
        noted = _Noted(
            [None if isinstance(leaf, Tensor) else leaf for leaf in given.values],
            given.spec,
            given.tensors,
            [axis or SHARED for axis in layout.inputs],
            axes,
            tapped,
            None if now.same(drew) else (drew, now),
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
            Marks(outputs, axes, self.record.num_units),
        )
        inputs = [given.values[index] for index in given.tensors]
        seen = self.record.through(self.point, (noted, self.record), outputs, inputs)
        for index, leaf in zip(tapped, seen, strict=True):
            returned.values[index] = leaf
        return tree_unflatten(returned.values, returned.spec)

    def set_requires_grad(self, value: bool) -> None:
        recomputing = self.record.on_call is not None
        held = recomputing and any(p is q for p in self.record.held for q in self.point.parameters)
        if not (value and held):
            super().set_requires_grad(value)

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not self.record.silent and not torch.is_grad_enabled():
            self.begun.pop()
        return super().after(module, args, kwargs, output)

    def _refuse_hidden(
        self, given: Leaves, returned: Leaves, versions: Sequence[tuple[Tensor, int]]
    ) -> None:
        opaque = given.opaque() or returned.opaque()
        if opaque is not None:
            raise NotTappableError(
                self.point,
                f"{self.point.described} takes or returns a {opaque}: expected tensors, lists, tuples, "
                "dicts and numbers. What else holds tensors hides their gradients. "
                "Use engine='sequential', or freeze it.",
            )
        if returned.any_complex:
            raise NotTappableError(
                self.point,
                f"{self.point.described} returns complex numbers: expected real ones, whose gradients are "
                "followed. Use engine='sequential', or freeze it.",
            )
        if any(leaf._version != version for leaf, version in versions):
            raise NotTappableError(
                self.point,
                f"{self.point.described} changes what it is given in place: expected it to return what "
                "it computes. It could not be run again. Use engine='sequential', or freeze it.",
            )

    def _layout(self, given: Leaves, returned: Leaves) -> Layout:
        if self.record.num_units == 1:
            return Layout(
                tuple(SHARED for _ in given.values), tuple(FIRST for _ in returned.values)
            )
        layout = self.layouts.get(kind_of_call(given, returned))
        if layout is None:
            raise self.unseen()
        axes = (*layout.inputs, *layout.outputs)
        for index, (axis, leaf) in enumerate(
            zip(axes, (*given.values, *returned.values), strict=True)
        ):
            if isinstance(leaf, Tensor):
                self.check_rows(layout, index, axis, leaf)
        return layout

    @property
    def _repeats(self) -> bool:
        generic = self.point.generic
        return generic is not None and generic.repeats and self.record.num_units > 1


def _counted(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_inference()


def whole_call(call: Call, num_units: int) -> WholeCall:
    """What the generic rule needs of a call.

    Raises:
        NotTappableError: A gradient arrived at an output that has no axis of examples.
    """
    noted: _Noted
    noted, record = call.context
    arguments = list(noted.arguments)
    for place, leaf in zip(noted.places, call.inputs, strict=True):
        arguments[place] = leaf
    for axis, grad in zip(noted.output_axes, call.output_grads, strict=True):
        if grad is not None and axis.dim is None and num_units > 1:
            raise NoOutputAxisError(
                call.point,
                f"{call.point.described} returns a tensor without an axis of examples: expected the "
                "examples on one axis of everything that the loss depends on. Without it one "
                "example's gradient cannot be told from another's. "
                "Use engine='sequential', or freeze it.",
            )
    return WholeCall(
        module=call.point.module,
        parameters=call.point.parameters,
        arguments=arguments,
        spec=noted.spec,
        axes=noted.axes,
        tapped=noted.tapped,
        output_grads=list(call.output_grads),
        output_axes=noted.output_axes,
        num_units=num_units,
        drawn=noted.drawn,
        quiet=record.quiet,
        autocast=noted.autocast,
        marks=noted.marks,
    )
