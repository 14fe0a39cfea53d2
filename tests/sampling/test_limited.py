"""Batches of a fixed size and cut batches: the law that is accounted for, and nothing else."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hf_dp.coins import Coins, SecretCoins
from hf_dp.errors import ConfigurationError
from hf_dp.events import (
    Gaussian,
    NeighboringRelation,
    SampledWithoutReplacement,
    TruncatedPoissonSampled,
)
from hf_dp.sampling import (
    BatchSampler,
    FixedSizeSampling,
    PoissonSampling,
    TruncatedPoissonSampling,
)

FALSE_ALARM = 1e-6  # of each statistical check below
DRAWS = 20_000


def drawn(sampler: BatchSampler, units: int, draws: int = DRAWS) -> list[tuple[int, ...]]:
    return [tuple(batch) for batch in islice(sampler.batches(units, SecretCoins()), draws)]


def follows(batches: list[Any], chances: dict[Any, float]) -> bool:
    counts = Counter(batches)
    assert set(counts) <= set(chances)
    expected = [len(batches) * chance for chance in chances.values()]
    found = [counts[outcome] for outcome in chances]
    return bool(stats.chisquare(found, expected).pvalue > FALSE_ALARM)


def fixed_size_law(units: int, size: int) -> dict[tuple[int, ...], float]:
    sets = list(itertools.combinations(range(units), size))
    return dict.fromkeys(sets, 1 / len(sets))


def cut_law(units: int, q: float, cap: int) -> dict[tuple[int, ...], float]:
    """By enumeration of the Poisson sample and of what is kept of it."""
    chances: Counter[tuple[int, ...]] = Counter()
    for members in itertools.product([0, 1], repeat=units):
        sample = [unit for unit, there in enumerate(members) if there]
        chance = q ** len(sample) * (1 - q) ** (units - len(sample))
        kept = list(itertools.combinations(sample, min(cap, len(sample))))
        for batch in kept:
            chances[batch] += chance / len(kept)
    return dict(chances)


@pytest.mark.statistical
def test_every_batch_of_the_size_is_as_likely() -> None:
    batches = drawn(FixedSizeSampling(6, 2), 6)
    assert follows(batches, fixed_size_law(6, 2))
    assert follows(
        list(zip(batches[::2], batches[1::2], strict=True)),
        {pair: 15**-2 for pair in itertools.product(fixed_size_law(6, 2), repeat=2)},
    )


@pytest.mark.statistical
def test_a_batch_that_is_too_large_is_cut_fairly() -> None:
    assert follows(drawn(TruncatedPoissonSampling(5, 0.5, 2), 5), cut_law(5, 0.5, 2))


class FirstOnes(TruncatedPoissonSampling):
    """The planted fault: what is too much is cut off at the end."""

    def batches(self, num_units: int, coins: Coins) -> Iterator[list[int]]:
        for batch in PoissonSampling(self.sampling_probability).batches(num_units, coins):
            yield batch[: self.max_batch_size]


class DrawnAgain(TruncatedPoissonSampling):
    """Another: what is too much is thrown away as a whole."""

    def batches(self, num_units: int, coins: Coins) -> Iterator[list[int]]:
        for batch in PoissonSampling(self.sampling_probability).batches(num_units, coins):
            if len(batch) <= self.max_batch_size:
                yield batch


class Neighbours(FixedSizeSampling):
    """The planted fault: a stretch of the data, wherever it begins."""

    def batches(self, num_units: int, coins: Coins) -> Iterator[list[int]]:
        while True:
            start = int(coins.bits(1)[0] % np.uint64(num_units))
            yield sorted((start + step) % num_units for step in range(self.batch_size))


@pytest.mark.statistical
def test_planted_faults_are_seen() -> None:
    assert not follows(drawn(Neighbours(6, 2), 6), fixed_size_law(6, 2))
    for faulty in (FirstOnes, DrawnAgain):
        assert not follows(drawn(faulty(5, 0.5, 2), 5), cut_law(5, 0.5, 2))


def test_batches_have_the_promised_sizes() -> None:
    assert {len(batch) for batch in drawn(FixedSizeSampling(50, 7), 50, 200)} == {7}
    assert max(len(batch) for batch in drawn(TruncatedPoissonSampling(50, 0.5, 9), 50, 200)) == 9
    assert drawn(FixedSizeSampling(3, 3), 3, 1) == [(0, 1, 2)]
    for sampler in (FixedSizeSampling(50, 7), TruncatedPoissonSampling(50, 0.5, 9)):
        for batch in drawn(sampler, 50, 50):
            assert list(batch) == sorted(set(batch))
            assert all(type(index) is int for index in batch)


@pytest.mark.parametrize(
    "sampler", [FixedSizeSampling(50, 7), TruncatedPoissonSampling(50, 0.5, 9)]
)
def test_other_data_than_was_accounted_for_is_refused(sampler: BatchSampler) -> None:
    with pytest.raises(ConfigurationError, match=r"num_units=50: expected .*\(51\)"):
        next(sampler.batches(51, SecretCoins()))


def test_the_events_state_what_is_drawn() -> None:
    inner = Gaussian(2.0)
    assert FixedSizeSampling(50, 7).event(inner) == SampledWithoutReplacement(50, 7, inner)
    assert FixedSizeSampling.relation is NeighboringRelation.REPLACE_ONE
    cut = TruncatedPoissonSampling(50, 0.5, 9)
    assert cut.event(inner) == TruncatedPoissonSampled(50, 0.5, 9, inner)
    assert TruncatedPoissonSampling.relation is NeighboringRelation.REPLACE_SPECIAL


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: FixedSizeSampling(0, 1), r"FixedSizeSampling\.num_units=0"),
        (lambda: FixedSizeSampling(5, 2.5), r"FixedSizeSampling\.batch_size=2\.5"),
        (lambda: FixedSizeSampling(5, 6), r"FixedSizeSampling\.batch_size=6: .*num_units \(5\)"),
        (lambda: TruncatedPoissonSampling(0, 0.1, 1), r"TruncatedPoissonSampling\.num_units=0"),
        (lambda: TruncatedPoissonSampling(5, 1.1, 1), r"sampling_probability=1\.1"),
        (
            lambda: TruncatedPoissonSampling(5, 0.1, None),
            r"TruncatedPoissonSampling\.max_batch_size=None",
        ),
    ],
)
def test_what_is_no_count_or_probability_is_refused(make: Any, field: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        make()
