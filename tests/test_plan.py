"""What a plan does and what is accounted for come from the same object."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from torch import Tensor

from hf_dp.accounting import flatten
from hf_dp.clipping import ClippingPolicy, FlatClipping, LossRelease
from hf_dp.errors import ConfigurationError
from hf_dp.events import (
    BallsInBins,
    Composed,
    Continued,
    Gaussian,
    NeighboringRelation,
    PoissonSampled,
    PrivacyEvent,
    SelfComposed,
    Shuffled,
    from_json,
)
from hf_dp.noise import GaussianNoise, LaplaceNoise, NoiseMechanism, ScaleMixtureNoise
from hf_dp.plan import PrivacyPlan
from hf_dp.sampling import BallsInBinsSampling, PoissonSampling, ShuffledSampling
from hf_dp.scale_law import ScaleLaw


@dataclasses.dataclass(frozen=True)
class SumsOfParts(ClippingPolicy):
    """A policy in another norm that releases something itself."""

    bound: float = 2.0
    norm: ClassVar[Any] = "l1"

    @property
    def sensitivity(self) -> float:
        return self.bound

    def weights(self, power_sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return power_sums

    def scaled(self, factor: float) -> SumsOfParts:
        return SumsOfParts(self.bound * factor)

    def event(self) -> PrivacyEvent:
        return Gaussian(9.0)


class OtherNoise(NoiseMechanism):
    norm: ClassVar[Any] = "l1"

    def event(self) -> PrivacyEvent:
        return Gaussian(5.0)

    def release(self, *_: Any, **__: Any) -> Any: ...


def plan(**changes: Any) -> PrivacyPlan:
    parts: dict[str, Any] = {
        "sampler": PoissonSampling(0.01),
        "clipping": FlatClipping(0.5),
        "noise": GaussianNoise(1.1),
        "num_steps": 100,
        "expected_batch_size": 64.0,
    }
    return PrivacyPlan(**{**parts, **changes})


def test_the_event_is_that_of_the_parts() -> None:
    assert plan().step_event == PoissonSampled(0.01, Gaussian(1.1))
    assert plan().event() == SelfComposed(PoissonSampled(0.01, Gaussian(1.1)), 100)
    assert plan().unit == "example"
    assert plan().relation is NeighboringRelation.REPLACE_SPECIAL


def test_a_change_of_any_part_is_a_change_of_the_event() -> None:
    changed = [
        plan(sampler=PoissonSampling(0.02)),
        plan(noise=GaussianNoise(1.2)),
        plan(num_steps=101),
    ]
    assert len({plan().event(), *(other.event() for other in changed)}) == 4


def test_what_the_clipping_releases_itself_is_accounted_for_too() -> None:
    mixed = plan(clipping=SumsOfParts(), noise=OtherNoise())
    assert mixed.step_event == Composed((Gaussian(9.0), PoissonSampled(0.01, Gaussian(5.0))))


def test_the_noise_can_be_chosen_and_nothing_else_changes() -> None:
    chosen = plan().with_noise_multiplier(3.0)
    assert chosen == plan(noise=GaussianNoise(3.0))


def test_other_noise_cannot_be_chosen_by_its_size() -> None:
    with pytest.raises(
        ConfigurationError, match=r"PrivacyPlan\.noise='OtherNoise'.*target_epsilon"
    ):
        plan(clipping=SumsOfParts(), noise=OtherNoise()).with_noise_multiplier(3.0)


def test_noise_for_another_norm_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"PrivacyPlan\.noise='OtherNoise'.*l2 norm"):
        plan(noise=OtherNoise())
    with pytest.raises(ConfigurationError, match=r"PrivacyPlan\.noise='GaussianNoise'.*l1 norm"):
        plan(clipping=SumsOfParts())


@pytest.mark.parametrize(
    "noise",
    [
        GaussianNoise(1.5, norm="l1"),
        LaplaceNoise(1.5),
        ScaleMixtureNoise(ScaleLaw(3.0, 0.5), "shared", dimension=9),
    ],
    ids=lambda noise: type(noise).__name__,
)
def test_noise_of_each_kind_can_be_chosen_by_its_size_and_described(noise: NoiseMechanism) -> None:
    sized = plan(clipping=SumsOfParts(), noise=noise)
    chosen = sized.with_noise_multiplier(2.5)
    assert chosen.noise.noise_multiplier == pytest.approx(2.5, rel=1e-12)
    assert type(chosen.noise) is type(noise)
    assert chosen.with_noise_multiplier(noise.noise_multiplier).describe()["noise"].keys() == (
        sized.describe()["noise"].keys()
    )
    described = json.loads(json.dumps(sized.describe()))
    assert described == sized.describe()
    assert from_json(described["step_event"]) == sized.step_event
    assert described != chosen.describe()


@pytest.mark.parametrize("clipping", [FlatClipping(0.5), SumsOfParts()])
def test_a_loss_may_share_the_sensitivity_in_either_norm(clipping: ClippingPolicy) -> None:
    noise = GaussianNoise(1.1) if clipping.norm == "l2" else OtherNoise()
    made = plan(clipping=clipping, noise=noise, loss_release=LossRelease())
    assert made.loss_release == LossRelease()


@pytest.mark.parametrize("value", [0, -5, 1.5, None])
def test_the_number_of_steps_is_fixed_in_advance(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"PrivacyPlan\.num_steps=.*whole number > 0"):
        plan(num_steps=value)


@pytest.mark.parametrize("value", [0, -5.0, math.inf, math.nan, None])
def test_the_divisor_is_a_positive_constant(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"PrivacyPlan\.expected_batch_size=.*> 0"):
        plan(expected_batch_size=value)


def test_a_plan_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().num_steps = 5  # type: ignore[misc]


def test_the_description_is_plain_json_that_tells_plans_apart() -> None:
    described = plan(loss_release=LossRelease()).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["sampler"] == {
        "type": "hf_dp.sampling.poisson.PoissonSampling",
        "sampling_probability": 0.01,
    }
    assert described["clipping"] == {
        "type": "hf_dp.clipping.flat.FlatClipping",
        "clipping_norm": 0.5,
        "norm": "l2",
    }
    assert described["noise"]["noise_multiplier"] == 1.1
    assert described["loss_release"]["share"] == 0.1
    assert (described["num_steps"], described["expected_batch_size"]) == (100, 64.0)
    assert (described["unit"], described["relation"]) == ("example", "replace_special")
    assert described["sensitivity"] == 0.5
    assert from_json(described["step_event"]) == plan().step_event
    for change in (
        {"sampler": PoissonSampling(0.02)},
        {"clipping": FlatClipping(0.6)},
        {"noise": GaussianNoise(1.2)},
        {"num_steps": 101},
        {"expected_batch_size": 65.0},
        {"loss_release": None},
    ):
        assert plan(**{"loss_release": LossRelease(), **change}).describe() != described


def test_parts_that_are_no_dataclasses_are_described_by_name() -> None:
    described = plan(clipping=SumsOfParts(), noise=OtherNoise()).describe()
    assert described["noise"].endswith(".OtherNoise")
    json.dumps(described)


@pytest.mark.parametrize(
    ("num_steps", "passes"), [(1, 1), (4, 1), (5, 2), (8, 2), (100, 25), (101, 26)]
)
def test_a_pass_that_is_not_finished_counts_whole(num_steps: int, passes: int) -> None:
    several = plan(sampler=BallsInBinsSampling(4), num_steps=num_steps)
    assert (several.pass_length, several.num_passes) == (4, passes)
    assert several.event() == SelfComposed(BallsInBins(4, Gaussian(1.1)), passes)


def test_a_pass_is_written_down_at_its_first_step() -> None:
    several = plan(sampler=ShuffledSampling(4))
    assert several.step_event == several.pass_event == Shuffled(4, Gaussian(1.1))
    assert several.later_event == Continued(Shuffled(4, Gaussian(1.1)))
    each_step = [several.step_event, *[several.later_event] * 3] * 25
    assert flatten(each_step) == flatten(several.event()) == {Shuffled(4, Gaussian(1.1)): 25}


def test_a_step_that_is_a_pass_is_written_down_as_itself() -> None:
    for sampler in (PoissonSampling(0.1), ShuffledSampling(1)):
        single = plan(sampler=sampler)
        assert single.step_event == single.later_event == single.pass_event
        assert single.num_passes == single.num_steps


def test_what_the_clipping_releases_is_counted_in_every_step_of_a_pass() -> None:
    mixed = plan(
        sampler=ShuffledSampling(4), clipping=SumsOfParts(), noise=OtherNoise(), num_steps=8
    )
    assert mixed.step_event == Composed((Gaussian(9.0), Shuffled(4, Gaussian(5.0))))
    each_step = [mixed.step_event, *[mixed.later_event] * 3] * 2
    whole = {Gaussian(9.0): 8, Shuffled(4, Gaussian(5.0)): 2}
    assert flatten(each_step) == flatten(mixed.event()) == whole
