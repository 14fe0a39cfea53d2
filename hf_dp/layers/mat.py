"""The gradient of a matrix as a product of what came in and what came back, the usual case."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_dp.layers.gram import Squares, squares_of_product
from hf_dp.layers.packing import Packing
from hf_dp.layers.per_unit import (
    Factor,
    Vec,
    squares_of_positions,
    wide,
    without_positions,
    zero_rows,
)
from hf_dp.layers.scaled import ScaledProducts

# Written out, a gradient costs B p d numbers and as many more to read for norm and sum; as two sides,
# B T (p + d) numbers and the Gram matrices. With these at their triangle's price the CPU is about even
# at 0.6; memory is even at 1, and is what runs out first.
_WRITTEN_OUT_FROM = 0.9


class Mat(Factor):
    """Gradients ``left_i^T right_i``: left ``(B, T, d)``, right ``(B, T, p)``, shape ``(d, p)``.

    Cost per unit: ``T^2 (p + d)`` for the norm by Gram matrices, ``T p d`` written out. The second is
    taken when ``T (p + d) >= 0.9 p d``; the arithmetic changes sides before that, the memory at 1.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        """Hold the two sides; they may be narrower than float32 and are widened when used."""
        self.left = left
        self.right = right
        self._dense: Vec | None = None
        self._squares: Squares | None = None
        self._settled = False

    @property
    def prefers_gram(self) -> bool:
        """Whether the Gram form of the norm is the cheaper one."""
        (_, positions, d), p = self.left.shape, self.right.shape[2]
        return _prefers_gram(positions, d, p)

    def trimmed(self) -> bool:
        """Leave out the last positions where one side is zero for all units; whether there are many.

        So it is after padding, and behind a classifier's one position. Only on the CPU: to look
        would make an accelerator wait.
        """
        positions = self.left.shape[1]
        probes = [
            positions - 1,
            positions * 7 // 8,
        ]  # a causal model's last position alone pays nothing
        for side in (self.left, self.right):
            if side.is_cpu and positions > 1 and not any(bool(side[:, t].any()) for t in probes):
                used = side.any(-1).any(0).nonzero()
                length = int(used[-1]) + 1 if len(used) else 1
                few = 4 * length <= positions  # then a copy frees far more than it takes
                self.left, self.right = (
                    tensor[:, :length].clone() if few else tensor[:, :length]
                    for tensor in (self.left, self.right)
                )
                return True
        return False

    def settle(self) -> None:
        if self._dense is None and not self.prefers_gram:
            self.dense()
        if self._dense is not None:  # the sides are not needed any more
            self._settled = True
            self.left, self.right = without_positions(self.left), without_positions(self.right)

    def written(self) -> Vec | None:
        return self._dense

    def squared_norm(self) -> Tensor:
        if self._dense is not None or not self.prefers_gram:
            return self.dense().squared_norm()
        return self._by_gram().squared

    def uncancelled(self) -> Tensor:
        if self._settled:
            return self.squared_norm()
        if self._squares is not None:
            return self._squares.uncancelled
        rows = squares_of_positions(wide(self.left)) * squares_of_positions(wide(self.right))
        return rows.sum(-1)

    def _by_gram(self) -> Squares:
        if self._squares is None:
            self._squares = squares_of_product(self.left, self.right)
        return self._squares

    def cross(self, other: Factor) -> Tensor:
        if isinstance(other, Mat | Vec):
            return self.dense().cross(other)
        return other.cross(self)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        if self._dense is not None:
            return self._dense.weighted_sum(weights)
        return ScaledProducts().weighted_sum(self.left, self.right, weights)

    def without(self, dropped: Tensor) -> Mat:
        clean = Mat(zero_rows(self.left, dropped), zero_rows(self.right, dropped))
        if self._dense is not None:  # the sum must stay made of what the norm was taken of
            clean._dense, clean._settled = self._dense.without(dropped), self._settled
        return clean

    def select(self, units: Tensor) -> Mat:
        some = Mat(self.left[units], self.right[units])
        if self._dense is not None:
            some._dense, some._settled = self._dense.select(units), self._settled
        return some

    def grouped(self, packing: Packing) -> Mat | Vec:
        if packing.is_trivial:
            return self
        if self._dense is not None:
            return self._dense.grouped(packing)
        self.trimmed()  # padding is at the end of a row now, and inside a unit afterwards
        (_, positions, d), p = self.left.shape, self.right.shape[2]
        if packing.is_even or _prefers_gram(packing.most * positions, d, p):
            return Mat(packing.joined(self.left), packing.joined(self.right, shared=True))
        return Vec(self._products(packing))

    def _products(self, packing: Packing) -> Tensor:
        """Each unit's gradient written out, ``(U, d, p)``, from its own rows alone."""
        sides = zip(self.left.split(packing.sizes), self.right.split(packing.sizes), strict=True)
        return torch.stack(
            [wide(left.flatten(0, 1)).mT @ wide(right.flatten(0, 1)) for left, right in sides]
        )

    def dense(self) -> Vec:
        if self._dense is None:
            self._dense = Vec(torch.bmm(wide(self.left).mT, wide(self.right)))
        return self._dense

    def merged(self, other: Factor) -> Factor | None:
        if not isinstance(other, Mat):
            return None
        left, right = [self.left, other.left], [self.right, other.right]
        return Mat(torch.cat(left, 1), torch.cat(right, 1))


def _prefers_gram(positions: int, d: int, p: int) -> bool:
    return positions * (p + d) < _WRITTEN_OUT_FROM * p * d
