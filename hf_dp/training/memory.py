"""When a micro-batch does not fit in memory: halve it, before anything of the step is released.

How a draw is cut into micro-batches does not change its sum. What is known of the memory lives and dies
with the process; log lines leave sizes out, for the last micro-batch's tells how many were drawn.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_dp.engines.base import is_out_of_memory
from hf_dp.engines.rows import batch_size, select_rows
from hf_dp.errors import ConfigurationError
from hf_dp.sums import ClippedSum

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
            summed = _attempt(sum_over, part)
            if summed is None:
                self._halve(part)
                left.insert(0, part)
            else:
                yield summed

    def _cut(self, inputs: Batch) -> list[Batch]:
        size = batch_size(inputs)
        rows = size if self.cells is None else max(1, self.cells // _elements(inputs))
        if rows >= size:
            return [inputs]
        return [
            select_rows(inputs, range(start, min(start + rows, size)))
            for start in range(0, size, rows)
        ]

    def _halve(self, inputs: Batch) -> None:
        self.cells = batch_size(inputs) // 2 * _elements(inputs)
        gc.collect()  # the failed attempt's graph may hang in cycles
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        logger.warning(
            "hf_dp: out of memory, so micro-batches are halved and the step goes on; its sum does not "
            "change. A lower per_device_train_batch_size or max_tokens_per_micro_batch spares the attempt."
        )


def _attempt(sum_over: Callable[[Batch], ClippedSum], part: Batch) -> ClippedSum | None:
    """The sum, or None where memory ran out; the failure's tensors go with this function's frame."""
    try:
        return sum_over(part)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if batch_size(part) == 1:
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
