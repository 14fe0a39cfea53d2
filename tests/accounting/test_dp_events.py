"""A ledger's events, replayed in dp-accounting."""

from __future__ import annotations

import dp_accounting
import pytest
from dp_accounting import NeighboringRelation as Theirs
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant as TheirPLD
from dp_accounting.rdp import RdpAccountant as TheirRDP

from hf_dp.accounting import accountant_named
from hf_dp.accounting.dp_events import as_dp_event
from hf_dp.errors import UnsupportedEventError
from hf_dp.events import (
    BallsInBins,
    Composed,
    Continued,
    Gaussian,
    Laplace,
    NeighboringRelation,
    NonPrivate,
    PoissonSampled,
    PoissonSampledContributions,
    PrivacyEvent,
    SampledWithoutReplacement,
    ScaleMixtureLaplace,
    SelfComposed,
    Shuffled,
    TruncatedPoissonSampled,
)

LEDGERS: list[list[PrivacyEvent]] = [
    [SelfComposed(PoissonSampled(0.01, Gaussian(1.0)), 100), Gaussian(5.0)],
    [
        Composed(
            (Shuffled(4, Gaussian(3.0)), SelfComposed(Continued(Shuffled(4, Gaussian(3.0))), 3))
        )
    ],
    [SelfComposed(PoissonSampledContributions(0.02, 3, Gaussian(2.0)), 100), Gaussian(5.0)],
    [SelfComposed(TruncatedPoissonSampled(1000, 0.1, 170, Gaussian(2.0)), 50)],
    [SelfComposed(PoissonSampled(0.05, Laplace(2.0)), 60), Shuffled(3, Laplace(5.0)), Laplace(7.0)],
]


@pytest.mark.parametrize("events", LEDGERS, ids=lambda events: str(events[0])[:40])
def test_a_replayed_ledger_has_the_same_epsilon(events: list[PrivacyEvent]) -> None:
    relation = NeighboringRelation.REPLACE_SPECIAL
    ours = accountant_named("pld").guarantee(events, delta=1e-5, relation=relation).epsilon
    theirs = TheirPLD(Theirs.REPLACE_SPECIAL, value_discretization_interval=1e-3)
    theirs.compose(as_dp_event(events))
    assert ours == pytest.approx(theirs.get_epsilon(1e-5), rel=5e-3)


def test_without_replacement_the_noise_is_relative_to_twice_the_norm() -> None:
    event = SelfComposed(SampledWithoutReplacement(10_000, 100, Gaussian(1.0)), 1000)
    theirs = TheirRDP(neighboring_relation=Theirs.REPLACE_ONE)
    theirs.compose(as_dp_event(event))
    assert theirs.get_epsilon(1e-6) == pytest.approx(23.29, abs=5e-3)
    ours = accountant_named("pld").guarantee(
        event, delta=1e-6, relation=NeighboringRelation.REPLACE_ONE
    )
    assert 15.48 < ours.epsilon < theirs.get_epsilon(1e-6)


def test_contributions_are_a_mixture_of_gaussians_there() -> None:
    event = PoissonSampledContributions(0.25, 2, Gaussian(3.0))
    mixture = dp_event.MixtureOfGaussiansDpEvent(3.0, [0.0, 1.0, 2.0], [0.5625, 0.375, 0.0625])
    (part,) = as_dp_event(event).events
    assert part.count == 1
    assert part.event.standard_deviation == mixture.standard_deviation
    assert list(part.event.sensitivities) == mixture.sensitivities
    assert part.event.sampling_probs == pytest.approx(mixture.sampling_probs, rel=1e-12)


def test_chances_that_underflow_are_left_out_there() -> None:
    (part,) = as_dp_event(PoissonSampledContributions(1e-8, 100, Gaussian(3.0))).events
    chances = part.event.sampling_probs
    assert 2 < len(chances) == len(part.event.sensitivities) < 100
    assert min(chances) > 0
    assert sum(chances) == pytest.approx(1, abs=1e-12)


def test_what_is_not_private_is_not_private_there_either() -> None:
    theirs = TheirPLD(Theirs.ADD_OR_REMOVE_ONE)
    theirs.compose(as_dp_event([Gaussian(1.0), NonPrivate("exact")]))
    assert theirs.get_epsilon(1e-5) == float("inf")


def test_nothing_released_costs_nothing() -> None:
    assert as_dp_event([]) == dp_accounting.ComposedDpEvent([])


def test_what_dp_accounting_lacks_is_refused() -> None:
    with pytest.raises(UnsupportedEventError, match=r"as_dp_event\.event=BallsInBins"):
        as_dp_event(SelfComposed(BallsInBins(5, Gaussian(1.0)), 3))


@pytest.mark.parametrize(
    "event",
    [
        Laplace(1.0, "l2"),
        Laplace(1.0, "l2", 1),
        ScaleMixtureLaplace(3.0, 0.3, 0.0, 0.0, 0.0),
        PoissonSampled(0.1, ScaleMixtureLaplace(3.0, 0.3, 0.0, 0.0, 0.0, "shared")),
    ],
    ids=str,
)
def test_noise_that_dp_accounting_lacks_is_refused(event: PrivacyEvent) -> None:
    with pytest.raises(UnsupportedEventError, match="has an event for"):
        as_dp_event(event)
