"""Where each tapped module has its examples: established by running one example alone and doubled.

A first axis that happens to be as long as the micro-batch proves nothing (positions first, or a
table of relative positions, would be silently mis-grouped). So the model is run on one example and on
the same example twice: a module whose first axis goes from 1 to 2 has the examples there, one that
stays at 1 serves all examples at once, anything else is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_dp.engines.base import ExampleLoss
from hf_dp.engines.coverage import Coverage, TapPoint, UnitAxis
from hf_dp.engines.rows import batch_size, row
from hf_dp.errors import UncoveredParameterError

Lengths = dict[str, set[int]]


@torch.no_grad()
def establish_axes(
    model: nn.Module, inputs: Mapping[str, Any], coverage: Coverage, example_loss: ExampleLoss
) -> None:
    """Fill ``coverage.axes`` for every tapped module that the first example reaches.

    Raises:
        UncoveredParameterError: A module has no axis of examples.
    """
    alone = row(inputs, 0)
    single = _first_axes(model, alone, coverage, example_loss)
    double = _first_axes(model, _doubled(alone), coverage, example_loss)
    for point in coverage.points:
        if point.method != "forward" or point.name not in single:
            continue
        pair = (single[point.name], double.get(point.name, set()))
        if pair == ({1}, {2}):
            coverage.axes[point.name] = UnitAxis.FIRST
        elif pair == ({1}, {1}):
            coverage.axes[point.name] = UnitAxis.SHARED
        else:
            raise UncoveredParameterError(
                f"module {point.name!r} ({type(point.module).__qualname__}): expected the examples on "
                "the first axis of its input. Without that axis one example's gradient cannot be told "
                "from another's. Use engine='sequential', or freeze it."
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


def _length_hook(lengths: Lengths, point: TapPoint) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else next(iter(kwargs.values()))
        lengths.setdefault(point.name, set()).add(int(first.shape[0]))

    return note


def _doubled(inputs: Mapping[str, Any]) -> dict[str, Any]:
    size = batch_size(inputs)
    return {
        key: torch.cat([value, value])
        if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == size
        else value
        for key, value in inputs.items()
    }
