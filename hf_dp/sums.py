"""Two types for two states: a clipped sum is still private, a noisy sum has been released.

Only a noise mechanism turns one into the other, and only a `NoisySum` may reach ``param.grad``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClippedSum:
    """The sum of clipped per-unit gradients. PRIVATE: nothing in it may leave the process.

    Attributes:
        grads: Parameter name -> summed clipped gradient, the parameter's shape, float32 or wider.
        norms: Norm of each unit's gradient before clipping, ``(B,)``, the L1 or L2 norm as the policy
            has it; not finite where the unit was dropped.
        losses: Each unit's loss, ``(B,)``.
        loss_sum: The loss coordinate, a 0-d tensor, or None where no loss is released.
    """

    grads: Mapping[str, Tensor]
    norms: Tensor
    losses: Tensor
    loss_sum: Tensor | None = None

    def __add__(self, other: ClippedSum) -> ClippedSum:
        """The clipped sum over both sets of units; `self`'s tensors are added to in place."""
        if self.grads.keys() != other.grads.keys():
            raise ValueError("clipped sums over different parameters cannot be added")
        for name, grad in self.grads.items():
            grad.add_(other.grads[name])
        loss_sum = self.loss_sum
        if loss_sum is not None and other.loss_sum is not None:
            loss_sum = loss_sum + other.loss_sum
        return ClippedSum(
            grads=self.grads,
            norms=torch.cat([self.norms, other.norms]),
            losses=torch.cat([self.losses, other.losses]),
            loss_sum=loss_sum,
        )


@dataclass(frozen=True)
class NoisySum:
    """A clipped sum with its noise: released, safe to keep and to show.

    Attributes:
        grads: Parameter name -> noisy sum, the parameter's shape.
        loss_sum: The noisy loss coordinate, 0-d, or None.
    """

    grads: Mapping[str, Tensor]
    loss_sum: Tensor | None = None
