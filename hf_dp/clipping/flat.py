"""Flat clipping: one norm over the whole gradient, one bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_dp._validate import positive
from hf_dp.clipping.base import ClippingPolicy, Norm


@dataclass(frozen=True)
class FlatClipping(ClippingPolicy):
    """Scales a unit's whole gradient to L2 norm at most `clipping_norm`.

    Attributes:
        clipping_norm: The bound C > 0, in gradient units.

    Guarantees:
        * ``weight * norm <= clipping_norm`` in the arithmetic of the norms (the bound is taken a few
          units in the last place low, so that rounding cannot exceed it).
        * A unit whose norm is nan or inf gets weight 0 (test: test_not_finite_gets_weight_zero).

    Source:
        Abadi et al. (2016), arXiv:1607.00133, Algorithm 1.
    """

    clipping_norm: float

    norm: ClassVar[Norm] = "l2"

    def __post_init__(self) -> None:
        positive(
            "FlatClipping.clipping_norm",
            self.clipping_norm,
            "It bounds what one unit can add to the sum, and the noise is sized by it.",
            "Typical values are 0.1 to 1.",
        )

    @property
    def sensitivity(self) -> float:
        """The clipping norm."""
        return self.clipping_norm

    def weights(self, squared_norms: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        total = torch.stack(list(squared_norms.values())).sum(0)  # (B,)
        norms = total.clamp_min(0).sqrt()
        bound = self.clipping_norm * (1 - 8 * torch.finfo(norms.dtype).eps)
        factors = (bound / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)
        weights = torch.where(torch.isfinite(total), factors, torch.zeros_like(factors))
        return dict.fromkeys(squared_norms, weights)

    def scaled(self, factor: float) -> FlatClipping:
        return FlatClipping(self.clipping_norm * factor)
