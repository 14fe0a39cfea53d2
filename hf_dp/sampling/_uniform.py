"""Uniform draws without bias: numbers, orders and subsets, each from 64-bit coins."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_dp._validate import positive_integer
from hf_dp.coins import Coins
from hf_dp.errors import ConfigurationError, explain

Indices = NDArray[np.int64]


def uniform_below(bound: int, count: int, coins: Coins) -> Indices:
    """`count` independent numbers, each of 0, ..., `bound` - 1 equally likely, ``(count,)``."""
    # Coins in the last, incomplete stretch of `bound` values would favour small remainders.
    beyond = (1 << 64) - (1 << 64) % bound
    drawn = np.empty(0, dtype=np.uint64)
    while len(drawn) < count:
        words = coins.bits(count - len(drawn))
        kept = words if beyond == 1 << 64 else words[words < np.uint64(beyond)]
        drawn = np.concatenate((drawn, kept))
    numbers: Indices = (drawn % np.uint64(bound)).astype(np.int64)
    return numbers


def uniform_order(count: int, coins: Coins) -> Indices:
    """0, ..., `count` - 1 in an order of which all are equally likely, ``(count,)``."""
    while True:
        keys = coins.bits(count)
        order = np.argsort(keys)
        if np.all(np.diff(keys[order]) > 0):  # else a tie, which must not favour the first
            return order


def uniform_subset(size: int, count: int, coins: Coins) -> Indices:
    """`size` of 0, ..., `count` - 1, every such set equally likely, in increasing order, ``(size,)``."""
    if size == count:
        return np.arange(count)
    while True:
        keys = coins.bits(count)
        chosen: Indices = np.flatnonzero(keys < np.partition(keys, size)[size])
        if len(chosen) == size:  # else a tie, which must not favour the first
            return chosen


def check_batches(owner: str, num_batches: object) -> None:
    """Refuse a pass without batches."""
    positive_integer(
        f"{owner}.num_batches",
        num_batches,
        "It is how many batches a pass over the data has.",
        "Use num_examples / expected_batch_size, rounded.",
    )


def check_population(owner: str, stated: int, actual: int) -> None:
    """Refuse to draw from another number of units than the one that is accounted for."""
    if stated != actual:
        raise ConfigurationError(
            explain(
                f"{owner}.num_units",
                stated,
                f"the number of units at hand ({actual})",
                "The number of units is part of what is accounted for.",
                "Build the sampler with the number of training examples, or of users.",
            )
        )
