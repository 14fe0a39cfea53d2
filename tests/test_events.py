"""Events are plain frozen data that survive a trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from hf_dp.errors import ConfigurationError
from hf_dp.events import (
    EVENT_TYPES,
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
    from_json,
    to_json,
)
from hf_dp.scale_law import ScaleLaw

NESTED = Composed(
    (
        SelfComposed(PoissonSampled(0.01, Gaussian(1.1)), 1000),
        Composed((Gaussian(2), Composed(()))),
        NonPrivate("fixed generator"),
    )
)
ALL = [
    Gaussian(0.5),
    Laplace(0.5),
    Laplace(0.5, "l2", 12),
    ScaleMixtureLaplace(3.0, 0.1, 0.2, 0.3, 0.4),
    ScaleMixtureLaplace(1, 0.1, 0, 0, 0, "shared", "l2", 12),
    PoissonSampled(1.0, Gaussian(1)),
    PoissonSampledContributions(0.1, 3, Gaussian(1)),
    TruncatedPoissonSampled(100, 0.1, 20, Gaussian(1)),
    SampledWithoutReplacement(100, 10, Gaussian(1)),
    Shuffled(10, Gaussian(1)),
    BallsInBins(10, Gaussian(1)),
    Continued(Shuffled(2, Gaussian(1))),
    SelfComposed(Gaussian(1), 3),
    NESTED,
]


@pytest.mark.parametrize("event", ALL, ids=lambda event: type(event).__name__)
def test_json_gives_the_same_event_back(event: PrivacyEvent) -> None:
    written = json.dumps(to_json(event))
    assert from_json(json.loads(written)) == event


def test_every_type_is_in_the_table_and_survives_json() -> None:
    kinds = {cls for cls in PrivacyEvent.__subclasses__() if "hf_dp.events." in cls.__module__}
    assert set(EVENT_TYPES.values()) == kinds
    seen = {type(event) for event in (*ALL, *NESTED.events)}
    assert seen == kinds


def test_the_json_form_is_stable() -> None:
    """Ledgers on disk hold it: changing it makes them unreadable."""
    event = SelfComposed(PoissonSampled(0.01, Gaussian(1.1)), 7)
    assert json.dumps(to_json(event)) == (
        '{"type": "SelfComposed", "event": {"type": "PoissonSampled", "sampling_probability": 0.01, '
        '"event": {"type": "Gaussian", "noise_multiplier": 1.1}}, "count": 7}'
    )


def test_events_are_frozen_equal_by_value_and_hashable() -> None:
    event = PoissonSampled(0.1, Gaussian(1.0))
    assert event == PoissonSampled(0.1, Gaussian(1.0))
    assert len({event, PoissonSampled(0.1, Gaussian(1.0)), NESTED}) == 2
    for kind in EVENT_TYPES.values():
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.sampling_probability = 0.2  # type: ignore[misc]


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, "1", None])
def test_noise_must_be_positive(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Gaussian\.noise_multiplier=.*> 0"):
        Gaussian(value)


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, "1", None])
def test_laplace_noise_must_be_positive(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Laplace\.noise_multiplier=.*> 0"):
        Laplace(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "l3"}, r"\.norm='l3'.*norm of the sum's sensitivity"),
        ({"norm": None}, r"\.norm=None"),
        ({"dimension": 0}, r"\.dimension=0.*whole number > 0.*Use None"),
        ({"dimension": 2.5}, r"\.dimension=2\.5"),
        ({"dimension": True}, r"\.dimension=True"),
    ],
)
def test_the_norm_and_the_dimension_of_laplace_noise_are_checked(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match="^Laplace" + message):
        Laplace(1.0, **changes)
    with pytest.raises(ConfigurationError, match="^ScaleMixtureLaplace" + message):
        ScaleMixtureLaplace(1, 0.1, 0, 0, 0, **changes)


def test_a_mixture_has_a_law_and_a_way_of_drawing() -> None:
    event = ScaleMixtureLaplace(3, 1 / 3, 0, 0, 0)
    assert event.law == ScaleLaw(3, 1 / 3)
    assert event.noise_multiplier == pytest.approx(3.0, rel=1e-12)
    with pytest.raises(ConfigurationError, match=r"ScaleMixtureLaplace\.draw='both'.*\['iid', 'sh"):
        ScaleMixtureLaplace(3, 1 / 3, 0, 0, 0, draw="both")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"ScaleLaw\.exponential_mean=-1"):
        from_json({**to_json(event), "exponential_mean": -1})


@pytest.mark.parametrize("value", [0, 1.5, -0.1, math.nan, None])
def test_a_sampling_probability_is_a_probability(value: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"PoissonSampled\.sampling_probability=.*\(0, 1\]"
    ):
        PoissonSampled(value, Gaussian(1))


@pytest.mark.parametrize("value", [0, 1.5, math.nan])
def test_an_examples_sampling_probability_is_a_probability(value: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"Contributions\.sampling_probability=.*example is"
    ):
        PoissonSampledContributions(value, 3, Gaussian(1))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_contributions_are_counted_in_whole_numbers(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"max_contributions=.*whole number > 0"):
        PoissonSampledContributions(0.1, value, Gaussian(1))


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_releases_are_counted_in_whole_numbers(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"SelfComposed\.count=.*whole number > 0"):
        SelfComposed(Gaussian(1), value)


@pytest.mark.parametrize("data", [{"type": "Cauchy", "scale": 1}, {"noise_multiplier": 1}, {}])
def test_an_unknown_type_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"PrivacyEvent\.type=.*cannot be accounted for"):
        from_json(data)
    with pytest.raises(ConfigurationError, match=r"PrivacyEvent\.type="):
        from_json({"type": "Composed", "events": [data]})


@pytest.mark.parametrize(
    "data",
    [
        {"type": "Gaussian"},
        {"type": "Gaussian", "noise_multiplier": 1, "sensitivity": 2},
        {"type": "Gaussian", "sigma": 1},
        {"type": "SelfComposed", "event": {"type": "Gaussian", "noise_multiplier": 1}},
    ],
)
def test_an_unknown_or_missing_field_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"\.fields=.*may change the meaning"):
        from_json(data)


def test_a_field_with_a_default_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger written before a field was added stays readable."""

    @dataclasses.dataclass(frozen=True)
    class Later(PrivacyEvent):
        old: int
        new: int = 5

    monkeypatch.setattr("hf_dp.events.json_form.EVENT_TYPES", {"Later": Later})
    assert from_json({"type": "Later", "old": 1}) == Later(1, 5)
    assert from_json({"type": "Later", "old": 1, "new": 2}) == Later(1, 2)
    with pytest.raises(ConfigurationError, match=r"Later\.fields="):
        from_json({"type": "Later", "new": 2})


def test_values_are_checked_on_the_way_in() -> None:
    with pytest.raises(ConfigurationError, match=r"Gaussian\.noise_multiplier"):
        from_json({"type": "Gaussian", "noise_multiplier": -1})


def test_relations_have_the_names_of_dp_accounting() -> None:
    from dp_accounting.privacy_accountant import NeighboringRelation as Theirs

    for relation in NeighboringRelation:
        assert hasattr(Theirs, relation.name)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, None])
@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda n: Shuffled(n, Gaussian(1)), r"Shuffled\.num_batches"),
        (lambda n: BallsInBins(n, Gaussian(1)), r"BallsInBins\.num_batches"),
        (
            lambda n: SampledWithoutReplacement(n, 1, Gaussian(1)),
            r"SampledWithoutReplacement\.num_units",
        ),
        (
            lambda n: SampledWithoutReplacement(9, n, Gaussian(1)),
            r"SampledWithoutReplacement\.batch_size",
        ),
        (
            lambda n: TruncatedPoissonSampled(n, 0.1, 5, Gaussian(1)),
            r"TruncatedPoissonSampled\.num_units",
        ),
        (
            lambda n: TruncatedPoissonSampled(9, 0.1, n, Gaussian(1)),
            r"TruncatedPoissonSampled\.max_batch_size",
        ),
    ],
)
def test_units_and_batches_are_counted_in_whole_numbers(
    make: Callable[[Any], PrivacyEvent], field: str, value: Any
) -> None:
    with pytest.raises(ConfigurationError, match=rf"{field}=.*whole number > 0"):
        make(value)


def test_a_cut_sample_has_a_probability_too() -> None:
    with pytest.raises(ConfigurationError, match=r"TruncatedPoissonSampled\.sampling_probability"):
        TruncatedPoissonSampled(10, 1.5, 5, Gaussian(1))


def test_no_batch_without_replacement_is_larger_than_the_data() -> None:
    with pytest.raises(
        ConfigurationError, match=r"batch_size=11: expected at most num_units \(10\)"
    ):
        SampledWithoutReplacement(10, 11, Gaussian(1))


@pytest.mark.parametrize(
    "event", [Gaussian(1), PoissonSampled(0.1, Gaussian(1)), Shuffled(1, Gaussian(1)), None]
)
def test_only_a_pass_can_be_continued(event: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Continued\.event=.*a pass of several batches"):
        Continued(event)
