"""Rules for normalisation layers: LayerNorm and the RMSNorms."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from hf_dp.layers.base import trains
from hf_dp.layers.factors import Factor, Vec, wide

_EPSILON_NAMES = ("eps", "variance_epsilon", "epsilon")


def layer_norm(
    module: nn.Module, inputs: Tensor, output_grads: Tensor, num_units: int
) -> Iterator[tuple[nn.Parameter, Factor]]:
    """`torch.nn.LayerNorm`: gain gets ``sum_t g_t * xhat_t``, shift gets ``sum_t g_t``."""
    shape: tuple[int, ...] = module.normalized_shape  # type: ignore[assignment]
    eps: float = module.eps  # type: ignore[assignment]
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    g = wide(output_grads)
    if trains(weight):
        products = F.layer_norm(wide(inputs), shape, None, None, eps).mul_(g)
        yield weight, Vec(_over_positions(products, num_units, shape))
    if trains(bias):
        yield bias, Vec(_over_positions(g, num_units, shape))


def rms_norm(
    module: nn.Module, inputs: Tensor, output_grads: Tensor, num_units: int
) -> Iterator[tuple[nn.Parameter, Factor]]:
    """``weight * x / rms(x)``: gain gets ``sum_t g_t * xhat_t``."""
    return _gain(module, inputs, output_grads, num_units, neutral=1.0)


def rms_norm_offset(
    module: nn.Module, inputs: Tensor, output_grads: Tensor, num_units: int
) -> Iterator[tuple[nn.Parameter, Factor]]:
    """``(1 + weight) * x / rms(x)``, as Gemma stores it: the same gradient."""
    return _gain(module, inputs, output_grads, num_units, neutral=0.0)


def _gain(
    module: nn.Module, inputs: Tensor, output_grads: Tensor, num_units: int, *, neutral: float
) -> Iterator[tuple[nn.Parameter, Factor]]:
    weight = module._parameters.get("weight")
    if not trains(weight):
        return
    if inputs.dtype == torch.float64:
        # the module's own arithmetic with a gain of one: it may go through float32
        unscaled = {"weight": torch.full_like(weight, neutral)}
        products = output_grads * functional_call(module, unscaled, (inputs,))
        yield weight, Vec(_over_positions(products, num_units, tuple(weight.shape)))
        return
    x, g = (wide(t).reshape(num_units, -1, len(weight)) for t in (inputs, output_grads))
    # one over the root mean square, (B, T), without a tensor of squares
    squares = torch.linalg.vector_norm(x, dim=-1).square_()
    scale = squares.div_(len(weight)).add_(epsilon_of(module, inputs.dtype)).rsqrt_()
    yield weight, Vec(torch.bmm(scale[:, None], g * x).squeeze(1))


def epsilon_of(module: nn.Module, dtype: torch.dtype) -> float:
    """What the module adds to the mean square, under one of its usual names; None is torch's own."""
    named = [getattr(module, name) for name in _EPSILON_NAMES if hasattr(module, name)]
    return next(
        (float(value) for value in named if isinstance(value, float | int)),
        torch.finfo(dtype).eps if None in named else 0.0,
    )


def _over_positions(products: Tensor, num_units: int, shape: tuple[int, ...]) -> Tensor:
    return products.reshape(num_units, -1, *shape).sum(1)
