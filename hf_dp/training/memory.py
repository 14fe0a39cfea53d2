"""When a micro-batch does not fit in memory: halve it, before anything of the step is released.

How a draw is cut into micro-batches does not change its sum. What is known of the memory lives and dies
with the process; log lines leave sizes out, for the last micro-batch's tells how many were drawn.
"""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_dp.engines.base import is_out_of_memory
from hf_dp.engines.owners import Owners
from hf_dp.engines.rows import batch_size, select_rows
from hf_dp.errors import ConfigurationError
from hf_dp.sums import ClippedSum
from hf_dp.training.batches import OwnedRows

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]


class MemoryLimit:
    """The largest micro-batch that may be tried, learned from those that failed.

    Attributes:
        cells: Rows times elements of a row, so that shorter examples may be more; None until one failed.
    """

    def __init__(self) -> None:
        """Nothing failed yet."""
        self.cells: int | None = None

    def each_part(
        self, inputs: Batch, sum_over: Callable[[Batch], ClippedSum]
    ) -> Iterator[ClippedSum]:
        """The sums over the parts of a micro-batch, each part once, as large as memory allows.

        Args:
            inputs: A micro-batch.
            sum_over: Computes the clipped sum of a part. An attempt that fails leaves nothing behind.

        Raises:
            ConfigurationError: One example does not fit by itself.
        """
        left = [inputs]
        while left:
            part, *rest = self._cut(left.pop(0))
            left = rest + left
            size = batch_size(part)
            summed = _attempt(functools.partial(sum_over, part), size)
            if summed is None:
                self._halve(part, size)
                left.insert(0, part)
            else:
                yield summed

    def each_part_of_users(
        self, inputs: Batch, owned: OwnedRows, sum_over: Callable[[Batch, OwnedRows], ClippedSum]
    ) -> Iterator[ClippedSum]:
        """The same where rows belong to users, none of whom is in two parts.

        A user who does not fit is a part alone, with fewer rows in memory at once, down to one.

        Args:
            inputs: A micro-batch.
            owned: Whose its rows are.
            sum_over: As in `each_part`, with the users of the part.

        Raises:
            ConfigurationError: One example does not fit by itself.
        """
        left = [(inputs, owned)]
        while left:
            (part, whose), *rest = self._cut_users(*left.pop(0))
            left = rest + left
            size = min(whose.owners.num_rows, whose.at_once)
            summed = _attempt(functools.partial(sum_over, part, whose), size)
            if summed is None:
                self._halve(part, size)
                left.insert(0, (part, whose))
            else:
                yield summed

    def _cut_users(self, inputs: Batch, owned: OwnedRows) -> list[tuple[Batch, OwnedRows]]:
        owners, rows = owned.owners, owned.owners.num_rows
        if self.cells is not None:
            rows = max(1, self.cells // _elements(inputs))
        if rows >= min(owners.num_rows, owned.at_once):
            return [(inputs, owned)]
        parts: list[tuple[Batch, OwnedRows]] = []
        start = 0
        for sizes in _together(owners.sizes, rows):
            stop = start + sum(sizes)
            part = select_rows(inputs, range(start, stop))
            parts.append((part, OwnedRows(Owners(sizes, owners.reduction), rows)))
            start = stop
        return parts

    def _cut(self, inputs: Batch) -> list[Batch]:
        size = batch_size(inputs)
        rows = size if self.cells is None else max(1, self.cells // _elements(inputs))
        if rows >= size:
            return [inputs]
        return [
            select_rows(inputs, range(start, min(start + rows, size)))
            for start in range(0, size, rows)
        ]

    def _halve(self, inputs: Batch, rows: int) -> None:
        self.cells = rows // 2 * _elements(inputs)
        gc.collect()  # the failed attempt's graph may hang in cycles
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        logger.warning(
            "hf_dp: out of memory, so micro-batches are halved and the step goes on; its sum does not "
            "change. A lower per_device_train_batch_size or max_tokens_per_micro_batch spares the attempt."
        )


def _together(sizes: Sequence[int], rows: int) -> Iterator[tuple[int, ...]]:
    """Units in their order, whole, with at most so many rows together; a larger one alone."""
    together: tuple[int, ...] = ()
    for size in sizes:
        if together and sum(together) + size > rows:
            yield together
            together = ()
        together = (*together, size)
    yield together


def _attempt(summed: Callable[[], ClippedSum], rows: int) -> ClippedSum | None:
    """The sum, or None where memory ran out; the failure's tensors go with this function's frame."""
    try:
        return summed()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if rows == 1:
            raise ConfigurationError(
                "micro-batch of one example: expected it to fit in memory. It did not, so no smaller "
                "micro-batch will. Truncate the examples (max_length), set gradient_checkpointing=True, or "
                "train fewer parameters (LoRA)."
            ) from error
    return None


def _elements(inputs: Batch) -> int:
    """Elements of the widest row."""
    size = batch_size(inputs)
    tensors = [v for v in inputs.values() if isinstance(v, Tensor) and v.shape[:1] == (size,)]
    return max((tensor.numel() // size for tensor in tensors), default=1) or 1
