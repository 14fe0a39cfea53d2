"""Poisson sampling: independent inclusions, at the probability that is accounted for and no more."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from hf_dp.coins import FixedCoins, SecretCoins
from hf_dp.errors import ConfigurationError
from hf_dp.events import Gaussian, NeighboringRelation, PoissonSampled
from hf_dp.sampling import BatchSampler, PoissonSampling

FALSE_ALARM = 1e-6  # of each statistical check below, up to a tenth of it


class Chosen(SecretCoins):
    """Coins whose bits the test chooses, over and over."""

    def __init__(self, bits: list[int]) -> None:
        self.chosen = bits
        self.drawn = 0

    def bits(self, count: int) -> np.ndarray:
        start, self.drawn = self.drawn, self.drawn + count
        taken = [self.chosen[(start + i) % len(self.chosen)] for i in range(count)]
        return np.array(taken, dtype=np.uint64)


def fixed(seed: int = 0) -> FixedCoins:
    return FixedCoins(torch.Generator().manual_seed(seed))


def inclusions(sampler: BatchSampler, units: int, draws: int) -> np.ndarray:
    """Who was in which batch, ``(draws, units)`` bool."""
    table = np.zeros((draws, units), dtype=bool)
    for row, drawn in zip(table, sampler.batches(units, SecretCoins()), strict=False):
        row[drawn] = True
    return table


def two_sided(statistic: float, degrees: int) -> bool:
    """Whether a chi-square statistic is plausible."""
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], degrees)
    return bool(low <= statistic <= high)


def each_unit_as_often_as_stated(table: np.ndarray, p: float) -> bool:
    draws, units = table.shape
    counts = table.sum(0)
    return two_sided(((counts - draws * p) ** 2).sum() / (draws * p * (1 - p)), units)


def sizes_vary_as_binomial(table: np.ndarray, p: float) -> bool:
    draws, units = table.shape
    sizes = table.sum(1)
    return two_sided(((sizes - units * p) ** 2).sum() / (units * p * (1 - p)), draws)


def pairs_are_independent(table: np.ndarray, p: float) -> bool:
    """How often two units meet, and how often one is in two batches in a row."""
    draws, units = table.shape
    met = (table.T.astype(int) @ table)[np.triu_indices(units, 1)]
    stayed = (table[0::2] & table[1::2]).sum(0)
    tail = FALSE_ALARM / 2 / (len(met) + len(stayed))
    return all(
        bool((low <= counts.min()) & (counts.max() <= high))
        for counts, times in ((met, draws), (stayed, draws // 2))
        for low, high in [stats.binom.ppf([tail, 1 - tail], times, p * p)]
    )


CHECKS = [each_unit_as_often_as_stated, sizes_vary_as_binomial, pairs_are_independent]


@pytest.mark.statistical
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_inclusions_are_independent_at_the_stated_probability(p: float) -> None:
    table = inclusions(PoissonSampling(p), units=150, draws=5000)
    for check in CHECKS:
        assert check(table, p), check.__name__


class TooOften(PoissonSampling):
    def batches(self, num_units: int, coins: Any) -> Any:
        return PoissonSampling(self.sampling_probability * 1.05).batches(num_units, coins)


class FixedSize(PoissonSampling):
    def batches(self, num_units: int, coins: Any) -> Any:
        size = round(num_units * self.sampling_probability)
        generator = np.random.default_rng(1)
        while True:
            yield generator.choice(num_units, size, replace=False).tolist()


class Repeating(PoissonSampling):
    def batches(self, num_units: int, coins: Any) -> Any:
        for batch in super().batches(num_units, coins):
            yield batch
            yield batch


class Neighbours(PoissonSampling):
    def batches(self, num_units: int, coins: Any) -> Any:
        for batch in super().batches(num_units // 2, coins):
            yield sorted([2 * i for i in batch] + [2 * i + 1 for i in batch])


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("faulty", "check"),
    [
        (TooOften, each_unit_as_often_as_stated),
        (FixedSize, sizes_vary_as_binomial),
        (Repeating, pairs_are_independent),
        (Neighbours, pairs_are_independent),
        (Neighbours, sizes_vary_as_binomial),
    ],
)
def test_a_planted_fault_is_seen(
    faulty: type[PoissonSampling], check: Callable[[np.ndarray, float], bool]
) -> None:
    assert not check(inclusions(faulty(0.3), units=150, draws=5000), 0.3)


@pytest.mark.statistical
def test_empty_batches_come_as_often_as_they_should() -> None:
    draws, p = 20_000, 0.2
    batches = islice(PoissonSampling(p).batches(5, SecretCoins()), draws)
    empty = sum(not batch for batch in batches)
    found = stats.binomtest(empty, draws, (1 - p) ** 5)
    assert found.pvalue > FALSE_ALARM


EXACT = [0.1, 1 / 3, 0.5, 1e-3, 2.0**-60, 1 - 2.0**-53, 1e-25, 0.7071067811865476]


@pytest.mark.parametrize("p", EXACT)
def test_inclusion_probability_is_never_rounded_up(p: float) -> None:
    """The set of 64-bit coins that include is [0, k): k / 2^64 is at most p, by less than 2^-64."""
    k = math.floor(Fraction(p) * 2**64)
    assert 0 <= Fraction(p) - Fraction(k, 2**64) < Fraction(1, 2**64)
    edge = [c for c in (0, k - 1, k, k + 1, 2**64 - 1) if 0 <= c < 2**64]
    [drawn] = islice(PoissonSampling(p).batches(len(edge), Chosen(edge)), 1)
    assert drawn == [index for index, coin in enumerate(edge) if coin < k]


@pytest.mark.parametrize("p", [1, 1.0])
def test_probability_one_includes_all_whatever_the_coins(p: float) -> None:
    coins = Chosen([2**64 - 1])
    assert list(islice(PoissonSampling(p).batches(4, coins), 2)) == [[0, 1, 2, 3]] * 2


def test_batches_are_plain_increasing_indices_without_end() -> None:
    for batch in islice(PoissonSampling(0.5).batches(50, fixed()), 100):
        assert batch == sorted(set(batch))
        assert all(type(index) is int and 0 <= index < 50 for index in batch)


def test_nobody_is_drawn_from_nobody() -> None:
    assert list(islice(PoissonSampling(0.5).batches(0, fixed()), 2)) == [[], []]


def test_drawing_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = [int(b) for b in fixed().bits(20)]
    [whole] = islice(PoissonSampling(0.5).batches(20, Chosen(bits)), 1)
    monkeypatch.setattr("hf_dp.sampling.poisson._BLOCK", 7)
    [blocks] = islice(PoissonSampling(0.5).batches(20, Chosen(bits)), 1)
    assert blocks == whole


def test_fixed_coins_repeat_and_secret_ones_do_not() -> None:
    def some(coins: Any) -> list[list[int]]:
        return list(islice(PoissonSampling(0.5).batches(64, coins), 3))

    assert some(fixed(1)) == some(fixed(1)) != some(fixed(2))
    assert some(SecretCoins()) != some(SecretCoins())  # equal with probability 2^-192


def test_the_event_states_the_probability_that_is_drawn_with() -> None:
    sampler = PoissonSampling(0.25)
    assert sampler.event(Gaussian(2.0)) == PoissonSampled(0.25, Gaussian(2.0))
    assert sampler.unit == "example"
    assert sampler.relation is NeighboringRelation.REPLACE_SPECIAL


@pytest.mark.parametrize("value", [0, -0.1, 1.1, math.nan, math.inf, None, "0.1"])
def test_what_is_no_probability_is_refused(value: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"PoissonSampling\.sampling_probability=.*\(0, 1\]"
    ):
        PoissonSampling(value)
