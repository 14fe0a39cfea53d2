"""Balls in bins: every unit goes into one batch of a pass, drawn for it alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hf_dp.coins import Coins
from hf_dp.events import BallsInBins, NeighboringRelation, PrivacyEvent, PrivacyUnit
from hf_dp.sampling._uniform import check_batches, uniform_below
from hf_dp.sampling.base import BatchSampler


@dataclass(frozen=True)
class BallsInBinsSampling(BatchSampler):
    """Passes in which each example is in one batch, drawn uniformly and independently of all others.

    Attributes:
        num_batches: Batches of a pass, > 0.

    Guarantees:
        * Every assignment of examples to batches is equally likely, anew in each pass (test:
          test_balls_fall_independently_and_uniformly).

    Each example is seen once in a pass, as in ordinary training, while privacy is amplified about as
    much as by Poisson sampling. The relation is REPLACE_SPECIAL: in practice the number of batches is
    computed from the number of examples, so that number is public. The same epsilon holds for
    ADD_OR_REMOVE_ONE when batches and steps were fixed without looking at it.
    """

    num_batches: int

    unit: ClassVar[PrivacyUnit] = "example"
    relation: ClassVar[NeighboringRelation] = NeighboringRelation.REPLACE_SPECIAL

    def __post_init__(self) -> None:
        check_batches("BallsInBinsSampling", self.num_batches)

    @property
    def pass_length(self) -> int:
        return self.num_batches

    def batches(self, num_units: int, coins: Coins) -> Iterator[list[int]]:
        """Logical batches without end; each is in increasing order of index."""
        while True:
            bins = uniform_below(self.num_batches, num_units, coins)
            by_bin = np.argsort(bins, kind="stable")
            starts = np.searchsorted(bins[by_bin], np.arange(1, self.num_batches))
            for batch in np.split(by_bin, starts):
                yield [int(index) for index in batch]

    def event(self, inner: PrivacyEvent) -> PrivacyEvent:
        return BallsInBins(self.num_batches, inner)
