"""Poisson sampling with a cap: a batch that comes out too large is cut to a random part of itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from hf_dp._validate import positive_integer
from hf_dp.coins import Coins
from hf_dp.events import (
    NeighboringRelation,
    PrivacyEvent,
    PrivacyUnit,
    TruncatedPoissonSampled,
)
from hf_dp.sampling._uniform import check_population, uniform_subset
from hf_dp.sampling.base import BatchSampler
from hf_dp.sampling.poisson import PoissonSampling


@dataclass(frozen=True)
class TruncatedPoissonSampling(BatchSampler):
    """Poisson sampling of examples with at most `max_batch_size` in a batch.

    Attributes:
        num_units: Examples to draw from; public.
        sampling_probability: Chance that an example is in a batch before it is cut, in (0, 1].
        max_batch_size: The cap, > 0.

    Guarantees:
        * What is kept of a batch that is too large is a uniformly random subset of it (test:
          test_a_batch_that_is_too_large_is_cut_fairly).

    For systems that must know in advance how large a batch can get; micro-batches bound memory without
    it. A cap ten standard deviations above the mean costs nothing, one near the mean costs a lot: a unit
    that comes in then pushes another one out. The relation is REPLACE_SPECIAL, and never
    ADD_OR_REMOVE_ONE: how often batches are cut depends on the number of examples.
    """

    num_units: int
    sampling_probability: float
    max_batch_size: int

    unit: ClassVar[PrivacyUnit] = "example"
    relation: ClassVar[NeighboringRelation] = NeighboringRelation.REPLACE_SPECIAL

    def __post_init__(self) -> None:
        owner = type(self).__name__
        positive_integer(
            f"{owner}.num_units", self.num_units, "It is who may be drawn.", "Use len(dataset)."
        )
        PoissonSampling(self.sampling_probability)  # refuses what is no probability
        positive_integer(
            f"{owner}.max_batch_size",
            self.max_batch_size,
            "A batch that may hold nobody learns nothing.",
            "Use expected_batch_size + 10 * sqrt(expected_batch_size), which is almost never reached.",
        )

    def batches(self, num_units: int, coins: Coins) -> Iterator[list[int]]:
        """Logical batches without end; each is in increasing order of index."""
        check_population(type(self).__name__, self.num_units, num_units)
        for batch in PoissonSampling(self.sampling_probability).batches(num_units, coins):
            if len(batch) > self.max_batch_size:
                kept = uniform_subset(self.max_batch_size, len(batch), coins)
                batch = [batch[place] for place in kept]
            yield batch

    def event(self, inner: PrivacyEvent) -> PrivacyEvent:
        return TruncatedPoissonSampled(
            self.num_units, self.sampling_probability, self.max_batch_size, inner
        )
