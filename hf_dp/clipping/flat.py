"""Flat clipping: one norm over the whole gradient, one bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from hf_dp._validate import one_of, positive
from hf_dp.clipping.base import ClippingPolicy
from hf_dp.events import Norm


@dataclass(frozen=True)
class FlatClipping(ClippingPolicy):
    """Scales a unit's whole gradient to norm at most `clipping_norm`.

    Attributes:
        clipping_norm: The bound C > 0, in gradient units.
        norm: "l2", or "l1": the sum of absolute values. The L1 norm of a gradient of d coordinates is
            up to sqrt(d) times as large as its L2 norm.

    Guarantees:
        * ``weight * norm <= clipping_norm`` in the arithmetic of the norms (the bound is taken a few
          units in the last place low, so that rounding cannot exceed it).
        * A unit whose norm is nan or inf gets weight 0 (test: test_not_finite_gets_weight_zero), and so
          does one whose weight would be too small a number to be exact.

    Source:
        Abadi et al. (2016), arXiv:1607.00133, Algorithm 1.
    """

    clipping_norm: float
    norm: Norm = "l2"

    def __post_init__(self) -> None:
        positive(
            "FlatClipping.clipping_norm",
            self.clipping_norm,
            "It bounds what one unit can add to the sum, and the noise is sized by it.",
            "Typical values are 0.1 to 1.",
        )
        one_of(
            "FlatClipping.norm",
            self.norm,
            get_args(Norm),
            "The noise is sized for what one unit can move in this norm.",
        )

    @property
    def sensitivity(self) -> float:
        """The clipping norm."""
        return self.clipping_norm

    def weights(self, power_sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        sums = torch.stack(list(power_sums.values()))  # (P, B)
        numbers = torch.finfo(sums.dtype)
        if self.norm == "l1":
            total = norms = sums.sum(0, dtype=torch.float64)  # (B,)
        else:
            total = sums.sum(0)
            norms = total.clamp_min(0).sqrt()
        bound = self.clipping_norm * (1 - 8 * numbers.eps)
        factors = (bound / norms.clamp_min(numbers.tiny)).clamp_max(1.0).to(sums.dtype)
        exact = torch.isfinite(total) & (factors >= numbers.tiny)
        return dict.fromkeys(power_sums, torch.where(exact, factors, torch.zeros_like(factors)))

    def scaled(self, factor: float) -> FlatClipping:
        return FlatClipping(self.clipping_norm * factor, self.norm)
