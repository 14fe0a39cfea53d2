"""Draws without bias: every number, order and subset as likely as any other."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hf_dp.coins import SecretCoins
from hf_dp.sampling._uniform import uniform_below, uniform_order, uniform_subset

FALSE_ALARM = 1e-6  # of each statistical check


class Scripted(SecretCoins):
    """Coins whose bits the test chooses, once."""

    def __init__(self, *bits: int) -> None:
        self.rest = list(bits)

    def bits(self, count: int) -> np.ndarray:
        taken, self.rest = self.rest[:count], self.rest[count:]
        assert len(taken) == count
        return np.array(taken, dtype=np.uint64)


def equally_likely(drawn: Iterable[Hashable], all_outcomes: Iterable[Hashable]) -> bool:
    counts = Counter(drawn)
    outcomes = list(all_outcomes)
    assert set(counts) <= set(outcomes)
    return bool(stats.chisquare([counts[o] for o in outcomes]).pvalue > FALSE_ALARM)


Draw = Callable[..., Any]


def subsets(draw: Draw) -> bool:
    drawn = (tuple(draw(3, 6, SecretCoins()).tolist()) for _ in range(20_000))
    return equally_likely(drawn, itertools.combinations(range(6), 3))


def orders(draw: Draw) -> bool:
    drawn = (tuple(draw(4, SecretCoins()).tolist()) for _ in range(20_000))
    return equally_likely(drawn, itertools.permutations(range(4)))


def numbers(draw: Draw) -> bool:
    return equally_likely(draw(7, 50_000, SecretCoins()).tolist(), range(7))


def favouring_subset(size: int, count: int, coins: SecretCoins) -> np.ndarray:
    """Keys of three bits, ties broken in favour of the first: what the retry prevents."""
    return np.sort(np.argsort(coins.bits(count) >> np.uint64(61), kind="stable")[:size])


def favouring_order(count: int, coins: SecretCoins) -> np.ndarray:
    return np.argsort(coins.bits(count) >> np.uint64(61), kind="stable")


def favouring_below(bound: int, count: int, coins: SecretCoins) -> np.ndarray:
    return (coins.bits(count) >> np.uint64(60)).astype(int) % bound


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("check", "fair", "faulty"),
    [
        (subsets, uniform_subset, favouring_subset),
        (orders, uniform_order, favouring_order),
        (numbers, uniform_below, favouring_below),
    ],
    ids=["subsets", "orders", "numbers"],
)
def test_every_outcome_is_as_likely_and_a_planted_bias_is_seen(
    check: Callable[[Draw], bool], fair: Draw, faulty: Draw
) -> None:
    assert check(fair)
    assert not check(faulty)


def test_the_last_incomplete_stretch_of_coins_is_drawn_again() -> None:
    """2^64 = 1 modulo 3: the one coin left over would make 0 more likely."""
    coins = Scripted(2**64 - 1, 2**64 - 2, 2**64 - 1, 5)
    assert uniform_below(3, 2, coins).tolist() == [(2**64 - 2) % 3, 5 % 3]
    assert coins.rest == []


def test_a_power_of_two_uses_every_coin() -> None:
    assert uniform_below(4, 2, Scripted(2**64 - 1, 6)).tolist() == [3, 2]
    assert uniform_below(1, 2, Scripted(0, 2**64 - 1)).tolist() == [0, 0]


def test_ties_are_drawn_again() -> None:
    assert uniform_order(3, Scripted(5, 1, 5, 9, 8, 7)).tolist() == [2, 1, 0]
    assert uniform_subset(1, 3, Scripted(5, 5, 9, 9, 8, 7)).tolist() == [2]


def test_nothing_and_everything_need_no_luck() -> None:
    assert uniform_below(5, 0, Scripted()).tolist() == []
    assert uniform_order(0, Scripted()).tolist() == []
    assert uniform_subset(4, 4, Scripted()).tolist() == [0, 1, 2, 3]
