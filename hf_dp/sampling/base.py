"""The interface of a sampler: it draws logical batches and states what the drawing does to an event."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from hf_dp.coins import Coins
from hf_dp.events import NeighboringRelation, PrivacyEvent, PrivacyUnit


class BatchSampler(ABC):
    """Draws the units of each logical batch. Fields are public; what is private is an argument."""

    unit: ClassVar[PrivacyUnit]

    @property
    @abstractmethod
    def relation(self) -> NeighboringRelation:
        """Which datasets count as neighbours; with most samplers a constant of the class."""

    @property
    def pass_length(self) -> int:
        """Batches that are drawn together and accounted for as one; 1 where each is drawn for itself."""
        return 1

    @abstractmethod
    def batches(self, num_units: int, coins: Coins) -> Iterator[list[int]]:
        """Logical batches without end, each a list of unit indices in [0, num_units).

        A batch may be empty; it is still a step and still a release. The first `pass_length` batches
        are a pass, the next ones another, and every call begins with a new one.
        """

    @abstractmethod
    def event(self, inner: PrivacyEvent) -> PrivacyEvent:
        """What releasing `inner` on every batch of one pass becomes."""
