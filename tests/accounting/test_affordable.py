"""Steps and batches that a target affords: certified, and hardly fewer than there could be."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from hf_dp.accounting import (
    Accountant,
    EdgeworthAccountant,
    GDPAccountant,
    PLDAccountant,
    RDPAccountant,
)
from hf_dp.accounting.affordable import MOST_STEPS, largest_batch, most_steps
from hf_dp.cli.run import PoissonRun
from hf_dp.errors import ConfigurationError, UnsupportedEventError
from hf_dp.events import Gaussian, NeighboringRelation, PoissonSampled, PrivacyEvent

EACH = pytest.mark.parametrize(
    "accountant",
    [PLDAccountant(), EdgeworthAccountant(), RDPAccountant()],
    ids=lambda a: a.name,
)
TARGET = {"target_epsilon": 3.0, "target_delta": 1e-5}


def epsilon(accountant: Accountant, run: PoissonRun) -> float:
    return accountant.guarantee(run.event(), delta=1e-5).epsilon


@EACH
@pytest.mark.parametrize(("probability", "noise"), [(0.01, 1.0), (0.2, 3.0), (1.0, 30.0)])
def test_the_steps_are_within_the_target_and_a_few_more_are_not(
    accountant: Accountant, probability: float, noise: float
) -> None:
    steps = most_steps(accountant, PoissonSampled(probability, Gaussian(noise)), **TARGET)
    assert epsilon(accountant, PoissonRun(probability, steps, noise)) <= 3.0
    more = steps + max(1, math.ceil(steps * 2e-3))
    assert epsilon(accountant, PoissonRun(probability, more, noise)) > 3.0


@EACH
def test_the_batch_is_within_the_target_and_a_larger_one_is_not(accountant: Accountant) -> None:
    def run(batch: float) -> PrivacyEvent:
        return PoissonRun(batch / 50_000, 1000, 1.0).event()

    batch = largest_batch(accountant, run, num_examples=50_000, **TARGET)
    assert epsilon(accountant, PoissonRun(batch / 50_000, 1000, 1.0)) <= 3.0
    assert epsilon(accountant, PoissonRun(batch * 1.002 / 50_000, 1000, 1.0)) > 3.0


def test_steps_may_depend_on_the_batch() -> None:
    def run(batch: float) -> PrivacyEvent:
        return PoissonRun(batch / 10_000, math.ceil(30_000 / batch), 1.0).event()

    batch = largest_batch(PLDAccountant(), run, num_examples=10_000, **TARGET)
    assert PLDAccountant().guarantee(run(batch), delta=1e-5).epsilon <= 3.0


def test_everything_is_affordable_with_much_noise() -> None:
    assert most_steps(RDPAccountant(), PoissonSampled(1e-4, Gaussian(1e5)), **TARGET) == MOST_STEPS
    found = largest_batch(
        PLDAccountant(),
        lambda batch: PoissonRun(batch / 1000, 10, 100.0).event(),
        num_examples=1000,
        **TARGET,
    )
    assert found == 1000


def test_where_nothing_is_affordable_it_is_said() -> None:
    with pytest.raises(ConfigurationError, match=r"target_epsilon=3\.0: .*one step.*more noise"):
        most_steps(PLDAccountant(), Gaussian(0.5), **TARGET)
    with pytest.raises(ConfigurationError, match=r"target_epsilon=3\.0: .*any batch"):
        largest_batch(PLDAccountant(), lambda batch: Gaussian(0.5), num_examples=1000, **TARGET)


def test_bad_input_is_refused() -> None:
    step = PoissonSampled(0.01, Gaussian(1.0))
    with pytest.raises(ConfigurationError, match="target_epsilon=0"):
        most_steps(PLDAccountant(), step, target_epsilon=0, target_delta=1e-5)
    with pytest.raises(ConfigurationError, match="name='gdp'"):
        most_steps(GDPAccountant(), step, **TARGET)
    with pytest.raises(ConfigurationError, match="name='gdp'"):
        largest_batch(GDPAccountant(), lambda batch: step, num_examples=10, **TARGET)
    with pytest.raises(ConfigurationError, match="num_examples=0"):
        largest_batch(PLDAccountant(), lambda batch: step, num_examples=0, **TARGET)
    with pytest.raises(UnsupportedEventError):
        most_steps(PLDAccountant(), step, **TARGET, relation=NeighboringRelation.REPLACE_ONE)


def test_only_the_certificate_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    step = PoissonSampled(0.01, Gaussian(1.0))
    right = most_steps(PLDAccountant(), step, **TARGET)
    original: Callable[..., float] = PLDAccountant._quick_epsilon
    for factor in (0.1, 10.0):
        monkeypatch.setattr(
            PLDAccountant, "_quick_epsilon", lambda *args, f=factor: f * original(*args)
        )
        assert most_steps(PLDAccountant(), step, **TARGET) == pytest.approx(right, rel=2e-3)
