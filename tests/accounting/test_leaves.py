"""Passes are counted whole, further batches only where a pass has room for them; claims fit samplers."""

from __future__ import annotations

import pytest

from hf_dp.accounting import (
    ACCOUNTANTS,
    ESTIMATORS,
    accountant_named,
    accountant_or_estimator_named,
    flatten,
)
from hf_dp.errors import UnsupportedEventError
from hf_dp.events import (
    BallsInBins,
    Composed,
    Continued,
    Gaussian,
    NeighboringRelation,
    PoissonSampled,
    PoissonSampledContributions,
    PrivacyEvent,
    SampledWithoutReplacement,
    SelfComposed,
    Shuffled,
    TruncatedPoissonSampled,
)

PASS = Shuffled(4, Gaussian(2.0))
FURTHER = Continued(PASS)


@pytest.mark.parametrize(
    ("begun", "further", "passes"),
    [(1, 0, 1), (1, 3, 1), (2, 3, 2), (2, 6, 2), (1, 4, 2), (0, 1, 1), (0, 9, 3), (3, 0, 3)],
)
def test_further_batches_cost_nothing_while_a_begun_pass_has_room(
    begun: int, further: int, passes: int
) -> None:
    events = [PASS] * begun + [FURTHER] * further
    assert flatten(events) == {PASS: passes}


def test_passes_are_counted_through_any_composition() -> None:
    whole = Composed((PASS, SelfComposed(FURTHER, 3)))
    assert flatten(SelfComposed(whole, 5)) == {PASS: 5}
    assert flatten([whole, PASS, FURTHER]) == {PASS: 2}
    assert flatten([whole, BallsInBins(4, Gaussian(2.0))]) == {
        PASS: 1,
        BallsInBins(4, Gaussian(2.0)): 1,
    }


def test_further_batches_of_another_pass_find_no_room() -> None:
    other = Shuffled(4, Gaussian(1.0))
    assert flatten([PASS, Continued(other)]) == {PASS: 1, other: 1}


def test_one_bin_is_the_whole_data() -> None:
    assert flatten(SelfComposed(BallsInBins(1, Gaussian(2.0)), 3)) == {Gaussian(2.0): 3}


def test_one_example_of_each_unit_is_a_poisson_sample() -> None:
    single = PoissonSampledContributions(0.1, 1, Gaussian(2.0))
    assert flatten([single, PoissonSampled(0.1, Gaussian(2.0))]) == {
        PoissonSampled(0.1, Gaussian(2.0)): 2
    }
    assert flatten(PoissonSampledContributions(1.0, 1, Gaussian(2.0))) == {Gaussian(2.0): 1}


@pytest.mark.parametrize("always", [1, 1.0])
def test_examples_that_are_always_drawn_move_the_sum_together(always: float) -> None:
    event = SelfComposed(PoissonSampledContributions(always, 4, Gaussian(2.0)), 3)
    assert flatten(event) == {Gaussian(0.5): 3}


def test_contributions_to_anything_but_a_gaussian_stay_as_they_are_and_are_refused() -> None:
    for inner in (PASS, SelfComposed(Gaussian(2.0), 2), PoissonSampled(0.1, Gaussian(2.0))):
        for probability in (0.1, 1.0):
            odd = PoissonSampledContributions(probability, 4, inner)
            assert flatten(odd) == {odd: 1}
            with pytest.raises(UnsupportedEventError, match=r"event=PoissonSampledContrib"):
                accountant_named("pld").guarantee(odd, delta=1e-5)


@pytest.mark.parametrize("accountant", [*ACCOUNTANTS, *ESTIMATORS])
def test_no_accountant_takes_a_sample_of_contributions_inside_another_sampler(
    accountant: str,
) -> None:
    inner = PoissonSampledContributions(0.1, 4, Gaussian(2.0))
    for outer in (PoissonSampled(0.5, inner), Shuffled(2, inner), BallsInBins(2, inner)):
        found = accountant_or_estimator_named(accountant)
        assert not found.can_cost(outer, NeighboringRelation.REPLACE_SPECIAL)


ONLY: list[tuple[PrivacyEvent, set[NeighboringRelation]]] = [
    (Gaussian(2.0), {NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_SPECIAL}),
    (
        PoissonSampled(0.1, Gaussian(2.0)),
        {NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_SPECIAL},
    ),
    (
        BallsInBins(4, Gaussian(2.0)),
        {NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_SPECIAL},
    ),
    (
        PoissonSampledContributions(0.1, 3, Gaussian(2.0)),
        {NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_SPECIAL},
    ),
    (PASS, {NeighboringRelation.REPLACE_SPECIAL}),
    (TruncatedPoissonSampled(100, 0.1, 20, Gaussian(2.0)), {NeighboringRelation.REPLACE_SPECIAL}),
    (SampledWithoutReplacement(100, 10, Gaussian(2.0)), {NeighboringRelation.REPLACE_ONE}),
]


@pytest.mark.parametrize(("event", "allowed"), ONLY, ids=lambda case: type(case).__name__)
@pytest.mark.parametrize("relation", NeighboringRelation)
def test_each_sampler_has_the_neighbours_that_its_proof_is_about(
    event: PrivacyEvent, allowed: set[NeighboringRelation], relation: NeighboringRelation
) -> None:
    pld = accountant_named("pld")
    assert pld.can_cost(event, relation) == (relation in allowed)
    if relation in allowed:
        assert 0 < pld.guarantee(event, delta=1e-5, relation=relation).epsilon < 20
    else:
        with pytest.raises(UnsupportedEventError, match=r"relation=.*expected"):
            pld.guarantee(event, delta=1e-5, relation=relation)
