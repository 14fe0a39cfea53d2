"""Rows that belong together: several examples of one user, clipped as one unit.

The gradient of a unit's loss is the sum of its rows' gradients, so for a product ``left^T right`` it is the
product over the positions of all its rows. To join the positions is book-keeping alone: the model ran
each row by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from hf_dp.layers.views import same_numbers


class Packing:
    """How the rows of a micro-batch make units; the rows of one unit stand together.

    Attributes:
        sizes: Rows of each unit, ``(U,)``, all positive; B is their sum.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        """Take the first ``sizes[0]`` rows as the first unit's, and so on."""
        self.sizes = tuple(sizes)
        self._last: tuple[Tensor, Tensor] | None = None  # layers that share an input share its copy

    @property
    def num_units(self) -> int:
        """U."""
        return len(self.sizes)

    @cached_property
    def is_trivial(self) -> bool:
        """Whether every row is a unit."""
        return all(size == 1 for size in self.sizes)

    @property
    def is_even(self) -> bool:
        """Whether every unit has as many rows."""
        return self._even is not None

    @cached_property
    def most(self) -> int:
        """Rows of the largest unit."""
        return max(self.sizes)

    @cached_property
    def owners(self) -> Tensor:
        """The unit of each row, ``(B,)``, on the CPU."""
        return torch.repeat_interleave(torch.tensor(self.sizes))

    def times(self, count: int) -> Packing:
        """The packing of `count` such micro-batches, one after the other."""
        return Packing(self.sizes * count)

    def added(self, values: Tensor) -> Tensor:
        """The sum over each unit's rows: ``(B, ...)`` to ``(U, ...)``."""
        if self._even is not None:
            sums: Tensor = values.unflatten(0, (self.num_units, self._even)).sum(1)
            return sums
        zeros = values.new_zeros(self.num_units, *values.shape[1:])
        return zeros.index_add_(0, self.owners.to(values.device), values)

    def joined(self, rows: Tensor, *, shared: bool = False) -> Tensor:
        """The positions of each unit's rows, one row after the other: ``(B, T, ...)`` to ``(U, K, ...)``.

        With as many rows in each unit it is a view where `rows` is contiguous; else shorter units are
        filled up with zeros, which add nothing to a product.

        Args:
            rows: What is joined.
            shared: Whether the next call may ask for the same, as layers that share an input do.
        """
        if not shared:
            return self._joined(rows)
        if self._last is None or not same_numbers(self._last[0], rows):
            self._last = rows, self._joined(rows)
        return self._last[1]

    def _joined(self, rows: Tensor) -> Tensor:
        if self._even is not None:
            return rows.reshape(self.num_units, self._even * rows.shape[1], *rows.shape[2:])
        apart = rows.new_zeros(self.num_units * self.most, *rows.shape[1:])
        apart[self._places.to(rows.device)] = rows
        return apart.view(self.num_units, self.most * rows.shape[1], *rows.shape[2:])

    @cached_property
    def _even(self) -> int | None:
        """The rows of every unit, if all have as many."""
        first = self.sizes[0]
        return first if all(size == first for size in self.sizes) else None

    @cached_property
    def _places(self) -> Tensor:
        """Where each row goes, ``(B,)``, when every unit has `most` places."""
        within = torch.cat([torch.arange(size) for size in self.sizes])
        return self.owners * self.most + within
