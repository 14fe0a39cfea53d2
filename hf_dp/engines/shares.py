"""What each unit adds to the sum: its weighted gradient, or nothing, whatever rounding does."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.factors import Factor

# Positions are said to cancel where the squared norm is below this part of what it would be if they
# were orthogonal. The Gram form then loses digits in proportion, to the example's advantage. Above it
# T positions, contrived so that all their roundings agree, can gain about 5e-7 * T of the norm.
_CANCELLING = 0.5
# Gradients shorter than this part of the sensitivity need no exact norm.
_NEGLIGIBLE = 1e-6


def cancelling(squared: Tensor, uncancelled: Tensor, sensitivity: float) -> Tensor:
    """Units whose positions cancel so much that norm and share are lost in rounding, ``(B,)`` bool.

    They are taken apart: their gradients are written out, and both norm and share come from the same
    numbers, so that what is added is bounded however far those are from the truth.

    Args:
        squared: Squared norm of each unit's whole gradient, ``(B,)``.
        uncancelled: What it would be if positions were orthogonal, ``(B,)`` or 0-d.
        sensitivity: The clipping norm, against which a gradient matters or not.
    """
    matters = uncancelled > (_NEGLIGIBLE * sensitivity) ** 2
    return matters & (squared < _CANCELLING * uncancelled)


class Shares:
    """Weighted gradients of units that were not dropped.

    Attributes:
        dropped: Units that add nothing, ``(B,)`` bool.
    """

    def __init__(self, dropped: Tensor, apart: Tensor) -> None:
        """Leave `dropped`, ``(B,)`` bool, out; add units `apart`, ``(few, 1)``, one by one."""
        self.dropped = dropped
        self._elsewhere = dropped.clone()
        self._elsewhere[apart.flatten()] = True
        self._kept = [unit for unit in apart if not bool(dropped[unit])]
        self._clean = bool(self._elsewhere.any())

    def of(self, factor: Factor, weights: Tensor) -> Tensor:
        """The sum over units of ``weights[i] * gradient_i``, a new tensor."""
        together = factor.without(self._elsewhere) if self._clean else factor
        share = together.weighted_sum(weights)
        for unit in self._kept:
            share.add_(factor.select(unit).dense().weighted_sum(weights[unit]))
        return share


def checked_shape(name: str, share: Tensor, shape: torch.Size) -> None:
    """Refuse a share of another shape than the parameter's: its norm is not that of the gradient."""
    if share.shape != shape:
        raise UncoveredParameterError(
            f"the layer rule for parameter {name!r} gave gradients of shape {tuple(share.shape)}: "
            f"expected {tuple(shape)}. Its norms are not those of the gradient. Mend "
            "the rule, or use engine='sequential'."
        )
