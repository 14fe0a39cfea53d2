"""Where each tapped module has its examples: established by running examples alone and doubled.

A first axis that happens to be as long as the micro-batch proves nothing (positions first, a table of
relative positions, or tokens without padding would be silently mis-grouped). So the model is run on one
example and on the same example twice. A module whose first axis goes from 1 to 2 in every call has the
examples there; one that stays at 1, called equally often, serves all examples at once. Anything else is
refused, also a loss that calls the model once per example.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hf_dp.engines.base import ExampleLoss
from hf_dp.engines.coverage import Coverage, TapPoint, UnitAxis
from hf_dp.engines.rows import batch_size, select_rows
from hf_dp.errors import UncoveredParameterError

Lengths = dict[str, list[int]]

_PROBES = 3  # one example alone may by chance look as if it had the axis, say with a single token


@torch.no_grad()
def establish_axes(
    model: nn.Module, inputs: Mapping[str, Any], coverage: Coverage, example_loss: ExampleLoss
) -> None:
    """Fill ``coverage.axes`` for every tapped module that the first examples reach.

    Args:
        model: As the engine will call it.
        inputs: A micro-batch of two or more examples.
        coverage: Its axes are filled.
        example_loss: One loss per example.

    Raises:
        UncoveredParameterError: A module has no axis of examples, or not always the same one.
    """
    axes: dict[str, UnitAxis] = {}
    for index in range(min(batch_size(inputs), _PROBES)):
        single = _first_axes(model, select_rows(inputs, [index]), coverage, example_loss)
        double = _first_axes(model, select_rows(inputs, [index, index]), coverage, example_loss)
        for point in coverage.points:
            if point.name in single:
                axis = _axis(point, single[point.name], double.get(point.name, []))
                if axes.setdefault(point.name, axis) is not axis:
                    raise _without_axis(point)
    coverage.axes = axes


def _axis(point: TapPoint, single: list[int], double: list[int]) -> UnitAxis:
    alone = [1] * len(single)
    if single == alone and double == [2] * len(single):
        return UnitAxis.FIRST
    if single == alone and double == alone:
        return UnitAxis.SHARED
    raise _without_axis(point)


def _without_axis(point: TapPoint) -> UncoveredParameterError:
    return UncoveredParameterError(
        f"module {point.name!r} ({type(point.module).__qualname__}): expected the examples on the first "
        "axis of its input, in one call for all of them. Without that axis one example's gradient cannot "
        "be told from another's. Use engine='sequential', or freeze it."
    )


def _first_axes(
    model: nn.Module, inputs: Mapping[str, Any], coverage: Coverage, example_loss: ExampleLoss
) -> Lengths:
    lengths: Lengths = {}
    with contextlib.ExitStack() as stack:
        for point in coverage.points:
            if point.method == "forward":
                hook = _length_hook(lengths, point)
                stack.enter_context(point.module.register_forward_pre_hook(hook, with_kwargs=True))
        example_loss(model, inputs)
    return lengths


def _length_hook(lengths: Lengths, point: TapPoint) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = point.sole_input(args, kwargs).shape[0]
        lengths.setdefault(point.name, []).append(first)

    return note
