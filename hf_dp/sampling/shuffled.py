"""Shuffled batches of equal size: what ordinary training does. Privacy gains nothing from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hf_dp.coins import Coins
from hf_dp.events import NeighboringRelation, PrivacyEvent, PrivacyUnit, Shuffled
from hf_dp.sampling._uniform import check_batches, uniform_order
from hf_dp.sampling.base import BatchSampler


@dataclass(frozen=True)
class ShuffledSampling(BatchSampler):
    """Passes over the data in a new random order each.

    Attributes:
        num_batches: Batches of a pass, > 0; their sizes differ by at most one.

    Guarantees:
        * Each example is in exactly one batch of a pass (test:
          test_every_pass_holds_every_unit_exactly_once).

    Nothing is claimed of the order: the guarantee is that of one noisy sum with every example in it, for
    each pass, and it would hold for any order that anybody chose. The relation is REPLACE_SPECIAL:
    batches are cut by counting, so a further example would move others to another batch.
    """

    num_batches: int

    unit: ClassVar[PrivacyUnit] = "example"
    relation: ClassVar[NeighboringRelation] = NeighboringRelation.REPLACE_SPECIAL

    def __post_init__(self) -> None:
        check_batches("ShuffledSampling", self.num_batches)

    @property
    def pass_length(self) -> int:
        return self.num_batches

    def batches(self, num_units: int, coins: Coins) -> Iterator[list[int]]:
        """Logical batches without end; each is in increasing order of index."""
        while True:
            for batch in np.array_split(uniform_order(num_units, coins), self.num_batches):
                yield [int(index) for index in np.sort(batch)]

    def event(self, inner: PrivacyEvent) -> PrivacyEvent:
        return Shuffled(self.num_batches, inner)
