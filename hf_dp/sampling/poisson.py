"""Poisson sampling: each unit is in each batch independently with the same probability."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hf_dp._validate import probability
from hf_dp.coins import Coins
from hf_dp.events import NeighboringRelation, PoissonSampled, PrivacyEvent, PrivacyUnit
from hf_dp.sampling.base import BatchSampler

_BLOCK = 1 << 22  # coins flipped at a time, so that memory stays bounded


@dataclass(frozen=True)
class PoissonSampling(BatchSampler):
    """Poisson sampling of examples.

    Attributes:
        sampling_probability: Chance that an example is in a batch, in (0, 1].

    Guarantees:
        * Inclusions are independent across examples and batches.
        * The true inclusion probability never exceeds `sampling_probability`; it falls short of it by
          less than 2^-64 (test: test_inclusion_probability_is_never_rounded_up).

    The relation is REPLACE_SPECIAL: in practice the probability is computed from the number of
    examples, so that number is public. The same epsilon holds for ADD_OR_REMOVE_ONE when the
    probability and the number of steps were fixed without looking at it.
    """

    sampling_probability: float

    unit: ClassVar[PrivacyUnit] = "example"
    relation: ClassVar[NeighboringRelation] = NeighboringRelation.REPLACE_SPECIAL

    def __post_init__(self) -> None:
        probability(
            "PoissonSampling.sampling_probability",
            self.sampling_probability,
            "It is the chance that an example is in a batch.",
            "Use expected_batch_size / num_examples.",
        )

    def batches(self, num_units: int, coins: Coins) -> Iterator[list[int]]:
        """Logical batches without end; each is in increasing order of index."""
        while True:
            yield [int(index) for index in self._draw(num_units, coins)]

    def event(self, inner: PrivacyEvent) -> PrivacyEvent:
        return PoissonSampled(self.sampling_probability, inner)

    def _draw(self, num_units: int, coins: Coins) -> np.ndarray:
        if self.sampling_probability == 1.0:
            return np.arange(num_units)
        threshold = np.uint64(int(self.sampling_probability * 2.0**64))
        blocks = [
            start + np.flatnonzero(coins.bits(min(_BLOCK, num_units - start)) < threshold)
            for start in range(0, num_units, _BLOCK)
        ]
        return np.concatenate(blocks) if blocks else np.empty(0, dtype=np.int64)
