"""Squared norms of ``left_i^T right_i`` by Gram matrices: triangles, shared sides, few kernels.

``|left^T right|^2 = sum over s, t of (left_s . left_t) (right_s . right_t)``. Both factors are symmetric,
so only the upper triangle is computed, in row blocks. Layers that share an input share its Gram matrix.
Products wait in one buffer and are summed together, since each is small.

Source:
    Li et al. (2022), arXiv:2110.05679, section 4; Bu et al. (2023), arXiv:2210.00038.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_dp.layers.per_unit import sum_of, wide
from hf_dp.layers.views import same_numbers

BUFFER = 2**20
"""Numbers that wait to be summed, unless one product alone has more."""
PAIRS = 32
"""Products that wait, at most."""
LARGEST = 2**23
"""Numbers in the Gram matrices of one product, above which its blocks are taken one by one."""

Blocks = list[Tensor]  # (B, rows, columns) each: rows start to stop against columns start to T


@dataclass(frozen=True)
class Squares:
    """What Gram matrices tell about products ``left_i^T right_i``.

    Attributes:
        squared: Squared norms, ``(B,)``.
        uncancelled: What they would be if positions were orthogonal, ``(B,)``, never below the truth.
    """

    squared: Tensor
    uncancelled: Tensor


def row_blocks(positions: int) -> list[tuple[int, int]]:
    """Where each block of rows starts and stops; with n blocks, (n + 1) / 2n of the square is computed."""
    count = 1 if positions < 96 else 2 if positions < 192 else 4 if positions < 1024 else 8
    size = -(-positions // count)
    return [(start, min(start + size, positions)) for start in range(0, positions or 1, size or 1)]


def squares_of_product(left: Tensor, right: Tensor) -> Squares:
    """For one pair ``(B, T, d)``, ``(B, T, p)``, one block of rows at a time."""
    left, right = wide(left), wide(right)
    parts = []
    for start, stop in row_blocks(left.shape[1]):
        mine = torch.bmm(left[:, start:stop], left[:, start:].mT)
        others = torch.bmm(right[:, start:stop], right[:, start:].mT)
        uncancelled = _uncancelled([mine[None]], [[others]], left.shape[-1], right.shape[-1])
        mine *= others
        parts.append((_triangle([mine[None]])[0], uncancelled[0]))
    return Squares(sum_of([part[0] for part in parts]), sum_of([part[1] for part in parts]))


class GramBatch:
    """Takes pairs one after the other, and gives the squares of all of them."""

    def __init__(self) -> None:
        """Nothing is taken yet."""
        self._found: dict[str, Squares] = {}
        self._shape: tuple[object, ...] = ()
        self._buffer: Blocks = []  # (capacity, B, rows, columns) each
        self._names: list[str] = []
        self._shared: list[Blocks] = []
        self._width = 0
        self._last: tuple[Tensor, Blocks] | None = (
            None  # holds the tensor, so that no other takes its place
        )

    def add(self, name: str, left: Tensor, right: Tensor) -> None:
        """Take a pair ``(B, T, d)``, ``(B, T, p)``; the Gram matrix of `right` may serve the next, too."""
        units, positions, _ = left.shape
        if units * positions * positions > LARGEST:
            self._found[name] = squares_of_product(left, right)
            return
        shared = self._gram_of(right)
        left = wide(left)
        shape = (units, positions, left.dtype, left.device)
        if shape != self._shape:
            self._sum_up()
            self._shape, self._buffer = shape, _buffer(left)
        elif len(self._names) == len(self._buffer[0]):
            self._sum_up()
        index = len(self._names)
        if len(self._buffer) == 1:
            torch.bmm(left, left.mT, out=self._buffer[0][index])
        else:
            for (start, stop), block in zip(row_blocks(positions), self._buffer, strict=True):
                torch.bmm(left[:, start:stop], left[:, start:].mT, out=block[index])
        self._names.append(name)
        self._shared.append(shared)
        self._width = max(self._width, left.shape[-1], right.shape[-1])

    def results(self) -> dict[str, Squares]:
        """Name -> squares, of every pair that was taken."""
        self._sum_up()
        self._buffer, self._shape, self._last = [], (), None
        return self._found

    def _gram_of(self, tensor: Tensor) -> Blocks:
        if self._last is not None and same_numbers(self._last[0], tensor):
            return self._last[1]
        rows = wide(tensor)
        blocks = [
            torch.bmm(rows[:, start:stop], rows[:, start:].mT)
            for start, stop in row_blocks(rows.shape[1])
        ]
        self._last = tensor, blocks
        return blocks

    def _sum_up(self) -> None:
        count = len(self._names)
        if not count:
            return
        used = [block[:count] for block in self._buffer]
        uncancelled = _uncancelled(used, self._shared, self._width, self._width)
        torch._foreach_mul_(
            [slot for block in used for slot in block.unbind()],
            [shared[index] for index in range(len(used)) for shared in self._shared],
        )
        squared = _triangle(used)
        for name, *squares in zip(self._names, squared.unbind(), uncancelled.unbind(), strict=True):
            self._found[name] = Squares(*squares)
        self._names, self._shared, self._width = [], [], 0


def _buffer(left: Tensor) -> Blocks:
    units, positions = left.shape[:2]
    shapes = [(units, stop - start, positions - start) for start, stop in row_blocks(positions)]
    numbers = sum(units * rows * columns for _, rows, columns in shapes)
    capacity = min(PAIRS, max(1, BUFFER // max(1, numbers)))
    return [left.new_empty(capacity, *shape) for shape in shapes]


def _triangle(products: Blocks) -> Tensor:
    """Sums over the whole matrix, ``(K, B)``, from products of the upper triangle's blocks."""
    parts = []
    for block in products:
        rows, columns = block.shape[-2:]
        whole = block.sum((-2, -1))
        if rows < columns:  # what is right of the diagonal block stands for its mirror image, too
            whole = whole.mul_(2).sub_(block[..., :rows].sum((-2, -1)))
        parts.append(whole)
    return sum_of(parts)


def _uncancelled(mine: Blocks, others: list[Blocks], width: int, other_width: int) -> Tensor:
    """``sum_t |left_t|^2 |right_t|^2``, ``(K, B)``, with squares too small for the dtype made up for."""
    rows = torch.cat([_diagonal(block) for block in mine], -1)  # (K, B, T)
    flat = [_diagonal(block) for blocks in others for block in blocks]
    columns = torch.cat(flat, -1).unflatten(-1, (len(others), -1)).movedim(1, 0)
    tiny = torch.finfo(rows.dtype).tiny  # a square below it may become 0
    return rows.add_(width * tiny).mul_(columns.add_(other_width * tiny)).sum(-1)


def _diagonal(block: Tensor) -> Tensor:
    rows = block.shape[-2]
    return block[..., :rows].diagonal(dim1=-2, dim2=-1)
