"""The gradient of a lookup table: rows that arrive at ids."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_dp.layers.mat import Mat
from hf_dp.layers.packing import Packing
from hf_dp.layers.per_unit import (
    Factor,
    Vec,
    squares_of_positions,
    squares_of_rows,
    wide,
    without_positions,
    zero_rows,
)


class OneHot(Factor):
    """Gradients of an embedding table: row ``ids[b, t]`` gets ``rows[b, t]``; shape ``(V, d)``.

    Cost per unit: ``T d`` plus a sort of T ids; the table's size does not enter the norm. Rows of equal
    ids are added up once, and norm and sum come from what results.
    """

    def __init__(self, ids: Tensor, rows: Tensor, num_rows: int) -> None:
        """Hold ids ``(B, T)``, rows ``(B, T, d)`` and the table's number of rows V."""
        self.ids = ids
        self.rows = wide(rows)
        self.num_rows = num_rows
        self._dense: Vec | None = None
        self._distinct = False  # no id has two rows that are not zero

    def settle(self) -> None:
        if self._distinct or self._dense is not None:
            return
        batch, positions, width = self.rows.shape
        if self.num_rows <= positions:
            self._dense = self.dense()
            self.ids, self.rows = without_positions(self.ids), without_positions(self.rows)
            return
        ordered, _ = self.ids.sort(dim=1)
        ids = self.ids.contiguous()
        first = torch.searchsorted(ordered, ids)  # where this id stands first
        offsets = torch.arange(0, batch * positions, positions, device=self.ids.device)
        sums = self.rows.new_zeros(batch * positions, width)
        sums.index_add_(0, first.add_(offsets[:, None]).flatten(), self.rows.flatten(0, 1))
        self.ids, self.rows, self._distinct = ordered, sums.view_as(self.rows), True

    def written(self) -> Vec | None:
        return self._dense

    def squared_norm(self) -> Tensor:
        if self._dense is not None:
            return self._dense.squared_norm()
        if self._distinct:
            return squares_of_rows(self.rows)
        settled = OneHot(self.ids, self.rows, self.num_rows)
        settled.settle()
        return settled.squared_norm()

    def uncancelled(self) -> Tensor:
        if self._distinct or self._dense is not None:
            return self.squared_norm()
        return squares_of_positions(self.rows).sum(-1)

    def cross(self, other: Factor) -> Tensor:
        if self._dense is not None or not isinstance(other, Mat | Vec):
            return other.dense().cross(self)
        written = other.written()
        if written is not None or isinstance(other, Vec):
            index = self.ids[:, :, None].expand_as(self.rows)
            return other.dense().values.gather(1, index).mul_(self.rows).sum(-1).sum(-1)
        # <one-hot^T rows, left^T right> = sum_{s,t} left[t, id_s] * (rows_s . right_t)
        left, right = wide(other.left), wide(other.right)  # (B, T', V), (B, T', d)
        index = self.ids[:, None, :].expand(-1, left.shape[1], -1)
        picked = left.gather(2, index)  # (B, T', T)
        return picked.mul_(torch.bmm(right, self.rows.mT)).sum((-2, -1))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        if self._dense is not None:
            return self._dense.weighted_sum(weights)
        scaled = self.rows * weights.to(self.rows.dtype)[:, None, None]
        table: Tensor = torch.ops.aten.embedding_dense_backward(
            scaled, self.ids, self.num_rows, -1, False
        )
        return table

    def without(self, dropped: Tensor) -> OneHot:
        return self._with(self.ids, zero_rows(self.rows, dropped), dropped=dropped)

    def select(self, units: Tensor) -> OneHot:
        return self._with(self.ids[units], self.rows[units], units=units)

    def _with(
        self,
        ids: Tensor,
        rows: Tensor,
        *,
        dropped: Tensor | None = None,
        units: Tensor | None = None,
    ) -> OneHot:
        made = OneHot(ids, rows, self.num_rows)
        made._distinct = self._distinct
        if self._dense is not None and dropped is not None:
            made._dense = self._dense.without(dropped)
        elif self._dense is not None and units is not None:
            made._dense = self._dense.select(units)
        return made

    def grouped(self, packing: Packing) -> OneHot | Vec:
        if packing.is_trivial:
            return self
        if self._dense is not None:
            return self._dense.grouped(packing)
        return OneHot(packing.joined(self.ids), packing.joined(self.rows), self.num_rows)

    def dense(self) -> Vec:
        if self._dense is not None:
            return self._dense
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
