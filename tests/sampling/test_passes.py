"""Samplers that draw a whole pass: who is where, and what a pass is accounted as."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hf_dp.coins import Coins, SecretCoins
from hf_dp.errors import ConfigurationError
from hf_dp.events import BallsInBins, Gaussian, NeighboringRelation, Shuffled
from hf_dp.sampling import BallsInBinsSampling, BatchSampler, PoissonSampling, ShuffledSampling

FALSE_ALARM = 1e-6  # of each statistical check below
KINDS = [BallsInBinsSampling, ShuffledSampling]


def assignments(sampler: BatchSampler, units: int, passes: int) -> np.ndarray:
    """The batch of each unit in each pass, ``(passes, units)``; -1 where it is in none."""
    table = np.full((passes, units), -1)
    drawn = sampler.batches(units, SecretCoins())
    for row in table:
        for index, batch in enumerate(islice(drawn, sampler.pass_length)):
            assert all(row[batch] == -1)
            row[batch] = index
    return table


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("units", "batches"), [(10, 3), (3, 10), (1, 1), (7, 1), (0, 2)])
def test_every_pass_holds_every_unit_exactly_once(kind: Any, units: int, batches: int) -> None:
    sampler = kind(batches)
    drawn = sampler.batches(units, SecretCoins())
    for _ in range(20):
        one_pass = list(islice(drawn, batches))
        assert sorted(index for batch in one_pass for index in batch) == list(range(units))
        assert all(batch == sorted(batch) for batch in one_pass)
        assert all(type(index) is int for batch in one_pass for index in batch)


def test_shuffled_batches_have_equal_sizes() -> None:
    sizes = [len(batch) for batch in islice(ShuffledSampling(4).batches(10, SecretCoins()), 8)]
    assert sizes == [3, 3, 2, 2] * 2


def uniform_and_independent(table: np.ndarray, batches: int) -> bool:
    """Each pair of units, in one pass and over two, against the uniform law on pairs of batches."""
    tests = []
    for first, second in ((table[:, 0], table[:, 1]), (table[:-1:2, 0], table[1::2, 0])):
        pairs = Counter(zip(first.tolist(), second.tolist(), strict=True))
        counts = [pairs[a, b] for a in range(batches) for b in range(batches)]
        tests.append(stats.chisquare(counts).pvalue)
    return min(tests) > FALSE_ALARM / len(tests)


def sizes_are_binomial(table: np.ndarray, batches: int) -> bool:
    units = table.shape[1]
    sizes = (table == 0).sum(1)
    expected = stats.binom.pmf(np.arange(units + 1), units, 1 / batches) * len(table)
    counts = np.bincount(sizes, minlength=units + 1)
    kept = expected > 5
    rest = [expected[~kept].sum()], [counts[~kept].sum()]
    chances, found = (np.append(a[kept], b) for a, b in ((expected, rest[0]), (counts, rest[1])))
    return bool(stats.chisquare(found, chances).pvalue > FALSE_ALARM)


@pytest.mark.statistical
def test_balls_fall_independently_and_uniformly() -> None:
    table = assignments(BallsInBinsSampling(4), units=8, passes=8_000)
    assert uniform_and_independent(table, 4)
    assert sizes_are_binomial(table, 4)


class SameBins(BallsInBinsSampling):
    """The planted fault of drawing once and going round: what was released once is released again."""

    def batches(self, num_units: int, coins: Coins) -> Iterator[list[int]]:
        while True:
            kept = list(islice(super().batches(num_units, coins), self.num_batches))
            yield from kept
            yield from kept


@pytest.mark.statistical
def test_planted_faults_are_seen() -> None:
    assert not uniform_and_independent(assignments(SameBins(4), 8, 8_000), 4)
    shuffled = assignments(ShuffledSampling(4), 8, 8_000)
    assert not uniform_and_independent(shuffled, 4)  # equal sizes: the units repel one another
    assert not sizes_are_binomial(shuffled, 4)


@pytest.mark.statistical
def test_shuffled_orders_are_fresh_in_every_pass() -> None:
    table = assignments(ShuffledSampling(5), units=5, passes=8_000)
    again = stats.binomtest(int((table[:-1:2, 0] == table[1::2, 0]).sum()), 4_000, 1 / 5)
    assert again.pvalue > FALSE_ALARM


def test_a_pass_is_accounted_as_a_whole() -> None:
    inner = Gaussian(2.0)
    assert BallsInBinsSampling(5).event(inner) == BallsInBins(5, inner)
    assert ShuffledSampling(5).event(inner) == Shuffled(5, inner)
    assert [BallsInBinsSampling(5).pass_length, ShuffledSampling(6).pass_length] == [5, 6]
    assert PoissonSampling(0.5).pass_length == 1
    for kind in KINDS:
        assert kind.relation is NeighboringRelation.REPLACE_SPECIAL
        assert kind.unit == "example"


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_a_pass_are_counted_in_whole_numbers(kind: Any, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"{kind.__name__}\.num_batches=.*whole number"):
        kind(value)
