"""The check of mechanisms passes what is right and says what is wrong."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from hf_dp.coins import Coins, FixedCoins
from hf_dp.errors import ConfigurationError
from hf_dp.events import Gaussian, Laplace, NonPrivate, PrivacyEvent
from hf_dp.noise import GaussianNoise, LaplaceNoise, NoiseMechanism, ScaleMixtureNoise
from hf_dp.scale_law import ScaleLaw
from hf_dp.sums import ClippedSum, NoisySum
from hf_dp.testing import DisagreementError, check_mechanism

PUBLISHED = ScaleLaw(1.0, 0.05, 0.5, 0.1, 0.2)
OTHER_READING = ScaleLaw(1.0, 0.05, 0.02, 0.1, 0.2)  # 5 as a rate rather than as a mean


@dataclasses.dataclass(frozen=True)
class Planted(NoiseMechanism):
    """Laplace noise of deviation 2, with one thing wrong."""

    fault: str = "none"
    accounted: PrivacyEvent = Laplace(2.0)  # noqa: RUF009  # frozen
    noise_multiplier: float = 2.0
    norm: Any = "l1"

    def event(self) -> PrivacyEvent:
        return self.accounted

    def release(self, summed: ClippedSum, *, sensitivity: float, coins: Coins) -> NoisySum:
        sums = {name: grad.clone() for name, grad in summed.grads.items()}
        loss = None if summed.loss_sum is None else summed.loss_sum.clone()
        size = 1.0 if self.fault == "sensitivity" else sensitivity
        if self.fault == "same":
            coins = FixedCoins(torch.Generator().manual_seed(1))
        released = LaplaceNoise(2.0).release(summed, sensitivity=size, coins=coins)
        return getattr(self, f"_{self.fault}", lambda *parts: parts[2])(sums, loss, released)

    def _vector(self, sums: Any, _: Any, released: NoisySum) -> NoisySum:
        return dataclasses.replace(released, grads={**released.grads, "vector": sums["vector"]})

    def _loss(self, _: Any, loss: Any, released: NoisySum) -> NoisySum:
        return dataclasses.replace(released, loss_sum=loss)

    def _small_loss(self, _: Any, loss: Any, released: NoisySum) -> NoisySum:
        return dataclasses.replace(released, loss_sum=loss + (released.loss_sum - loss) / 4)

    def _rows(self, _: Any, __: Any, released: NoisySum) -> NoisySum:
        matrix = released.grads["matrix"]
        matrix[:, 1::2] = matrix[:, ::2] * (1 + 1e-9)
        return released

    def _positive(self, _: Any, __: Any, released: NoisySum) -> NoisySum:
        released.grads["matrix"].abs_()
        return released

    def _forgotten(self, sums: Any, _: Any, released: NoisySum) -> NoisySum:
        released.grads["matrix"].sub_(sums["matrix"])
        return released


@pytest.mark.statistical
@pytest.mark.parametrize(
    "mechanism",
    [
        Planted(),
        GaussianNoise(0.7),
        GaussianNoise(0.7, norm="l1"),
        LaplaceNoise(1.3),
        LaplaceNoise(1.3, "l2", dimension=40),
        ScaleMixtureNoise(ScaleLaw(3.0, 1 / 3)),
        ScaleMixtureNoise(PUBLISHED, norm="l2"),
        ScaleMixtureNoise(OTHER_READING),
    ],
    ids=repr,
)
def test_mechanisms_that_are_right_pass(mechanism: NoiseMechanism) -> None:
    check_mechanism(mechanism)


@pytest.mark.statistical
@pytest.mark.parametrize(
    "mechanism",
    [
        LaplaceNoise(1.3, dimension=1),
        ScaleMixtureNoise(PUBLISHED, dimension=2),
        ScaleMixtureNoise(PUBLISHED, "shared"),
        ScaleMixtureNoise(PUBLISHED, "shared", dimension=1),
    ],
    ids=repr,
)
def test_narrow_releases_and_shared_draws_pass(mechanism: NoiseMechanism) -> None:
    check_mechanism(mechanism, count=15_000)


@pytest.mark.slow
@pytest.mark.statistical
def test_right_mechanisms_pass_many_times_at_a_level_that_is_kept() -> None:
    """At a false-alarm rate of 40 % no more than that of many checks fail."""
    failed, checks = 0, 40
    for _ in range(checks):
        try:
            check_mechanism(LaplaceNoise(1.3), count=2000, false_alarm=0.4)
        except DisagreementError:
            failed += 1
    assert failed <= stats.binom.isf(1e-6, checks, 0.4)
    assert failed >= 1  # by chance not one fails once in 10^6 times


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("mechanism", "message"),
    [
        (Planted(accounted=Laplace(2.0 * 1.05)), "law of the event"),
        (Planted(accounted=Laplace(2.0 / 1.05)), "law of the event"),
        (Planted(accounted=Laplace(2.0 * math.sqrt(2))), "law of the event"),
        (Planted(accounted=Laplace(2.0 / math.sqrt(2))), "law of the event"),
        (Planted(accounted=Gaussian(2.0)), "law of the event"),
        (Planted("sensitivity"), "law of the event"),
        (Planted("same"), "were drawn before"),
        (Planted("vector"), "were drawn before, or are no draws"),
        (Planted("loss"), "were drawn before, or are no draws"),
        (Planted("small_loss"), "the loss's has not the law"),
        (Planted("positive"), "half should be"),
        (Planted("rows"), "not independent"),
        (Planted("forgotten"), "the sum was not kept"),
    ],
    ids=repr,
)
def test_what_is_wrong_is_named(mechanism: NoiseMechanism, message: str) -> None:
    with pytest.raises(DisagreementError, match=message):
        check_mechanism(mechanism)


@pytest.mark.statistical
@pytest.mark.parametrize("draw", ["iid", pytest.param("shared", marks=pytest.mark.slow)])
def test_a_rate_that_is_read_as_a_mean_is_found(draw: Any) -> None:
    drawn = ScaleMixtureNoise(PUBLISHED, draw)

    class Mixed(Planted):
        def release(self, *args: Any, **kwargs: Any) -> NoisySum:
            return drawn.release(*args, **kwargs)

    accounted = ScaleMixtureNoise(OTHER_READING, draw).event()
    with pytest.raises(DisagreementError, match="law of the event"):
        check_mechanism(Mixed(accounted=accounted), count=20_000)
    check_mechanism(Mixed(accounted=drawn.event()), count=20_000)


@pytest.mark.statistical
def test_an_event_of_ones_own_needs_its_law() -> None:
    mechanism = Planted(accounted=NonPrivate("not known"))
    with pytest.raises(ConfigurationError, match=r"size_law='NonPrivate'.*Pass x -> P"):
        check_mechanism(mechanism)
    check_mechanism(mechanism, size_law=lambda x: -np.expm1(-x / math.sqrt(2)))
    with pytest.raises(DisagreementError, match="law of the event"):
        check_mechanism(mechanism, size_law=lambda x: -np.expm1(-x))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"count": 0}, "count=0"),
        ({"false_alarm": 0.0}, r"false_alarm=0\.0"),
        ({"sensitivity": -1.0}, r"sensitivity=-1\.0"),
    ],
)
def test_arguments_are_checked(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_mechanism(GaussianNoise(1.0), **argument)
