"""Rules for convolutions and for GroupNorm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_dp.layers.base import trains
from hf_dp.layers.factors import Factor, Mat, Vec, wide
from hf_dp.layers.packing import Packing


class Reshaped(Factor):
    """A factor of another shape: the gradient of a kernel, kept as that of a matrix."""

    def __init__(self, inner: Factor, shape: tuple[int, ...]) -> None:
        """Show `inner` as gradients of `shape`."""
        self.inner = inner
        self.shape = shape

    def squared_norm(self) -> Tensor:
        return self.inner.squared_norm()

    def uncancelled(self) -> Tensor:
        return self.inner.uncancelled()

    def cross(self, other: Factor) -> Tensor:
        if isinstance(other, Reshaped):
            return self.inner.cross(other.inner)
        return self.dense().cross(other)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.inner.weighted_sum(weights).view(self.shape)

    def without(self, dropped: Tensor) -> Reshaped:
        return Reshaped(self.inner.without(dropped), self.shape)

    def select(self, units: Tensor) -> Reshaped:
        return Reshaped(self.inner.select(units), self.shape)

    def grouped(self, packing: Packing) -> Reshaped:
        return Reshaped(self.inner.grouped(packing), self.shape)

    def dense(self) -> Vec:
        values = self.inner.dense().values
        return Vec(values.reshape(len(values), *self.shape))

    def settle(self) -> None:
        self.inner.settle()

    def merged(self, other: Factor) -> Factor | None:
        if not isinstance(other, Reshaped):
            return None
        inner = self.inner.merged(other.inner)
        return None if inner is None else Reshaped(inner, self.shape)


def convolution(
    module: nn.Module, inputs: Tensor, output_grads: Tensor, num_units: int
) -> Iterator[tuple[nn.Parameter, Factor]]:
    """`torch.nn.Conv1d`, 2d and 3d: a matrix product over the windows; bias ``(d,)``."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    g = output_grads.flatten(2)  # (B, d, L)
    if trains(weight):
        product = Mat(g.mT, windows(module, inputs))
        yield weight, Reshaped(product, tuple(weight.shape))
    if trains(bias):
        yield bias, Vec(wide(g).sum(2))


def windows(module: nn.Module, inputs: Tensor) -> Tensor:
    """What each output position sees, ``(B, L, channels * kernel)``."""
    kernel: tuple[int, ...] = module.kernel_size  # type: ignore[assignment]
    stride: tuple[int, ...] = module.stride  # type: ignore[assignment]
    dilation: tuple[int, ...] = module.dilation  # type: ignore[assignment]
    before_and_after: list[int] = module._reversed_padding_repeated_twice  # type: ignore[assignment]
    x = F.pad(inputs, before_and_after) if any(before_and_after) else inputs
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
    dims = len(kernel)
    order = (0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    return x.permute(order).flatten(1 + dims).flatten(1, dims)  # (B, out..., C, kernel...)


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether `convolution` covers this layer's options; depthwise ones are taken generically."""
    return getattr(module, "groups", 0) == 1 and getattr(module, "padding_mode", "") == "zeros"


def group_norm(
    module: nn.Module, inputs: Tensor, output_grads: Tensor, num_units: int
) -> Iterator[tuple[nn.Parameter, Factor]]:
    """`torch.nn.GroupNorm`: gain gets ``sum g * xhat`` over space, shift gets ``sum g``."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    g = wide(output_grads)
    if trains(weight):
        groups: int = module.num_groups  # type: ignore[assignment]
        eps: float = module.eps  # type: ignore[assignment]
        normalised = F.group_norm(wide(inputs), groups, None, None, eps)
        yield weight, Vec(_over_space(g * normalised))
    if trains(bias):
        yield bias, Vec(_over_space(g))


def _over_space(products: Tensor) -> Tensor:
    return products if products.dim() == 2 else torch.sum(products.flatten(2), 2)
