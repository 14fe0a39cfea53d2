"""Whether tensors show the same memory: layers that share an input share what is made of it."""

from __future__ import annotations

from torch import Tensor


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same view of the same memory, `one` being held alive meanwhile."""
    return one is other or (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )
