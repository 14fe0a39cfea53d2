"""Batches of a fixed size, drawn without replacement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from hf_dp._validate import positive_integer
from hf_dp.coins import Coins
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import (
    NeighboringRelation,
    PrivacyEvent,
    PrivacyUnit,
    SampledWithoutReplacement,
)
from hf_dp.sampling._uniform import check_population, uniform_subset
from hf_dp.sampling.base import BatchSampler


@dataclass(frozen=True)
class FixedSizeSampling(BatchSampler):
    """Every batch holds exactly `batch_size` examples, all such sets equally likely.

    Attributes:
        num_units: Examples to draw from; public.
        batch_size: Examples in a batch, from 1 to `num_units`.

    Guarantees:
        * Batches are independent, and uniform among the sets of their size (test:
          test_every_batch_of_the_size_is_as_likely).

    A full batch has a price: an example that is left out leaves its place to another one, so a single
    example moves the sum by twice the clipping norm, and the same epsilon takes about twice the noise
    of Poisson sampling. The relation is REPLACE_ONE.
    """

    num_units: int
    batch_size: int

    unit: ClassVar[PrivacyUnit] = "example"
    relation: ClassVar[NeighboringRelation] = NeighboringRelation.REPLACE_ONE

    def __post_init__(self) -> None:
        owner = type(self).__name__
        positive_integer(
            f"{owner}.num_units", self.num_units, "It is who may be drawn.", "Use len(dataset)."
        )
        positive_integer(
            f"{owner}.batch_size",
            self.batch_size,
            "Every batch has exactly this size.",
            "Use a whole number, the expected batch size.",
        )
        if self.batch_size > self.num_units:
            raise ConfigurationError(
                explain(
                    f"{owner}.batch_size",
                    self.batch_size,
                    f"at most num_units ({self.num_units})",
                    "Without replacement no example is in a batch twice.",
                    "Lower it.",
                )
            )

    def batches(self, num_units: int, coins: Coins) -> Iterator[list[int]]:
        """Logical batches without end; each is in increasing order of index."""
        check_population(type(self).__name__, self.num_units, num_units)
        while True:
            yield [int(index) for index in uniform_subset(self.batch_size, num_units, coins)]

    def event(self, inner: PrivacyEvent) -> PrivacyEvent:
        return SampledWithoutReplacement(self.num_units, self.batch_size, inner)
