"""The gradient of a stack of matrices, of which each position uses one: experts with routed tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_dp.layers.gram import LARGEST, squares_of_product
from hf_dp.layers.mat import Mat
from hf_dp.layers.packing import Packing
from hf_dp.layers.per_unit import (
    Factor,
    Vec,
    squares_of_positions,
    squares_of_rows,
    wide,
    zero_rows,
)

Layout = tuple[tuple[int, int, int], tuple[int, ...]]
"""How ``(E, d, p)`` is stored: its axes in another order, and the shape they are then put in."""

_MOST_WRITTEN = 2**23
"""Numbers of segments' gradients that are written out at once, to take their norms."""


class Routed(Factor):
    """Gradients of a parameter ``(E, d, p)``: matrix e gets ``left_s^T right_s`` of the rows s routed to it.

    Rows are packed, by expert and then by unit, so that one unit's rows at one expert are a segment. A
    norm is the sum over segments, each by Gram matrices or written out as for `Mat`, in groups of
    about the same length; a weighted sum is one product for each expert. Gradients are not kept.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        places: Tensor,
        *,
        num_experts: int,
        num_units: int,
        layout: Layout | None = None,
    ) -> None:
        """Hold the rows, in any order.

        Args:
            left: ``(S, d)``.
            right: ``(S, p)``.
            places: ``(S,)``, expert times `num_units` plus unit.
            num_experts: E.
            num_units: B.
            layout: How the parameter is stored; None for ``(E, d, p)``.
        """
        self.num_experts = num_experts
        self.num_units = num_units
        self.layout = layout
        if bool((places[1:] < places[:-1]).any()):
            places, order = places.sort(stable=True)
            left, right = left[order], right[order]
        self.left = wide(left)
        self.right = wide(right)
        self.places = places

    @property
    def units(self) -> Tensor:
        """Whose each row is, ``(S,)``."""
        return self.places % self.num_units

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, d and p."""
        return self.num_experts, self.left.shape[1], self.right.shape[1]

    def squared_norm(self) -> Tensor:
        squares = self.left.new_zeros(self.num_units)
        _, d, p = self.shape
        for places, left, right in self._segments():
            by_gram = Mat(left, right).prefers_gram
            most = LARGEST // left.shape[1] ** 2 if by_gram else _MOST_WRITTEN // (d * p)
            for some in range(0, len(places), max(1, most)):
                part = slice(some, some + max(1, most))
                if by_gram:
                    found = squares_of_product(left[part], right[part]).squared
                else:
                    found = squares_of_rows(torch.bmm(left[part].mT, right[part]))
                squares.index_add_(0, places[part] % self.num_units, found)
        return squares

    def uncancelled(self) -> Tensor:
        rows = squares_of_positions(self.left) * squares_of_positions(self.right)
        return rows.new_zeros(self.num_units).index_add_(0, self.units, rows)

    def cross(self, other: Factor) -> Tensor:
        return self.dense().cross(other)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scale = weights.to(self.left.dtype)[self.units][:, None]
        left, right = self.left, self.right
        if left.shape[1] < right.shape[1]:
            left = left * scale
        else:
            right = right * scale
        counts = torch.bincount(self.places // self.num_units, minlength=self.num_experts).tolist()
        sides = zip(left.split(counts), right.split(counts), strict=True)
        return self._stored(torch.stack([one.mT @ other for one, other in sides]))

    def without(self, dropped: Tensor) -> Routed:
        gone = dropped[self.units]
        return self._with(zero_rows(self.left, gone), zero_rows(self.right, gone), self.places)

    def select(self, units: Tensor) -> Routed:
        rows, places = [], []
        for place, unit in enumerate(units.tolist()):
            mine = (self.units == unit).nonzero().flatten()
            rows.append(mine)
            places.append(self.places[mine] // self.num_units * len(units) + place)
        kept = torch.cat(rows)
        return self._with(self.left[kept], self.right[kept], torch.cat(places), len(units))

    def grouped(self, packing: Packing) -> Routed:
        units = packing.owners.to(self.places.device)[self.units]
        places = self.places // self.num_units * packing.num_units + units
        return self._with(self.left, self.right, places, packing.num_units)

    def dense(self) -> Vec:
        grads = self.left.new_zeros(self.num_units * self.num_experts, *self.shape[1:])
        for places, left, right in self._segments():
            experts = places // self.num_units
            index = places % self.num_units * self.num_experts + experts
            grads[index] = torch.bmm(left.mT, right)
        return Vec(self._stored(grads.view(self.num_units, *self.shape)))

    def merged(self, other: Factor) -> Factor | None:
        if not isinstance(other, Routed) or other.layout != self.layout:
            return None
        left, right = [self.left, other.left], [self.right, other.right]
        return self._with(torch.cat(left), torch.cat(right), torch.cat([self.places, other.places]))

    def _with(
        self, left: Tensor, right: Tensor, places: Tensor, num_units: int | None = None
    ) -> Routed:
        return Routed(
            left,
            right,
            places,
            num_experts=self.num_experts,
            num_units=self.num_units if num_units is None else num_units,
            layout=self.layout,
        )

    def _stored(self, grads: Tensor) -> Tensor:
        """``(..., E, d, p)`` as the parameter is stored."""
        if self.layout is None:
            return grads
        axes, shape = self.layout
        leading = grads.dim() - len(axes)
        turned = grads.permute(*range(leading), *(leading + axis for axis in axes))
        return turned.reshape(*grads.shape[:leading], *shape)

    def _segments(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Segments of about one length: their places ``(n,)``, and both sides ``(n, L, width)``.

        Behind a segment's last row the left side is zero, and the right one repeats that row, so that
        a unit's numbers meet no other's, whatever they are.
        """
        counts = torch.bincount(self.places, minlength=self.num_experts * self.num_units)
        starts = counts.cumsum(0) - counts
        doublings = torch.ceil(torch.log2(counts.clamp_min(1).double())).long()
        doublings[counts == 0] = -1
        for doubling in doublings.unique().tolist():
            if doubling < 0:
                continue
            places = (doublings == doubling).nonzero().flatten()
            lengths = counts[places][:, None]
            steps = torch.arange(int(lengths.max()), device=lengths.device)
            index = starts[places][:, None] + torch.minimum(steps, lengths - 1)  # (n, L)
            left = self.left[index].masked_fill_((steps >= lengths)[:, :, None], 0)
            yield places, left, self.right[index]
