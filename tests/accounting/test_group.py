"""Fewer examples cost less; what follows from a guarantee for one example is loose and labelled so."""

from __future__ import annotations

import math

import pytest

from hf_dp.accounting import accountant_named, accountant_or_estimator_named
from hf_dp.accounting.group import for_owner_of, group_guarantee
from hf_dp.errors import ConfigurationError, UnsupportedEventError
from hf_dp.events import (
    Composed,
    Gaussian,
    NeighboringRelation,
    NonPrivate,
    PoissonSampled,
    PoissonSampledContributions,
    SelfComposed,
    Shuffled,
)

OURS = PoissonSampledContributions(0.01, 8, Gaussian(3.0))
PLD, RDP = accountant_named("pld"), accountant_named("rdp")


def test_an_owner_of_fewer_examples_has_a_better_guarantee() -> None:
    run = SelfComposed(Composed((OURS,)), 200)
    all_of_them = PLD.guarantee(run, delta=1e-6).epsilon
    found = [PLD.guarantee(for_owner_of(n, run), delta=1e-6).epsilon for n in (1, 3, 8, 100)]
    assert found == sorted(found)
    assert found[2] == found[3] == all_of_them
    plain = SelfComposed(PoissonSampled(0.01, Gaussian(3.0)), 200)
    assert found[0] == PLD.guarantee(plain, delta=1e-6).epsilon
    assert found[1] < all_of_them / 2


def test_releases_about_whole_users_stay_as_they_are() -> None:
    others = (
        PoissonSampled(0.1, Gaussian(2.0)),
        Gaussian(1.0),
        NonPrivate("exact"),
        Shuffled(3, Gaussian(1.0)),
    )
    assert for_owner_of(2, others) == others
    always = PoissonSampledContributions(1.0, 8, Gaussian(3.0))
    assert for_owner_of(2, [Composed((always, *others))]) == (
        Composed((PoissonSampledContributions(1.0, 2, Gaussian(3.0)), *others)),
    )


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_an_owner_owns_something(value: float) -> None:
    with pytest.raises(ConfigurationError, match=r"for_owner_of\.num_examples="):
        for_owner_of(value, OURS)  # type: ignore[arg-type]


EXAMPLES = SelfComposed(PoissonSampled(0.01, Gaussian(2.0)), 100)


def test_group_privacy_is_named_and_never_below_the_tight_answer() -> None:
    for most in (1, 2, 5):
        grouped = group_guarantee(PLD, EXAMPLES, group_size=most, delta=1e-6)
        assert grouped.accountant == "group privacy over pld"
        assert (grouped.unit, grouped.delta, grouped.is_upper_bound) == ("user", 1e-6, True)
        tight = SelfComposed(PoissonSampledContributions(0.01, most, Gaussian(2.0)), 100)
        assert grouped.epsilon >= PLD.guarantee(tight, delta=1e-6).epsilon


def test_group_privacy_follows_from_the_examples_guarantee_at_its_delta() -> None:
    """The pair (e, d) is found once more from the answer, by the geometric sum written out."""
    grouped = group_guarantee(PLD, EXAMPLES, group_size=4, delta=1e-6)
    one = grouped.epsilon / 4
    delta = 1e-6 / sum(math.exp(k * one) for k in range(4))
    assert one == pytest.approx(PLD.guarantee(EXAMPLES, delta=delta).epsilon, rel=1e-3)
    assert one >= PLD.guarantee(EXAMPLES, delta=delta).epsilon * (1 - 1e-9)


def test_an_accountant_without_a_least_delta_goes_on_to_large_groups() -> None:
    longer = SelfComposed(PoissonSampled(0.01, Gaussian(2.0)), 1000)
    assert group_guarantee(PLD, longer, group_size=16, delta=1e-6).epsilon == math.inf
    assert 16.6 < group_guarantee(RDP, longer, group_size=16, delta=1e-6).epsilon < 100
    hopeless = SelfComposed(PoissonSampled(0.5, Gaussian(0.3)), 1000)
    assert group_guarantee(RDP, hopeless, group_size=200, delta=1e-6).epsilon == math.inf


def test_what_is_free_or_not_private_is_so_for_groups() -> None:
    assert group_guarantee(RDP, [], group_size=3, delta=1e-6).epsilon == 0
    exact = group_guarantee(RDP, NonPrivate("exact"), group_size=3, delta=1e-6)
    assert exact.epsilon == math.inf


def test_what_cannot_be_costed_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"group_size=0"):
        group_guarantee(PLD, EXAMPLES, group_size=0, delta=1e-6)
    with pytest.raises(ConfigurationError, match=r"group_guarantee\.delta=2"):
        group_guarantee(PLD, EXAMPLES, group_size=2, delta=2.0)
    with pytest.raises(ConfigurationError, match="proves upper bounds"):
        group_guarantee(accountant_or_estimator_named("gdp"), EXAMPLES, group_size=2, delta=1e-6)
    with pytest.raises(UnsupportedEventError, match="PoissonSampledContributions"):
        group_guarantee(RDP, OURS, group_size=2, delta=1e-6)
    with pytest.raises(UnsupportedEventError, match="relation"):
        group_guarantee(
            PLD, EXAMPLES, group_size=2, delta=1e-6, relation=NeighboringRelation.REPLACE_ONE
        )
