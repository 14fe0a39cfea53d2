"""What a factor is: one parameter's gradient, for every unit; and the factor that is written out.

A factor knows its per-unit norm, its inner product with another factor of the same parameter, and its
weighted sum over units, so a layer needs a single rule. B units, T positions, p inputs, d outputs.
Everything is reduced in float32 or wider, row by row first: one flat float32 reduction over a long
vector loses digits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from hf_dp.layers.packing import Packing

_ROW = 256  # a float32 norm of rows this long is right to 2e-7; of longer ones it loses digits on the CPU


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or as it is when it is at least that wide."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def dense(grad: Tensor) -> Tensor:
    """`wide`; written out if it is sparse, as look-ups in tables with ``sparse=True`` give it."""
    return wide(grad.to_dense() if grad.is_sparse else grad)


class Factor(ABC):
    """The gradient of one parameter for each of B units."""

    @abstractmethod
    def squared_norm(self) -> Tensor:
        """Squared L2 norm per unit, ``(B,)``."""

    @abstractmethod
    def uncancelled(self) -> Tensor:
        """What `squared_norm` would be if positions were orthogonal, ``(B,)``.

        Where it is far above the squared norm, positions cancel, and the rounding of what cancels
        weighs in norm and sum. It errs upwards: squares too small for the dtype are not lost. Of a
        factor that settled on numbers from which both norm and sum come, it is the squared norm.
        """

    @abstractmethod
    def cross(self, other: Factor) -> Tensor:
        """Inner product with another factor of the same parameter, per unit, ``(B,)``."""

    @abstractmethod
    def weighted_sum(self, weights: Tensor) -> Tensor:
        """``sum_i weights[i] * gradient_i``, the parameter's shape; `weights` is ``(B,)``."""

    @abstractmethod
    def without(self, dropped: Tensor) -> Factor:
        """The same with every number of the `dropped` units, ``(B,)`` bool, set to zero.

        Weight zero is not enough: 0 x nan is nan.
        """

    @abstractmethod
    def select(self, units: Tensor) -> Factor:
        """The same for some units only; `units` is ``(B',)``, their indices."""

    @abstractmethod
    def dense(self) -> Vec:
        """The same gradients written out, ``(B, *shape)``."""

    def grouped(self, packing: Packing) -> Factor:
        """The same with rows that belong together as one unit: its gradient is the sum of theirs."""
        return self.dense().grouped(packing)

    def settle(self) -> None:
        """Take the form that is cheapest to keep until the sum; nothing will be merged in any more."""
        return

    def written(self) -> Vec | None:
        """The gradients written out, if norm and sum are to be taken of them."""
        return None

    def merged(self, other: Factor) -> Factor | None:
        """One factor equal to the sum of both, where that costs nothing; else None."""
        return None


class Vec(Factor):
    """Gradients written out, ``(B, *shape)``."""

    def __init__(self, values: Tensor) -> None:
        """Hold `values`, ``(B, *shape)``."""
        self.values = wide(values)

    def squared_norm(self) -> Tensor:
        return squares_of_rows(self.values)

    def uncancelled(self) -> Tensor:
        return self.squared_norm()

    def cross(self, other: Factor) -> Tensor:
        written = other.written()
        if written is None:
            return other.cross(self)
        product = self.values * written.values
        while product.dim() > 1:
            product = product.sum(-1)
        return product

    def weighted_sum(self, weights: Tensor) -> Tensor:
        flat = self.values.reshape(len(weights), -1)
        return torch.mv(flat.mT, weights.to(flat.dtype)).view(self.values.shape[1:])

    def without(self, dropped: Tensor) -> Vec:
        return Vec(zero_rows(self.values, dropped))

    def select(self, units: Tensor) -> Vec:
        return Vec(self.values[units])

    def dense(self) -> Vec:
        return self

    def grouped(self, packing: Packing) -> Vec:
        return self if packing.is_trivial else Vec(packing.added(self.values))

    def written(self) -> Vec | None:
        return self

    def merged(self, other: Factor) -> Factor | None:
        return Vec(self.values + other.values) if isinstance(other, Vec) else None


class Total(Factor):
    """The sum of factors that could not be merged: a parameter used in layers of different kinds."""

    def __init__(self, parts: Sequence[Factor]) -> None:
        """Hold the parts."""
        self.parts = tuple(parts)

    def settle(self) -> None:
        for part in self.parts:
            part.settle()

    def squared_norm(self) -> Tensor:
        squares = sum_of([part.squared_norm() for part in self.parts])
        crosses = [a.cross(b) for i, a in enumerate(self.parts) for b in self.parts[:i]]
        return squares + 2 * sum_of(crosses)

    def uncancelled(self) -> Tensor:
        return sum_of([part.uncancelled() for part in self.parts])

    def cross(self, other: Factor) -> Tensor:
        return sum_of([part.cross(other) for part in self.parts])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        summed, *others = (part.weighted_sum(weights) for part in self.parts)
        for other in others:
            summed += other
        return summed

    def without(self, dropped: Tensor) -> Total:
        return Total([part.without(dropped) for part in self.parts])

    def select(self, units: Tensor) -> Total:
        return Total([part.select(units) for part in self.parts])

    def grouped(self, packing: Packing) -> Total:
        return Total([part.grouped(packing) for part in self.parts])

    def dense(self) -> Vec:
        return Vec(sum_of([part.dense().values for part in self.parts]))


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of a non-empty sequence of tensors."""
    return reduce(torch.add, tensors)


def combine(factors: Sequence[Factor]) -> Factor:
    """One factor for all contributions to one parameter: tied weights, modules called many times."""
    kinds: list[Factor] = []
    for factor in factors:
        for index, kind in enumerate(kinds):
            merged = kind.merged(factor)
            if merged is not None:
                kinds[index] = merged
                break
        else:
            kinds.append(factor)
    return kinds[0] if len(kinds) == 1 else Total(kinds)


def squares_of_rows(values: Tensor) -> Tensor:
    """Squared norm over all axes but the first, ``(B, ...)`` to ``(B,)``, without a tensor of squares."""
    numbers = values[0].numel() if len(values) else 0
    if numbers % _ROW == 0 and numbers > _ROW and values.is_contiguous():
        values = torch.linalg.vector_norm(values.view(-1, numbers // _ROW, _ROW), dim=-1)
    squares = values.square()
    while squares.dim() > 1:
        squares = squares.sum(-1)
    return squares


def squares_of_positions(rows: Tensor) -> Tensor:
    """Squared norm of each row, ``(B, T, width)`` to ``(B, T)``, never below the true one."""
    lost = rows.shape[-1] * torch.finfo(rows.dtype).tiny  # a square below `tiny` may become 0
    return rows.square().sum(-1) + lost


def without_positions(tensor: Tensor) -> Tensor:
    """``(B, 0, ...)``, in memory of its own: a view would hold on to `tensor`'s."""
    return tensor.new_empty(tensor.shape[0], 0, *tensor.shape[2:])


def zero_rows(tensor: Tensor, dropped: Tensor) -> Tensor:
    """`tensor` with the rows of the `dropped` units, ``(B,)`` bool, set to zero."""
    shape = (-1,) + (1,) * (tensor.dim() - 1)
    return tensor.masked_fill(dropped.view(shape), 0)
