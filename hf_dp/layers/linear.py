"""Rules for layers that multiply by a matrix: Linear and GPT-2's Conv1D."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from hf_dp.layers.base import positions, trains
from hf_dp.layers.factors import Factor, Mat, Vec, wide


def linear(
    module: nn.Module, inputs: Tensor, output_grads: Tensor, num_units: int
) -> Iterator[tuple[nn.Parameter, Factor]]:
    """`torch.nn.Linear`: weight ``(d, p)``, gradient ``sum_t g_t x_t^T``; bias ``(d,)``."""
    x, g = positions(inputs, num_units), positions(output_grads, num_units)
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if trains(weight):
        yield weight, Mat(g, x)
    if trains(bias):
        yield bias, Vec(wide(g).sum(1))


def transposed_linear(
    module: nn.Module, inputs: Tensor, output_grads: Tensor, num_units: int
) -> Iterator[tuple[nn.Parameter, Factor]]:
    """``x @ weight + bias`` with weight ``(p, d)``, as GPT-2's Conv1D stores it."""
    x, g = positions(inputs, num_units), positions(output_grads, num_units)
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if trains(weight):
        yield weight, Mat(x, g)
    if trains(bias):
        yield bias, Vec(wide(g).sum(1))
