"""Where each tapped module has its examples: established by running examples alone and doubled.

A first axis that happens to be as long as the micro-batch proves nothing (positions first, a table of
relative positions, or tokens without padding would be silently mis-grouped). So the model is run on one
example and on the same example twice. An axis that goes from 1 to 2 in every call has the examples; a
tensor that stays as it is serves all at once; a first axis that doubles has rows folded into it, which
is believed only if its values are those of the one example twice over, and its length follows from the
numbers of positions that the batch shows. Anything else is refused, also a loss that calls the model
once per example.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.engines.base import ExampleLoss
from hf_dp.engines.coverage import Coverage, Layout, NotTappableError, TapPoint, takes_folded
from hf_dp.engines.rows import batch_size, select_rows
from hf_dp.engines.tap import note_sizes
from hf_dp.engines.whole_tap import Leaves, kind_of_call
from hf_dp.layers.base import FIRST, FOLDED, SHARED, UnitAxis

_PROBES = 3  # one example alone may by chance look as if it had the axis, say with a single token
_CLOSE = 1e-2  # of the largest entry: rounding in any dtype; rows of another position differ by more


@dataclass
class _Seen:
    """One call of a tapped module in a probe."""

    kind: Hashable
    inputs: list[Any]
    outputs: list[Any]

    @property
    def leaves(self) -> list[Any]:
        return [*self.inputs, *self.outputs]


@dataclass
class _Probe:
    """What one forward pass showed."""

    calls: dict[str, list[_Seen]] = field(default_factory=dict)
    sizes: dict[Any, set[int]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


class _Doubts(Exception):  # noqa: N818 (a reason, not an error: the parameter climbs)
    """Why a module's examples cannot be told apart."""


def establish_axes(
    model: nn.Module,
    inputs: Mapping[str, Any],
    coverage: Coverage,
    example_loss: ExampleLoss,
    *,
    probes: int = _PROBES,
) -> list[tuple[TapPoint, str]]:
    """Fill ``coverage.axes`` for every tapped module that the first examples reach.

    Dropout is off, so that values can be compared; what only runs in training mode is then looked at
    in that mode, without folded axes.

    Args:
        model: As the engine will call it.
        inputs: A micro-batch of two or more examples.
        coverage: Its axes are filled.
        example_loss: One loss per example.
        probes: How many of the examples to run.

    Returns:
        Tap points that have no axis of examples, or not always the same one, and why.
    """
    axes: dict[str, dict[Hashable, Layout]] = {}
    doubts: dict[str, str] = {}
    training = model.training
    for mode in (False, True) if training else (False,):
        missing = [p for p in coverage.points if p.method == "forward" and p.name not in axes]
        missing = [p for p in missing if p.name not in doubts]
        if not missing:
            break
        with _mode(model, training=mode), torch.no_grad():
            for index in range(min(batch_size(inputs), probes)):
                single, double = (
                    _probe(model, select_rows(inputs, rows), missing, example_loss)
                    for rows in ([index], [index, index])
                )
                for point in missing:
                    try:
                        _learn(point, single, double, axes, compare=not mode)
                    except _Doubts as doubt:
                        doubts.setdefault(point.name, str(doubt))
    coverage.axes = axes
    return [
        (p, doubts[p.name]) for p in coverage.points if p.method == "forward" and p.name in doubts
    ]


@contextlib.contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Every module in evaluation mode, or each as it is."""
    before = {module: module.training for module in model.modules()}
    try:
        if not training:
            model.eval()
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _learn(
    point: TapPoint,
    single: _Probe,
    double: _Probe,
    axes: dict[str, dict[Hashable, Layout]],
    *,
    compare: bool,
) -> None:
    for probe in (single, double):
        if point.name in probe.refused:
            raise _Doubts(probe.refused[point.name])
    alone, twice = single.calls.get(point.name, []), double.calls.get(point.name, [])
    if len(alone) != len(twice):
        raise _without_axis(point)
    known = axes.setdefault(point.name, {}) if alone else {}
    for one, two in zip(alone, twice, strict=True):
        if one.kind != two.kind:
            raise _without_axis(point)
        layout = _layout(point, one, two, single.sizes, compare=compare)
        known[one.kind] = _merged(point, known.get(one.kind), layout)


def _layout(
    point: TapPoint, one: _Seen, two: _Seen, sizes: Mapping[Any, set[int]], *, compare: bool
) -> Layout:
    found: list[UnitAxis | None] = []
    folds: dict[int, frozenset[tuple[int, Any]]] = {}
    for index, (a, b) in enumerate(zip(one.leaves, two.leaves, strict=True)):
        output = index >= len(one.inputs)
        axis = _axis(a, b, compare=compare)
        if axis is None and isinstance(a, Tensor) and output:
            axis = SHARED  # refused if a gradient arrives
        elif axis is None and (isinstance(a, Tensor) or not output):
            raise _without_axis(point)
        if axis == FOLDED:
            folds[index] = frozenset(_sources(a, sizes))
            if not folds[index]:
                raise _without_axis(point)
        found.append(axis if isinstance(a, Tensor) else None)
    inputs, outputs = tuple(found[: len(one.inputs)]), tuple(found[len(one.inputs) :])
    layout = Layout(inputs, outputs, folds)
    if point.rule is not None:
        _check_formula(point, layout, one)
    return layout


def _check_formula(point: TapPoint, layout: Layout, one: _Seen) -> None:
    [axis], [output] = layout.inputs, layout.outputs
    row = one.inputs[0].shape[0] == 1 and one.outputs[0].shape[0] == 1
    shared_row = axis is SHARED and (row or takes_folded(point))
    first = axis == FIRST or (takes_folded(point) and axis is not SHARED)
    if axis != output or not (shared_row or first):
        raise _without_axis(point)


def _merged(point: TapPoint, known: Layout | None, new: Layout) -> Layout:
    """One layout for two calls of one kind; a leaf may be None in some of them, as masks are."""
    if known is None:
        return new
    pairs = [
        (a, b)
        for a, b in zip(
            (*known.inputs, *known.outputs), (*new.inputs, *new.outputs), strict=True
        )
    ]
    if any(a is not None and b is not None and a != b for a, b in pairs):
        raise _without_axis(point)
    both = [a if b is None else b for a, b in pairs]
    folds = {
        index: known.folds.get(index, sources) & new.folds.get(index, sources)
        for index, sources in {**known.folds, **new.folds}.items()
    }
    if any(not sources for sources in folds.values()):
        raise _without_axis(point)
    count = len(known.inputs)
    return Layout(tuple(both[:count]), tuple(both[count:]), folds)


def _axis(one: Any, two: Any, *, compare: bool) -> UnitAxis | None:
    """Where a leaf has the examples, given alone and doubled; None if that does not show."""
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return SHARED if type(one) is type(two) and _equal(one, two) else None
    if one.dim() != two.dim():
        return None
    grown = [d for d, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
    if not grown:
        return SHARED
    if len(grown) > 1 or two.shape[grown[0]] != 2 * one.shape[grown[0]]:
        return None
    if one.shape[grown[0]] == 1:
        return UnitAxis(grown[0])
    return FOLDED if grown == [0] and compare and _twice_over(one, two) else None


def _equal(one: Any, two: Any) -> bool:
    try:
        return bool(one is two or one == two)
    except Exception:  # foreign objects may compare in any way
        return False


def _twice_over(one: Tensor, two: Tensor) -> bool:
    """Whether `two` is `one` twice, one after the other, and not row by row."""
    if not bool((one != one[:1]).any()):
        return False  # rows that are all alike do not show their order
    if not one.is_floating_point():
        return torch.equal(torch.cat([one, one]), two)
    finite = one[torch.isfinite(one)].abs()
    scale = float(finite.max()) if len(finite) else 0.0
    return torch.allclose(torch.cat([one, one]), two, rtol=0, atol=_CLOSE * scale, equal_nan=True)


def _sources(leaf: Tensor, sizes: Mapping[Any, set[int]]) -> Iterator[tuple[int, Any]]:
    """Which of the numbers of positions seen explain how many rows one example has."""
    product = 1
    for axes in range(max(1, leaf.dim() - 1)):
        product *= leaf.shape[axes]
        yield from ((axes + 1, source) for source, seen in sizes.items() if seen == {product})


def unexplained(
    folds: Sequence[tuple[TapPoint, int, frozenset[tuple[int, Any]], Tensor]],
    sizes: Mapping[Any, set[int]],
    num_units: int,
) -> TapPoint | None:
    """The first tap point whose folded rows are not as many as this pass's positions; None if all are.

    Rows of unpadded examples, whose number depends on what they hold, are found out here.
    """
    for point, _, sources, leaf in folds:
        present = [(axes, sizes[source]) for axes, source in sources if source in sizes]
        if not present or any(
            seen != {leaf.shape[:axes].numel() // num_units} for axes, seen in present
        ):
            return point
    return None


def sizes_of(inputs: Mapping[str, Any]) -> dict[Any, set[int]]:
    """The numbers of positions that the batch's own tensors show."""
    sizes: dict[Any, set[int]] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            note_sizes(sizes, f"batch {name}", value)
    return sizes


def _without_axis(point: TapPoint) -> _Doubts:
    return _Doubts(
        f"{point.described}: expected the examples on one axis of its input, in one call for all of "
        "them. Without that axis one example's gradient cannot be told from another's."
    )


def _probe(
    model: nn.Module,
    inputs: Mapping[str, Any],
    points: Sequence[TapPoint],
    example_loss: ExampleLoss,
) -> _Probe:
    probe = _Probe(sizes=sizes_of(inputs))
    with contextlib.ExitStack() as stack:
        for point in points:
            hook = _note(probe, point)
            stack.enter_context(
                point.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            )
        example_loss(model, inputs)
    return probe


def _note(probe: _Probe, point: TapPoint) -> Callable[..., None]:
    def note(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if point.rule is not None:
            try:
                given = [point.sole_input(args, kwargs)]
            except NotTappableError as error:
                probe.refused[point.name] = str(error)
                return
            if not isinstance(output, Tensor) or output.dim() == 0:
                probe.refused[point.name] = str(_without_axis(point))
                return
            seen = _Seen(None, given, [output])
            note_sizes(probe.sizes, point.name, given[0])
        else:
            taken, returned = Leaves.of((args, kwargs)), Leaves.of(output)
            if (hidden := taken.opaque() or returned.opaque()) is not None:
                probe.refused[point.name] = f"{point.described} takes or returns a {hidden}."
                return
            seen = _Seen(kind_of_call(taken, returned), taken.values, returned.values)
        seen.inputs, seen.outputs = _kept(seen.inputs), _kept(seen.outputs)
        probe.calls.setdefault(point.name, []).append(seen)

    return note


def _kept(leaves: Sequence[Any]) -> list[Any]:
    """Tensors as they are now, since the model may go on to change them in place."""
    return [
        leaf.clone() if isinstance(leaf, Tensor) and _may_be_folded(leaf) else leaf
        for leaf in leaves
    ]


def _may_be_folded(leaf: Tensor) -> bool:
    return leaf.dim() > 0 and leaf.shape[0] > 1
