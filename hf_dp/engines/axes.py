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

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.engines.base import ExampleLoss
from hf_dp.engines.coverage import Coverage, Layout, TapPoint, takes_folded
from hf_dp.engines.probe import (
    Probe,
    Seen,
    axis_of,
    doubled,
    mode_of,
    modes_of,
    run_probe,
    without_axis,
)
from hf_dp.engines.rows import batch_size, select_rows
from hf_dp.engines.sketch import Sketch, in_order
from hf_dp.layers.base import FIRST, FOLDED, ROW, SHARED, UnitAxis
from hf_dp.layers.randomness import Randomness

_PROBES = 3  # one example alone may by chance look as if it had the axis, say with a single token


class _Doubts(Exception):
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
        coverage: Its axes are filled, beside those known of other kinds of calls.
        example_loss: One loss per example.
        probes: How many of the examples to run.

    Returns:
        Tap points that have no axis of examples, or not always the same one, and why.
    """
    axes: dict[str, dict[Hashable, Layout]] = {}
    doubts: dict[str, str] = {}
    device = next(iter(coverage.parameters.values())).device
    for mode in modes_of(model):
        missing = [p for p in coverage.points if p.method == "forward" and p.name not in axes]
        missing = [p for p in missing if p.name not in doubts]
        if not missing:
            break
        before = Randomness.now(device)  # what draws without dropout too has no values to compare
        with mode_of(model, training=mode), torch.no_grad():
            singles: list[Probe] = []
            count = min(batch_size(inputs), probes)
            for index in range(count):
                one, two = (select_rows(inputs, rows) for rows in ([index], [index, index]))
                single = run_probe(model, one, missing, example_loss)
                double = doubled(model, two, missing, example_loss, single)
                singles.append(single)
                for point in missing:
                    try:
                        _learn(point, single, double, axes, compare=not mode)
                    except _Doubts as doubt:
                        doubts.setdefault(point.name, str(doubt))
            if not mode and count > 1 and Randomness.now(device).same(before):
                for order in (list(range(count)), list(range(count))[::-1]):
                    mixed = run_probe(model, select_rows(inputs, order), missing, example_loss)
                    for point in missing:
                        if not _keeps_order(axes.get(point.name, {}), point, singles, mixed, order):
                            doubts.setdefault(point.name, without_axis(point))
    known = coverage.axes or {}  # of kinds of calls that these examples may not have made
    coverage.axes = {
        name: {**known.get(name, {}), **axes.get(name, {})} for name in (*known, *axes)
    }
    return [
        (p, doubts[p.name]) for p in coverage.points if p.method == "forward" and p.name in doubts
    ]


def _learn(
    point: TapPoint,
    single: Probe,
    double: Probe,
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


def _keeps_order(
    layouts: Mapping[Hashable, Layout],
    point: TapPoint,
    singles: Sequence[Probe],
    mixed: Probe,
    order: list[int],
) -> bool:
    """Whether the examples stand where the batch has them, and were not sorted, say, by length."""
    calls = mixed.calls.get(point.name, [])
    alone = [single.calls.get(point.name, []) for single in singles]
    if any(len(one) != len(calls) for one in alone):
        return True  # not comparable
    for place, call in enumerate(calls):
        layout = layouts.get(call.kind)
        if layout is None or any(one[place].kind != call.kind for one in alone):
            continue
        for index, axis in enumerate((*layout.inputs, *layout.outputs)):
            leaves = [call.leaves[index], *(one[place].leaves[index] for one in alone)]
            sketches = [leaf for leaf in leaves if isinstance(leaf, Sketch)]
            if axis is None or axis.dim not in (0, 1) or len(sketches) != len(leaves):
                continue
            rows = [sketch.rows[axis.dim] for sketch in sketches]
            if len(rows[0]) % len(order) == 0 and not in_order(rows[0], rows[1:], order):
                return False
    return True


def _layout(
    point: TapPoint, one: Seen, two: Seen, sizes: Mapping[Any, set[int]], *, compare: bool
) -> Layout:
    found: list[UnitAxis | None] = []
    folds: dict[int, frozenset[tuple[int, Any]]] = {}
    for index, (a, b) in enumerate(zip(one.leaves, two.leaves, strict=True)):
        output = index >= len(one.inputs)
        axis = axis_of(a, b, compare=compare)
        if axis is None and isinstance(a, Sketch) and output:
            axis = SHARED  # refused if a gradient arrives
        elif axis is None and (isinstance(a, Sketch) or not output):
            raise _without_axis(point)
        if axis == FOLDED:
            folds[index] = frozenset(_sources(a, sizes))
            if not folds[index]:
                raise _without_axis(point)
        found.append(axis if isinstance(a, Sketch) else None)
    inputs, outputs = tuple(found[: len(one.inputs)]), tuple(found[len(one.inputs) :])
    layout = Layout(inputs, outputs, folds)
    if point.rule is not None:
        _check_formula(point, layout)
    return layout


def _check_formula(point: TapPoint, layout: Layout) -> None:
    [axis], [output] = layout.inputs, layout.outputs
    if axis is None or axis != output or not (axis in (FIRST, ROW) or takes_folded(point)):
        raise _without_axis(point)


def _merged(point: TapPoint, known: Layout | None, new: Layout) -> Layout:
    """One layout for two calls of one kind; a leaf may be None in some of them, as masks are."""
    if known is None:
        return new
    pairs = [
        (a, b)
        for a, b in zip((*known.inputs, *known.outputs), (*new.inputs, *new.outputs), strict=True)
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


def _sources(leaf: Sketch, sizes: Mapping[Any, set[int]]) -> Iterator[tuple[int, Any]]:
    """Which of the numbers of positions seen explain how many rows one example has."""
    product = 1
    for axes in range(max(1, len(leaf.shape) - 1)):
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


def _without_axis(point: TapPoint) -> _Doubts:
    return _Doubts(without_axis(point))
