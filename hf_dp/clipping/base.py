"""The interface of a clipping policy: from norms to weights, with a bound on what one unit can move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from hf_dp.events import PrivacyEvent

Norm = Literal["l1", "l2"]


class ClippingPolicy(ABC):
    """Chooses each unit's weight from the squared norms of its gradient, parameter by parameter."""

    norm: ClassVar[Norm]

    @property
    @abstractmethod
    def sensitivity(self) -> float:
        """Bound, in `norm`, on what one unit adds to the sum."""

    @abstractmethod
    def weights(self, squared_norms: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights of the units, from ``{parameter: (B,)}`` to ``{parameter: (B,)}``.

        A unit whose squared norm is not finite in any parameter gets weight 0 in all of them.
        """

    @abstractmethod
    def scaled(self, factor: float) -> ClippingPolicy:
        """The same policy with `factor` times the sensitivity."""

    def event(self) -> PrivacyEvent | None:
        """What the policy itself releases about the data; None when it looks at nothing."""
        return None
