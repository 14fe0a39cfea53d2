"""One parameter's gradient, for every unit, in factored form.

A factor knows its per-unit norm, its inner product with another factor of the same parameter, and its
weighted sum over units, so a layer needs a single rule. B units, T positions, p inputs, d outputs.
Everything is reduced in float32 or wider, row by row first: one flat float32 reduction over a long
vector loses digits.

Source:
    The Gram form of the norm: Li et al. (2022), arXiv:2110.05679, section 4; Bu et al. (2023),
    arXiv:2210.00038, for one backward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or as it is when it is at least that wide."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


class Factor(ABC):
    """The gradient of one parameter for each of B units."""

    @abstractmethod
    def squared_norm(self) -> Tensor:
        """Squared L2 norm per unit, ``(B,)``."""

    @abstractmethod
    def uncancelled(self) -> Tensor:
        """What `squared_norm` would be if positions were orthogonal, ``(B,)``.

        Where it is far above the squared norm, positions cancel, and the rounding of what cancels
        weighs in norm and sum. It errs upwards: squares too small for the dtype are not lost.
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

    def settle(self) -> None:
        """Take the form that is cheapest to keep until the sum; nothing will be merged in any more."""
        return

    def merged(self, other: Factor) -> Factor | None:
        """One factor equal to the sum of both, where that costs nothing; else None."""
        return None


class Vec(Factor):
    """Gradients written out, ``(B, *shape)``."""

    def __init__(self, values: Tensor) -> None:
        """Hold `values`, ``(B, *shape)``."""
        self.values = wide(values)

    def squared_norm(self) -> Tensor:
        squares = self.values.square()
        while squares.dim() > 1:
            squares = squares.sum(-1)
        return squares

    def uncancelled(self) -> Tensor:
        return self.squared_norm()

    def cross(self, other: Factor) -> Tensor:
        product = self.values * other.dense().values
        while product.dim() > 1:
            product = product.sum(-1)
        return product

    def weighted_sum(self, weights: Tensor) -> Tensor:
        summed: Tensor = torch.tensordot(weights.to(self.values.dtype), self.values, dims=1)
        return summed

    def without(self, dropped: Tensor) -> Vec:
        return Vec(_zero_rows(self.values, dropped))

    def select(self, units: Tensor) -> Vec:
        return Vec(self.values[units])

    def dense(self) -> Vec:
        return self

    def merged(self, other: Factor) -> Factor | None:
        return Vec(self.values + other.values) if isinstance(other, Vec) else None


class Mat(Factor):
    """Gradients ``left_i^T right_i``: left ``(B, T, d)``, right ``(B, T, p)``, shape ``(d, p)``.

    Cost per unit: ``T^2 (p + d)`` for the norm by Gram matrices, ``T p d`` written out. The second is
    taken when ``T (p + d) >= p d``; both the arithmetic and the memory change sides there.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        """Hold the two sides; they may be narrower than float32 and are widened when used."""
        self.left = left
        self.right = right
        self._dense: Vec | None = None

    @property
    def prefers_gram(self) -> bool:
        """Whether the Gram form of the norm is the cheaper one."""
        positions, d, p = self.left.shape[1], self.left.shape[2], self.right.shape[2]
        return positions * (p + d) < p * d

    def squared_norm(self) -> Tensor:
        if self._dense is not None or not self.prefers_gram:
            return self.dense().squared_norm()
        left, right = wide(self.left), wide(self.right)
        gram = torch.bmm(left, left.mT).mul_(torch.bmm(right, right.mT))  # (B, T, T)
        return gram.sum(-1).sum(-1)

    def uncancelled(self) -> Tensor:
        return (_squares(wide(self.left)) * _squares(wide(self.right))).sum(-1)

    def cross(self, other: Factor) -> Tensor:
        if isinstance(other, OneHot):
            return other.cross(self)
        return self.dense().cross(other)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        if self._dense is not None:
            return self._dense.weighted_sum(weights)
        left, right = wide(self.left), wide(self.right)
        scale = weights.to(left.dtype)[:, None, None]
        if left.shape[-1] <= right.shape[-1]:
            left = left * scale  # a new tensor: other layers share the old one
        else:
            right = right * scale
        return left.flatten(0, 1).mT @ right.flatten(0, 1)

    def without(self, dropped: Tensor) -> Mat:
        clean = Mat(_zero_rows(self.left, dropped), _zero_rows(self.right, dropped))
        if self._dense is not None:  # the sum must stay made of what the norm was taken of
            clean._dense = self._dense.without(dropped)
        return clean

    def select(self, units: Tensor) -> Mat:
        return Mat(self.left[units], self.right[units])

    def dense(self) -> Vec:
        if self._dense is None:
            self._dense = Vec(torch.bmm(wide(self.left).mT, wide(self.right)))
        return self._dense

    def merged(self, other: Factor) -> Factor | None:
        if not isinstance(other, Mat):
            return None
        left, right = [self.left, other.left], [self.right, other.right]
        return Mat(torch.cat(left, 1), torch.cat(right, 1))


class OneHot(Factor):
    """Gradients of an embedding table: row ``ids[b, t]`` gets ``rows[b, t]``; shape ``(V, d)``.

    Cost per unit: ``T d`` plus a sort of T ids; the table's size does not enter the norm.
    """

    def __init__(self, ids: Tensor, rows: Tensor, num_rows: int) -> None:
        """Hold ids ``(B, T)``, rows ``(B, T, d)`` and the table's number of rows V."""
        self.ids = ids
        self.rows = wide(rows)
        self.num_rows = num_rows

    def squared_norm(self) -> Tensor:
        batch, positions, width = self.rows.shape
        sorted_ids, order = self.ids.sort(dim=1)
        starts = torch.ones_like(sorted_ids)
        starts[:, 1:] = sorted_ids[:, 1:] != sorted_ids[:, :-1]
        segments = starts.cumsum(1) - 1  # (B, T): which distinct id of this unit
        offsets = torch.arange(batch, device=self.ids.device)[:, None] * positions
        rows = self.rows.gather(1, order[:, :, None].expand(-1, -1, width))
        sums = self.rows.new_zeros(batch * positions, width)
        sums.index_add_(0, (segments + offsets).flatten(), rows.flatten(0, 1))
        return sums.square().sum(-1).view(batch, positions).sum(-1)

    def uncancelled(self) -> Tensor:
        return _squares(self.rows).sum(-1)

    def cross(self, other: Factor) -> Tensor:
        if not isinstance(other, Mat):
            return other.dense().cross(self)
        # <one-hot^T rows, left^T right> = sum_{s,t} left[t, id_s] * (rows_s . right_t)
        left, right = wide(other.left), wide(other.right)  # (B, T', V), (B, T', d)
        index = self.ids[:, None, :].expand(-1, left.shape[1], -1)
        picked = left.gather(2, index)  # (B, T', T)
        return (picked * torch.bmm(right, self.rows.mT)).sum(-1).sum(-1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scaled = self.rows * weights.to(self.rows.dtype)[:, None, None]
        total = self.rows.new_zeros(self.num_rows, self.rows.shape[-1])
        return total.index_add_(0, self.ids.flatten(), scaled.flatten(0, 1))

    def without(self, dropped: Tensor) -> OneHot:
        return OneHot(self.ids, _zero_rows(self.rows, dropped), self.num_rows)

    def select(self, units: Tensor) -> OneHot:
        return OneHot(self.ids[units], self.rows[units], self.num_rows)

    def dense(self) -> Vec:
        batch, _, width = self.rows.shape
        table = self.rows.new_zeros(batch * self.num_rows, width)
        offsets = torch.arange(batch, device=self.ids.device)[:, None] * self.num_rows
        table.index_add_(0, (self.ids + offsets).flatten(), self.rows.flatten(0, 1))
        return Vec(table.view(batch, self.num_rows, width))

    def merged(self, other: Factor) -> Factor | None:
        if not isinstance(other, OneHot):
            return None
        ids, rows = [self.ids, other.ids], [self.rows, other.rows]
        return OneHot(torch.cat(ids, 1), torch.cat(rows, 1), self.num_rows)


class Total(Factor):
    """The sum of factors that could not be merged: a parameter used in layers of different kinds."""

    def __init__(self, parts: Sequence[Factor]) -> None:
        """Hold the parts."""
        self.parts = tuple(parts)

    def squared_norm(self) -> Tensor:
        squares = sum_of([part.squared_norm() for part in self.parts])
        crosses = [a.cross(b) for i, a in enumerate(self.parts) for b in self.parts[:i]]
        return squares + 2 * sum_of(crosses)

    def uncancelled(self) -> Tensor:
        return sum_of([part.uncancelled() for part in self.parts])

    def cross(self, other: Factor) -> Tensor:
        return sum_of([part.cross(other) for part in self.parts])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return sum_of([part.weighted_sum(weights) for part in self.parts])

    def without(self, dropped: Tensor) -> Total:
        return Total([part.without(dropped) for part in self.parts])

    def select(self, units: Tensor) -> Total:
        return Total([part.select(units) for part in self.parts])

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


def _squares(rows: Tensor) -> Tensor:
    """Squared norm of each row, ``(B, T, width)`` to ``(B, T)``, never below the true one."""
    lost = rows.shape[-1] * torch.finfo(rows.dtype).tiny  # a square below `tiny` may become 0
    return rows.square().sum(-1) + lost


def _zero_rows(tensor: Tensor, dropped: Tensor) -> Tensor:
    shape = (-1,) + (1,) * (tensor.dim() - 1)
    return tensor.masked_fill(dropped.view(shape), 0)
