"""Who owns which example, and that what is drawn of a user is fair, bounded, and nobody else's affair."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from hf_dp.coins import FixedCoins, SecretCoins
from hf_dp.errors import ConfigurationError
from hf_dp.events import Gaussian, NeighboringRelation, PoissonSampled, PoissonSampledContributions
from hf_dp.sampling import (
    BallsInBinsSampling,
    BatchSampler,
    ContributionSampling,
    FixedSizeSampling,
    PoissonSampling,
    ShuffledSampling,
    TruncatedPoissonSampling,
    Users,
    UserSampling,
)
from hf_dp.sampling import users as users_module

IDS = ["a", "b", "a", "c", "a", "b", "a", "a"]  # a: 0 2 4 6 7; b: 1 5; c: 3
INNER: list[BatchSampler] = [
    PoissonSampling(0.3),
    TruncatedPoissonSampling(20, 0.3, 9),
    BallsInBinsSampling(4),
    ShuffledSampling(4),
    FixedSizeSampling(20, 6),
]


def users(ids: Any = IDS, size: int | None = None) -> Users:
    return Users.of(ids, len(ids) if size is None else size, owner="owner", shown="ids")


def fixed(seed: int = 0) -> FixedCoins:
    return FixedCoins(torch.Generator().manual_seed(seed))


def own(found: Users, user: int) -> list[int]:
    return found.fresh(user, None, fixed())


def chi_square(counts: list[int], expected: float) -> float:
    return sum((count - expected) ** 2 for count in counts) / expected


# ---- who owns what ------------------------------------------------------------------------------


def test_every_example_has_the_owner_that_its_id_says() -> None:
    found = users()
    assert (found.num_users, found.num_examples) == (3, 8)
    assert [own(found, user) for user in range(3)] == [[0, 2, 4, 6, 7], [1, 5], [3]]


@pytest.mark.parametrize(
    "ids",
    [
        [5, 7, 5, 9, 5, 7, 5, 5],
        (5, 7, 5, 9, 5, 7, 5, 5),
        np.array([5, 7, 5, 9, 5, 7, 5, 5]),
        torch.tensor([5, 7, 5, 9, 5, 7, 5, 5]),
        pd.Series([5, 7, 5, 9, 5, 7, 5, 5]),
        [torch.tensor(v) for v in (5, 7, 5, 9, 5, 7, 5, 5)],  # equal ones have different hashes
        [np.array(v) for v in (5, 7, 5, 9, 5, 7, 5, 5)],
        [np.int64(5), 7, 5.0, 9, 5, np.int32(7), 5, 5],
        np.array(IDS),
        [text.encode() for text in IDS],
    ],
)
def test_ids_are_compared_by_what_they_say(ids: Any) -> None:
    assert [own(users(ids), user) for user in range(3)] == [[0, 2, 4, 6, 7], [1, 5], [3]]


class Thing:
    """Equal to itself alone."""


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (["a", None, "b"], "an id for every example"),
        (["a", math.nan, "b"], "an id for every example"),
        (np.array([1.0, np.nan, 2.0]), "an id for every example"),
        (["a", pd.NA, "b"], "an id for every example"),
        (["a", pd.NaT, "b"], "an id for every example"),
        (["a", "", "b"], "an id for every example"),
        (["a", " ", "b"], "an id for every example"),
        ([b"a", b"", b"b"], "an id for every example"),
        ([str(value) for value in ("a", None, "b")], "an id for every example"),
        ([str(value) for value in (1.0, math.nan, 2.0)], "an id for every example"),
        ([str(value) for value in ("a", pd.NA, pd.NaT)], "an id for every example"),
        ([["a"], ["a", "b"], ["c"]], "one user for each example"),
        ([("a", "b"), "a", "b"], "one user for each example"),
        ([{"a"}, {"b"}, {"c"}], "one user for each example"),
        ([frozenset("ab"), "a", "b"], "one user for each example"),
        (np.zeros((3, 2)), "one user for each example"),
        (torch.zeros(3, 2), "one user for each example"),
        ([torch.zeros(1), torch.zeros(2), 3], "one user for each example"),
        ([{"id": "a"}, {"id": "b"}, {"id": "a"}], "hashed and compared by value"),
        ([Thing(), Thing(), Thing()], "hashed and compared by value"),
        (["7", 7, "secret"], "ids of one kind"),
        ([b"secret", "secret", "a"], "ids of one kind"),
        (["secret"] * 3, "at least two users"),
        ("abc", "a sequence with one id"),
        (b"abc", "a sequence with one id"),
        (7, "a sequence with one id"),
        ({"a": 1, "b": 2, "c": 3}, "a sequence with one id"),
        (["a", "b"], "one id for each example"),
        (["a", "b", "c", "d"], "one id for each example"),
        ([], "one id for each example"),
    ],
)
def test_ids_that_do_not_tell_an_owner_are_refused_without_naming_any(ids: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^owner='ids': expected .*{match}") as caught:
        users(ids, 3)
    assert "secret" not in str(caught.value)


def test_names_that_only_look_like_nothing_are_names() -> None:
    assert users(["Nan", "NONE", "none", "null", "0", "a"]).num_users == 6


def test_a_representation_shows_no_owner() -> None:
    assert "array" not in repr(users())


# ---- a bound for the whole training -------------------------------------------------------------


def test_the_first_and_the_longest_are_kept() -> None:
    lengths = [1, 9, 5, 9, 5, 8, 7, 2]
    assert users().bounded(2, "first", fixed()).tolist() == [0, 1, 2, 3, 5]
    assert users().bounded(2, "longest", fixed(), lengths).tolist() == [1, 2, 3, 5, 6]
    assert users().bounded(9, "random", fixed()).tolist() == list(range(8))


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_no_user_keeps_more_than_the_bound_and_each_as_many_as_it_allows(most: int) -> None:
    found = users()
    for seed in range(20):
        kept = Counter(IDS[place] for place in found.bounded(most, "random", fixed(seed)))
        assert kept == {user: min(count, most) for user, count in Counter(IDS).items()}
    assert found.num_kept(most) == sum(kept.values())
    assert found.num_cut(most) == sum(count > most for count in Counter(IDS).values())


def more_than_the_bound(self: Users, *_: Any, **__: Any) -> np.ndarray:
    return np.arange(self.num_examples)


def test_a_bound_that_keeps_too_many_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Users, "bounded", more_than_the_bound)
    with pytest.raises(AssertionError):
        test_no_user_keeps_more_than_the_bound_and_each_as_many_as_it_allows(2)


@pytest.mark.parametrize(
    ("most", "selection", "lengths"), [(0, "first", None), (2, "last", None), (2, "longest", [1])]
)
def test_no_bound_no_selection_or_no_lengths(most: int, selection: str, lengths: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^Users\.bounded"):
        users().bounded(most, selection, fixed(), lengths)


# ---- fairness -----------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("draw", ["fresh", "bounded"])
def test_every_subset_of_a_users_examples_is_as_likely(draw: str) -> None:
    """Chi-square over the 10 pairs of 5 examples, 20,000 draws; false alarm once in 10^6."""
    found, coins, seen = users(), SecretCoins(), Counter[tuple[int, ...]]()
    for _ in range(20_000):
        if draw == "fresh":
            drawn = found.fresh(0, 2, coins)
        else:
            drawn = [e for e in found.bounded(2, "random", coins).tolist() if IDS[e] == "a"]
        seen[tuple(drawn)] += 1
    assert set(seen) == set(itertools.combinations([0, 2, 4, 6, 7], 2))
    assert chi_square(list(seen.values()), 2000) < stats.chi2.ppf(1 - 1e-6, 9)


def favours_the_first(size: int, count: int, coins: Any) -> np.ndarray:
    """Every eleventh time simply the first ones."""
    if coins.bits(1)[0] % np.uint64(11) == 0:
        return np.arange(size)
    return UNIFORM(size, count, coins)


UNIFORM = users_module.uniform_subset


def test_a_draw_that_favours_the_first_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users_module, "uniform_subset", favours_the_first)
    with pytest.raises(AssertionError):
        test_every_subset_of_a_users_examples_is_as_likely("fresh")


@pytest.mark.parametrize("most", [1, 2, 5, 9, None])
def test_fresh_examples_are_different_and_the_users_own(most: int | None) -> None:
    found = users()
    for user, coins in itertools.product(range(3), [SecretCoins(), fixed()]):
        drawn = found.fresh(user, most, coins)
        assert set(drawn) <= set(own(found, user))
        assert len(set(drawn)) == len(drawn) == min(most or 9, len(own(found, user)))


@pytest.mark.statistical
def test_users_are_drawn_independently_and_with_their_probability() -> None:
    """Counts of 3 users in 20,000 batches; false alarm once in 10^6: 5.33 deviations of 8 counts."""
    batches = UserSampling(PoissonSampling(0.3)).batches(3, SecretCoins())
    counts: Counter[tuple[int, ...]] = Counter(
        tuple(batch) for batch in itertools.islice(batches, 20_000)
    )
    for subset in itertools.chain.from_iterable(
        itertools.combinations(range(3), k) for k in range(4)
    ):
        chance = 0.3 ** len(subset) * 0.7 ** (3 - len(subset))
        deviation = math.sqrt(20_000 * chance * (1 - chance))
        assert abs(counts[subset] - 20_000 * chance) < 5.33 * deviation


def test_a_probability_of_examples_would_be_seen_among_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A user who comes in as soon as one of two examples is drawn."""
    drawn = PoissonSampling.batches

    def per_example(self: PoissonSampling, num_units: int, coins: Any) -> Any:
        for batch in drawn(self, 2 * num_units, coins):
            yield sorted({index // 2 for index in batch})

    monkeypatch.setattr(PoissonSampling, "batches", per_example)
    with pytest.raises(AssertionError):
        test_users_are_drawn_independently_and_with_their_probability()


# ---- samplers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", INNER, ids=lambda inner: type(inner).__name__)
def test_users_are_drawn_and_accounted_for_as_examples_would_be(inner: BatchSampler) -> None:
    sampler = UserSampling(inner)
    assert (sampler.unit, sampler.relation) == ("user", inner.relation)
    assert sampler.pass_length == inner.pass_length
    assert sampler.event(Gaussian(2.0)) == inner.event(Gaussian(2.0))
    ours = itertools.islice(sampler.batches(20, fixed(1)), 8)
    assert list(ours) == list(itertools.islice(inner.batches(20, fixed(1)), 8))


@pytest.mark.parametrize(
    "inner", [UserSampling(PoissonSampling(0.3)), ContributionSampling(0.3, 2), 0.3, None]
)
def test_users_of_users_are_nobody(inner: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^UserSampling\.users="):
        UserSampling(inner)


def test_contributions_are_drawn_as_examples_and_accounted_for_as_users() -> None:
    sampler = ContributionSampling(0.3, 4)
    assert sampler.unit == "user"
    assert sampler.relation is NeighboringRelation.REPLACE_SPECIAL
    assert sampler.event(Gaussian(2.0)) == PoissonSampledContributions(0.3, 4, Gaussian(2.0))
    assert sampler.event(Gaussian(2.0)) != PoissonSampled(0.3, Gaussian(2.0))
    ours = itertools.islice(sampler.batches(20, fixed(1)), 8)
    assert list(ours) == list(itertools.islice(PoissonSampling(0.3).batches(20, fixed(1)), 8))


@pytest.mark.parametrize(("probability", "most"), [(0.0, 2), (1.5, 2), (0.1, 0), (0.1, 2.0)])
def test_contributions_without_probability_or_bound(probability: float, most: Any) -> None:
    with pytest.raises(ConfigurationError):
        ContributionSampling(probability, most)


@pytest.mark.slow
def test_a_million_examples_are_grouped_bounded_and_drawn_quickly() -> None:
    ids = np.random.default_rng(0).integers(0, 100_000, 1_000_000).tolist()
    start = time.perf_counter()
    found = users(ids)
    kept = found.bounded(4, "random", SecretCoins())
    rows = [found.fresh(user, 4, SecretCoins()) for user in range(2000)]
    assert time.perf_counter() - start < 10
    assert len(kept) == found.num_kept(4)
    assert all(len(row) <= 4 for row in rows)
    assert found.examples.nbytes + found.starts.nbytes < 10_000_000
