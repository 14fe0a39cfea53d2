"""How large the gradients of units are, in the norm that their clipping bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_dp.events import Norm
from hf_dp.layers.per_unit import squares_of_rows

_AT_ONCE = 2**22
"""Numbers that are widened to float64 at once."""


def power_sums(values: Tensor, norm: Norm) -> Tensor:
    """Sums of squares ("l2") or of absolute values ("l1") over all axes but the first.

    Args:
        values: Gradients written out, ``(B, ...)``; each coordinate is complete, all uses of a shared
            weight added up, as absolute values do not add up.
        norm: Which of the two.

    Returns:
        ``(B,)``, in the dtype of `values`, float32 at least. Absolute values are added in float64: numbers
        of one sign, added in float32, all lose in the same direction.
    """
    return squares_of_rows(values) if norm == "l2" else _absolutes_of_rows(values)


def norms_of(power_sums: Tensor, norm: Norm) -> Tensor:
    """Norms from sums over all parameters, ``(B,)``."""
    return power_sums.sqrt() if norm == "l2" else power_sums


def _absolutes_of_rows(values: Tensor) -> Tensor:
    flat = values.reshape(len(values), values[0].numel() if len(values) else 0)
    total = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
    for part in flat.split(max(1, _AT_ONCE // max(1, len(flat))), 1):
        total += part.abs().sum(1, dtype=torch.float64)
    return total.to(torch.promote_types(values.dtype, torch.float32))
