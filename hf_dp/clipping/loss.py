"""The private training loss: one extra coordinate that rides in the same release."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_dp._validate import open_unit_interval, positive
from hf_dp.events import Norm


@dataclass(frozen=True)
class LossRelease:
    """How a unit's loss enters the release.

    Each unit appends ``share * C * min(loss, ceiling) / ceiling`` to its gradient, and the gradient is
    clipped to ``sqrt(1 - share^2) * C`` in the L2 norm, or to ``(1 - share) * C`` in the L1 norm, so that
    the joint norm stays within the sensitivity C and the accounting does not change.

    Attributes:
        share: In (0, 1): how much of the sensitivity the coordinate gets. 0.1 costs the gradient 0.5%
            of its L2 norm, or 10% of its L1 norm.
        ceiling: Losses above it count as this much, > 0, in the loss's own units.

    Guarantees:
        * One unit moves the coordinate by at most ``share * C``; a loss that is not finite counts as
          zero (test: test_loss_coordinate_is_bounded).
    """

    share: float = 0.1
    ceiling: float = 10.0

    def __post_init__(self) -> None:
        """Refuse shares and ceilings out of range."""
        open_unit_interval(
            "LossRelease.share",
            self.share,
            "It is the part of the sensitivity that the loss gets.",
            "Use 0.1, or private_loss=False to release no loss.",
        )
        positive(
            "LossRelease.ceiling",
            self.ceiling,
            "Losses are clipped to it, so that one unit moves the released loss by a bounded amount.",
            "Use about twice the loss of a model that guesses.",
        )

    def gradient_share(self, norm: Norm) -> float:
        """The part of a sensitivity in `norm` that is left for the gradient."""
        return math.sqrt(1 - self.share**2) if norm == "l2" else 1 - self.share

    def coordinates(self, losses: Tensor, *, sensitivity: float) -> Tensor:
        """Each unit's coordinate, ``(B,)``, in [0, share * sensitivity]."""
        bounded = torch.where(torch.isfinite(losses), losses, 0.0).clamp(0.0, self.ceiling)
        return bounded * (self.share * sensitivity / self.ceiling)

    def mean_loss(self, noisy_sum: Tensor, *, sensitivity: float, divisor: float) -> Tensor:
        """The loss per expected unit that a released coordinate stands for (it may be negative)."""
        return noisy_sum * (self.ceiling / (self.share * sensitivity * divisor))
