"""DPTrainer with noise that is searched for its run."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import pytest
from noise_runs import L1, SAVING, claims_of_the_ledger, head_trainer
from transformers import TrainerCallback

from hf_dp.errors import ConfigurationError
from hf_dp.events import (
    PoissonSampled,
    ScaleMixtureLaplace,
)
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.noise import GaussianNoise, LaplaceNoise, ScaleMixtureNoise, search_noise
from hf_dp.training import chosen_noise


class StopsAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.fixture
def quick_search(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = functools.partial(search_noise, budget=3, cached=False)
    monkeypatch.setattr(chosen_noise, "search_noise", quick)


@pytest.mark.usefixtures("quick_search")
def test_a_mixture_is_searched_for_and_trained_with_and_found_again(tmp_path: Path) -> None:
    dp = {"noise": "lmo", "target_epsilon": 3.0, **L1}
    begun = head_trainer(tmp_path, dp, host=SAVING)
    begun.add_callback(StopsAt(4))
    begun.train()
    trainer = head_trainer(tmp_path, dp, host=SAVING)
    noise = trainer.plan.noise
    assert isinstance(noise, ScaleMixtureNoise)
    assert (noise.norm, noise.dimension, noise.draw) == ("l1", 35, "iid")
    trainer.train(resume_from_checkpoint=True)
    assert begun.epsilon < trainer.epsilon <= 3.0
    claims_of_the_ledger(trainer, tmp_path)
    events = {run.event for run in read_ledger(tmp_path / LEDGER_NAME).releases}
    assert events == {PoissonSampled(0.2, noise.event())}
    assert isinstance(noise.event(), ScaleMixtureLaplace)
    report = trainer.privacy_report()
    assert "noise: ScaleMixtureNoise(" in str(report)
    assert report.to_json()["noise_multiplier"] == pytest.approx(noise.noise_multiplier)


@pytest.mark.usefixtures("quick_search")
@pytest.mark.parametrize(
    ("dp", "host", "winner"),
    [
        (L1, {"max_steps": 1}, LaplaceNoise),
        pytest.param({}, {"max_steps": 6}, GaussianNoise, marks=pytest.mark.slow),
        ({"sampling": "fixed_size"}, {"max_steps": 2}, GaussianNoise),
    ],
)
def test_auto_takes_the_least_noise_and_says_why(
    dp: dict[str, Any],
    host: dict[str, Any],
    winner: type,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = {"noise": "auto", "target_epsilon": 3.0, "target_delta": 1e-6, **dp}
    with caplog.at_level(logging.INFO, logger="hf_dp"):
        trainer = head_trainer(tmp_path, asked, host=host)
    assert type(trainer.plan.noise) is winner
    assert f"{winner.__name__.removesuffix('Noise')} noise has the least standard" in caplog.text
    least = [
        head_trainer(tmp_path, {**asked, "noise": one}, host=host).plan.noise.noise_multiplier
        for one in (["gaussian"] if "sampling" in dp else ["gaussian", "laplace"])
    ]
    assert trainer.plan.noise.noise_multiplier == pytest.approx(min(least), rel=0.02)
    trainer.train()
    assert trainer.epsilon <= 3.0


def test_a_search_that_finds_nothing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(**_: Any) -> Any:
        raise ConfigurationError("no shape will do")

    monkeypatch.setattr(chosen_noise, "search_noise", fails)
    with pytest.raises(ConfigurationError, match=r"DPArguments\.noise='lmo'.*no shape will do"):
        head_trainer(tmp_path, {"noise": "lmo", "target_epsilon": 3.0})
