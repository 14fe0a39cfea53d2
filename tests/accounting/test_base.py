"""Composition, refusal and validation, which all accountants share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from hf_dp.accounting import (
    ACCOUNTANTS,
    EdgeworthAccountant,
    Guarantee,
    PLDAccountant,
    RDPAccountant,
    accountant_named,
    base,
    check_delta,
    default_delta,
    flatten,
)
from hf_dp.cli.run import PoissonRun
from hf_dp.errors import ConfigurationError, PrivacyError, UnsupportedEventError
from hf_dp.events import (
    Composed,
    Gaussian,
    NeighboringRelation,
    NonPrivate,
    PoissonSampled,
    PrivacyEvent,
    SelfComposed,
)

STEP = PoissonSampled(0.01, Gaussian(1.0))
OTHER = PoissonSampled(0.02, Gaussian(2.0))
EACH = pytest.mark.parametrize(
    "accountant",
    [PLDAccountant(), EdgeworthAccountant(), RDPAccountant()],
    ids=lambda a: a.name,
)


@dataclass(frozen=True)
class Laplace(PrivacyEvent):
    scale: float


def test_flatten_multiplies_nested_counts_and_merges_equal_releases() -> None:
    inner = Composed((STEP, SelfComposed(STEP, 4), OTHER))
    event = Composed((SelfComposed(SelfComposed(inner, 3), 5), Gaussian(2.0), STEP))
    assert flatten(event) == {STEP: 5 * 15 + 1, OTHER: 15, Gaussian(2.0): 1}


def test_flatten_takes_several_events_as_one_after_another() -> None:
    assert flatten([SelfComposed(STEP, 2), STEP]) == {STEP: 3}
    assert flatten(event for event in ()) == {}


def test_flatten_does_not_depend_on_depth() -> None:
    event: PrivacyEvent = STEP
    for _ in range(3000):
        event = Composed((event,))
    assert flatten(event) == {STEP: 1}


def test_sampling_with_probability_one_is_no_sampling() -> None:
    assert flatten(PoissonSampled(1.0, SelfComposed(Gaussian(2.0), 3))) == {Gaussian(2.0): 3}


@EACH
def test_composition_is_the_same_however_it_is_written(accountant: base.Accountant) -> None:
    once = accountant.guarantee(SelfComposed(STEP, 120), delta=1e-5).epsilon
    nested = Composed((SelfComposed(Composed((STEP, STEP)), 10), SelfComposed(STEP, 100)))
    assert accountant.guarantee(nested, delta=1e-5).epsilon == once
    assert accountant.guarantee([STEP] * 120, delta=1e-5).epsilon == once


@EACH
@pytest.mark.parametrize("fault", ["outer count", "inner count", "merging", "all but the first"])
def test_a_forgotten_count_would_be_noticed(
    accountant: base.Accountant, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = Composed((SelfComposed(Composed((SelfComposed(STEP, 20), STEP)), 50), STEP))
    right = accountant.guarantee(event, delta=1e-5).epsilon
    wrong = {"outer count": 22, "inner count": 101, "merging": 50, "all but the first": 1}[fault]
    monkeypatch.setattr(base, "flatten", lambda _: {STEP: wrong})
    assert accountant.guarantee(event, delta=1e-5).epsilon < 0.6 * right


@EACH
def test_nothing_released_costs_nothing(accountant: base.Accountant) -> None:
    assert accountant.guarantee(Composed(()), delta=1e-5).epsilon == 0.0
    assert accountant.curve(Composed(()), num_steps=3, delta=1e-5).epsilon(7) == 0.0


@EACH
def test_one_release_without_privacy_makes_epsilon_infinite(accountant: base.Accountant) -> None:
    found = accountant.guarantee([STEP, NonPrivate("exact loss logged")], delta=1e-5)
    assert found.epsilon == math.inf
    assert found.is_upper_bound
    curve = accountant.curve(NonPrivate("no noise"), num_steps=3, delta=1e-5)
    assert [curve.epsilon(k) for k in (0, 1, 3, 10)] == [0.0, math.inf, math.inf, math.inf]


@EACH
def test_the_guarantee_says_what_it_is_about(accountant: base.Accountant) -> None:
    relation = NeighboringRelation.REPLACE_SPECIAL
    found = accountant.guarantee(STEP, delta=1e-5, unit="user", relation=relation)
    assert (found.unit, found.relation, found.delta) == ("user", relation, 1e-5)
    assert (found.accountant, found.is_upper_bound) == (accountant.name, True)


@EACH
def test_zero_out_and_add_or_remove_have_the_same_epsilon(accountant: base.Accountant) -> None:
    event = SelfComposed(STEP, 100)
    zero_out = accountant.guarantee(event, delta=1e-5, relation=NeighboringRelation.REPLACE_SPECIAL)
    assert zero_out.epsilon == accountant.guarantee(event, delta=1e-5).epsilon


@EACH
@pytest.mark.parametrize(
    "event",
    [
        Laplace(1.0),
        PoissonSampled(0.1, Laplace(1.0)),
        PoissonSampled(0.1, PoissonSampled(0.1, Gaussian(1.0))),
        PoissonSampled(0.1, SelfComposed(Gaussian(1.0), 2)),
        PoissonSampled(0.1, NonPrivate("sampled, but exact")),
    ],
    ids=lambda event: type(getattr(event, "event", event)).__name__,
)
def test_events_without_a_proven_cost_are_refused(
    accountant: base.Accountant, event: PrivacyEvent
) -> None:
    whole = Composed((STEP, SelfComposed(event, 3), NonPrivate("does not hide the refusal")))
    assert not accountant.can_cost(whole)
    with pytest.raises(UnsupportedEventError) as caught:
        accountant.guarantee(whole, delta=1e-5)
    assert repr(event) in str(caught.value)
    assert "No accountant of hf_dp can cost it" in str(caught.value)
    with pytest.raises(UnsupportedEventError):
        accountant.curve(whole, num_steps=3, delta=1e-5)


def test_a_refusal_names_the_accountants_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PLDAccountant, "supports", lambda self, leaf: False)
    with pytest.raises(
        UnsupportedEventError, match=r"Accountants that can cost it: edgeworth, rdp\."
    ):
        PLDAccountant().guarantee(STEP, delta=1e-5)


@EACH
def test_replacing_one_is_refused(accountant: base.Accountant) -> None:
    # The sensitivity is then twice the clipping norm, and dp-accounting's RDP does not double it.
    relation = NeighboringRelation.REPLACE_ONE
    with pytest.raises(UnsupportedEventError, match=r"relation='replace_one'.*sampler"):
        accountant.guarantee(STEP, delta=1e-5, relation=relation)
    with pytest.raises(UnsupportedEventError, match="replace_one"):
        accountant.curve(STEP, num_steps=3, delta=1e-5, relation=relation)
    assert not accountant.can_cost(STEP, relation)


@EACH
def test_an_unknown_relation_is_refused(accountant: base.Accountant) -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'replace_one'"):
        accountant.guarantee(STEP, delta=1e-5, relation="replace-one")  # type: ignore[arg-type]


@EACH
@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan, math.inf, True, "1e-5", None])
def test_delta_outside_the_unit_interval_is_refused(
    accountant: base.Accountant, delta: float
) -> None:
    with pytest.raises(ConfigurationError, match=r"Accountant\.delta"):
        accountant.guarantee(STEP, delta=delta)
    with pytest.raises(ConfigurationError, match=r"Accountant\.delta"):
        accountant.curve(STEP, num_steps=3, delta=delta)


@EACH
@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True])
def test_a_curve_needs_steps(accountant: base.Accountant, num_steps: int) -> None:
    with pytest.raises(ConfigurationError, match=r"Accountant\.num_steps"):
        accountant.curve(STEP, num_steps=num_steps, delta=1e-5)


@EACH
def test_nan_never_leaves(accountant: base.Accountant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(accountant), "_epsilon", lambda self, leaves, delta: math.nan)
    with pytest.raises(PrivacyError, match=r"Guarantee\.epsilon=nan"):
        accountant.guarantee(STEP, delta=1e-5)
    monkeypatch.setattr(type(accountant), "_certificate", lambda self, leaves, delta: math.nan)
    monkeypatch.setattr(type(accountant), "_quick_epsilon", lambda *args: 1.0)
    with pytest.raises(PrivacyError, match=r"Guarantee\.epsilon=nan"):
        accountant.calibrate(PoissonRun(0.01, 10), target_epsilon=1.0, target_delta=1e-5)


@pytest.mark.parametrize("value", [math.nan, -1e-9])
@pytest.mark.parametrize("field", ["epsilon", "lower", "estimate"])
def test_a_guarantee_is_made_of_numbers(field: str, value: float) -> None:
    with pytest.raises(PrivacyError, match=rf"Guarantee\.{field}="):
        Guarantee(**{"epsilon": 1.0, field: value}, delta=1e-5, is_upper_bound=True, accountant="x")


def test_parameters_are_only_read_from_gaussians() -> None:
    assert base.gaussian_parameters(STEP) == (0.01, 1.0)
    assert base.gaussian_parameters(Gaussian(2.0)) == (1.0, 2.0)
    for event in (Laplace(1.0), PoissonSampled(0.1, Laplace(1.0))):
        with pytest.raises(TypeError, match="not Gaussian"):
            base.gaussian_parameters(event)


def test_accountants_are_found_by_name() -> None:
    for name in ACCOUNTANTS:
        assert accountant_named(name).name == name
    with pytest.raises(ConfigurationError, match="Did you mean 'pld'"):
        accountant_named("pdl")


def test_default_delta_is_allowed_for_any_population() -> None:
    assert default_delta(1000) == pytest.approx(1000**-1.1)
    for num_units in (2, 10, 10**6, 10**9):
        assert check_delta(default_delta(num_units), num_units) < 1 / num_units


@pytest.mark.parametrize("num_units", [0, -5, 1, 2.5, True])
def test_default_delta_needs_a_population(num_units: int) -> None:
    with pytest.raises(ConfigurationError, match=r"default_delta\.num_units"):
        default_delta(num_units)


@pytest.mark.parametrize("delta", [0.0, 1e-3, 2e-3, 1.0, math.nan, -1.0])
def test_delta_of_one_over_n_or_more_is_refused(delta: float) -> None:
    with pytest.raises(ConfigurationError, match="target_delta"):
        check_delta(delta, 1000)


def test_check_delta_needs_a_population() -> None:
    with pytest.raises(ConfigurationError, match=r"check_delta\.num_units"):
        check_delta(1e-5, 0)
