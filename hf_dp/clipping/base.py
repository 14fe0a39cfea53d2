"""The interface of a clipping policy: from norms to weights, with a bound on what one unit can move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from hf_dp.events import Norm, PrivacyEvent


class ClippingPolicy(ABC):
    """Chooses each unit's weight from the size of its gradient, parameter by parameter.

    Attributes:
        norm: In which the share of a unit is bounded; "l1" or "l2".
    """

    norm: Norm

    @property
    @abstractmethod
    def sensitivity(self) -> float:
        """Bound, in `norm`, on what one unit adds to the sum."""

    @abstractmethod
    def weights(self, power_sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights of the units, from ``{parameter: (B,)}`` to ``{parameter: (B,)}``.

        Args:
            power_sums: Of each unit's gradient with respect to one parameter the sum of squares where
                `norm` is "l2", of absolute values where it is "l1". A unit for which it is not finite
                in any parameter gets weight 0 in all of them.
        """

    @abstractmethod
    def scaled(self, factor: float) -> ClippingPolicy:
        """The same policy with `factor` times the sensitivity."""

    def event(self) -> PrivacyEvent | None:
        """What the policy itself releases about the data; None when it looks at nothing."""
        return None
