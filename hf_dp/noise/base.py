"""The interface of a noise mechanism: the release it makes and the event that is accounted for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from hf_dp.coins import Coins
from hf_dp.events import PrivacyEvent
from hf_dp.sums import ClippedSum, NoisySum


class NoiseMechanism(ABC):
    """Adds noise to a whole clipped sum at once."""

    norm: ClassVar[Literal["l1", "l2"]]  # must equal the clipping policy's

    @abstractmethod
    def event(self) -> PrivacyEvent:
        """One release of a sum of sensitivity 1."""

    @abstractmethod
    def release(self, summed: ClippedSum, *, sensitivity: float, coins: Coins) -> NoisySum:
        """The sum plus noise scaled to `sensitivity`; `summed` is used up."""
