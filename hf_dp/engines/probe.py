"""Running the model on a few examples and noting what each tapped module was given and gave back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from hf_dp.engines.base import ExampleLoss, is_out_of_memory
from hf_dp.engines.coverage import NotTappableError, TapPoint
from hf_dp.engines.sketch import Sketch
from hf_dp.engines.tap import note_sizes
from hf_dp.engines.undisturbed import evaluation_flags, without_fast_path
from hf_dp.engines.whole_tap import Leaves, kind_of_call
from hf_dp.layers.base import FOLDED, ROW, SHARED, UnitAxis, repeated


@dataclass
class Seen:
    """One call of a tapped module in a probe."""

    kind: Hashable
    inputs: list[Any]
    outputs: list[Any]

    @property
    def leaves(self) -> list[Any]:
        return [*self.inputs, *self.outputs]


@dataclass
class Probe:
    """What one forward pass showed."""

    calls: dict[str, list[Seen]] = field(default_factory=dict)
    sizes: dict[Any, set[int]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def modes_of(model: nn.Module) -> tuple[bool, ...]:
    """The modes to look at a model in, for `mode_of`: in evaluation, and as it is if any module trains."""
    return (False, True) if any(module.training for module in model.modules()) else (False,)


@contextlib.contextmanager
def mode_of(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Every module's flag set to evaluation, or each as it is; no other code runs than in training."""
    before = {module: module.training for module in model.modules()}
    try:
        if not training:
            evaluation_flags(model)
        with without_fast_path():
            yield
    finally:
        for module, mode in before.items():
            module.training = mode


def doubled(
    model: nn.Module,
    inputs: Mapping[str, Any],
    points: Sequence[TapPoint],
    example_loss: ExampleLoss,
    single: Probe,
) -> Probe:
    """The example twice, with the outputs that serve all repeated as taps will repeat them."""
    try:
        return run_probe(model, inputs, points, example_loss, single)
    except Exception as error:  # it does not expect them repeated: the trial will see to that
        if is_out_of_memory(error):
            raise
        return run_probe(model, inputs, points, example_loss)


def run_probe(
    model: nn.Module,
    inputs: Mapping[str, Any],
    points: Sequence[TapPoint],
    example_loss: ExampleLoss,
    alone: Probe | None = None,
) -> Probe:
    """One forward pass; with `alone`, outputs that are as they were there are repeated on the way."""
    probe = Probe(sizes=sizes_of(inputs))
    with contextlib.ExitStack() as stack:
        for point in points:
            hook = _note(probe, point, alone)
            stack.enter_context(
                point.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            )
        example_loss(model, inputs)
    return probe


def _note(probe: Probe, point: TapPoint, alone: Probe | None) -> Callable[..., Any]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if point.rule is not None:
            try:
                given = [point.sole_input(args, kwargs)]
            except NotTappableError as error:
                probe.refused[point.name] = str(error)
                return output
            if not isinstance(output, Tensor) or output.dim() == 0:
                probe.refused[point.name] = without_axis(point)
                return output
            seen = Seen(None, given, [output])
            note_sizes(probe.sizes, point.name, given[0])
        else:
            taken, returned = Leaves.of((args, kwargs)), Leaves.of(output)
            if (hidden := taken.opaque() or returned.opaque()) is not None:
                probe.refused[point.name] = f"{point.described} takes or returns a {hidden}."
                return output
            seen = Seen(kind_of_call(taken, returned), taken.values, returned.values)
        seen.inputs, seen.outputs = _kept(seen.inputs), _kept(seen.outputs)
        calls = probe.calls.setdefault(point.name, [])
        calls.append(seen)
        before = [] if alone is None else alone.calls.get(point.name, [])[len(calls) - 1 :]
        return _repeated(point, output, before[0], seen) if before else output

    return note


def _repeated(point: TapPoint, output: Any, one: Seen, two: Seen) -> Any:
    """The output as a tap would hand it on: what serves all examples, once for each."""
    axes = [axis_of(a, b, compare=False) for a, b in zip(one.leaves, two.leaves, strict=True)]
    if point.generic is None:
        shared = all(axis is not None and axis.dim is None for axis in axes)
        return repeated(output, axes[1] or SHARED, 2)[0] if shared else output
    if not point.generic.repeats:
        return output
    returned = Leaves.of(output)
    for index in returned.floating:
        axis, leaf = axes[len(one.inputs) + index], returned.values[index]
        if axis is not None and axis.dim is None and leaf.dim() > 0:
            returned.values[index] = repeated(leaf, axis, 2)[0]
    return tree_unflatten(returned.values, returned.spec)


def _kept(leaves: Sequence[Any]) -> list[Any]:
    return [Sketch.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def axis_of(one: Any, two: Any, *, compare: bool) -> UnitAxis | None:
    """Where a leaf has the examples, given alone and doubled; None if that does not show."""
    if not isinstance(one, Sketch) or not isinstance(two, Sketch):
        return SHARED if type(one) is type(two) and _equal(one, two) else None
    if len(one.shape) != len(two.shape):
        return None
    grown = [d for d, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
    if not grown:
        return ROW if one.shape[:1] == (1,) else SHARED
    if len(grown) > 1 or two.shape[grown[0]] != 2 * one.shape[grown[0]]:
        return None
    if one.shape[grown[0]] == 1:
        return UnitAxis(grown[0])
    return FOLDED if grown == [0] and compare and one.twice_over(two) else None


def _equal(one: Any, two: Any) -> bool:
    try:
        return bool(one is two or one == two)
    except Exception:  # foreign objects may compare in any way
        return False


def sizes_of(inputs: Mapping[str, Any]) -> dict[Any, set[int]]:
    """The numbers of positions that the batch's own tensors show."""
    sizes: dict[Any, set[int]] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            note_sizes(sizes, f"batch {name}", value)
    return sizes


def without_axis(point: TapPoint) -> str:
    """What is wrong where no axis of examples shows."""
    return (
        f"{point.described}: expected the examples on one axis of its input, in one call for all of "
        "them. Without that axis one example's gradient cannot be told from another's."
    )
