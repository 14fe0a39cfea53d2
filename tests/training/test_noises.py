"""DPTrainer with each kind of noise: what is added, what is written down, and what is claimed."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from noise_runs import L1, SAVING, claims_of_the_ledger, head_trainer
from tiny_runs import refused, trainer_for
from transformers import GPT2Config, GPT2LMHeadModel
from user_runs import NUM_USERS, Recorded
from user_runs import trainer as trainer_of_users

from hf_dp import DPArguments
from hf_dp.accounting import accountant_named
from hf_dp.errors import ConfigurationError, LedgerMismatchError
from hf_dp.events import (
    Gaussian,
    Laplace,
    PoissonSampled,
    from_json,
    to_json,
)
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.noise import GaussianNoise, LaplaceNoise
from hf_dp.reports.markdown import privacy_section
from hf_dp.sums import ClippedSum
from hf_dp.training.chosen_noise import num_noised


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_laplace_noise_is_added_written_down_and_claimed(
    norm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinates: list[int] = []
    sizes: list[float] = []
    release = LaplaceNoise.release

    def counted(self: LaplaceNoise, summed: ClippedSum, **rest: Any) -> Any:
        assert summed.loss_sum is not None
        coordinates.append(sum(g.numel() for g in summed.grads.values()) + 1)
        before = torch.cat([g.flatten().clone() for g in summed.grads.values()])
        released = release(self, summed, **rest)
        after = torch.cat([g.flatten() for g in released.grads.values()])
        sizes.append(float((after - before).abs().mean()))
        return released

    monkeypatch.setattr(LaplaceNoise, "release", counted)
    monkeypatch.setattr(GaussianNoise, "release", lambda *_, **__: 1 / 0)
    dp = {"noise": "laplace", "clipping_norm_type": norm, "clipping_norm": 0.5}
    trainer = trainer_for(tmp_path, dp=dp)
    trainer.train()
    assert set(coordinates) == {5875}  # of the model 5874, and the loss
    step = PoissonSampled(0.2, Laplace(1.0, norm, 5875))
    assert trainer.plan.step_event == step
    assert {run.event for run in read_ledger(tmp_path / LEDGER_NAME).releases} == {step}
    # of Laplace noise of standard deviation 0.5 the mean size is 0.5 / sqrt(2), not Gaussian's 0.4;
    # off by 4% once in 1e10 runs
    assert sum(sizes) / len(sizes) == pytest.approx(0.5 / 2**0.5, rel=0.04)
    claims_of_the_ledger(trainer, tmp_path)
    described = read_ledger(tmp_path / LEDGER_NAME).header["plan"]
    assert described["noise"] == {
        "type": "hf_dp.noise.laplace.LaplaceNoise",
        "noise_multiplier": 1.0,
        "norm": norm,
        "dimension": 5875,
    }
    assert described["clipping"]["norm"] == norm
    assert from_json(described["step_event"]) == step
    assert to_json(step) == described["step_event"]


def test_the_report_and_the_model_card_name_the_noise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_for(tmp_path, dp={"noise": "laplace", "clipping_norm": 0.5})
    with caplog.at_level(logging.WARNING):
        trainer.train()
    report = trainer.privacy_report()
    named = "LaplaceNoise(dimension=5875, noise_multiplier=1, norm=l2), standard deviation 0.5"
    dear = (
        "On 5,875 coordinates clipped in the l2 norm, Laplace noise needs at least about 1.41 times"
    )
    for text in (str(report), privacy_section(report)):
        assert named in text
        assert dear in text
    assert dear in caplog.text
    assert report.to_json()["noise"] == "LaplaceNoise"
    assert report.to_json()["noise_multiplier"] == 1.0
    assert report.to_json()["clipping_norm_type"] == "l2"


@pytest.mark.parametrize("dp", [{"noise": "laplace", **L1}, {"noise": "laplace"}, L1, {}])
def test_nothing_is_said_of_noise_that_costs_no_more(
    dp: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = head_trainer(tmp_path, dp, host={"max_steps": 1})
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "1.41" not in str(trainer.privacy_report()) + caplog.text


def test_laplace_noise_is_sized_for_a_target(tmp_path: Path) -> None:
    dp = {"noise": "laplace", "target_epsilon": 3.0, **L1}
    trainer = head_trainer(tmp_path, dp)
    assert isinstance(trainer.plan.noise, LaplaceNoise)
    trainer.train()
    assert 2.99 < trainer.epsilon <= 3.0
    claims_of_the_ledger(trainer, tmp_path)


def test_gaussian_noise_may_stand_beside_l1_clipping(tmp_path: Path) -> None:
    trainer = head_trainer(tmp_path, L1)
    assert trainer.plan.noise == GaussianNoise(1.0, norm="l1")
    assert trainer.plan.step_event == PoissonSampled(0.2, Gaussian(1.0))
    trainer.train()
    claims_of_the_ledger(trainer, tmp_path)


def test_users_are_clipped_in_the_l1_norm_and_drawn_under_laplace_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(monkeypatch)
    dp = {"noise": "laplace", "clipping_norm": 3.0, **L1, "private_loss": False}
    trainer = trainer_of_users(tmp_path, dp={**dp, "expected_batch_size": NUM_USERS})
    trainer.train()
    numbers = sum(p.numel() for p in trainer.model.parameters())
    [release] = read_ledger(tmp_path / LEDGER_NAME).releases
    assert release.event == PoissonSampled(1.0, Laplace(1.0, "l1", numbers))
    assert trainer.plan.unit == "user"
    first = recorded.norms[0]
    assert len(first) == NUM_USERS
    bound = float(first.clamp_max(3.0).sum())
    assert 0 < float(recorded.sums[0].abs().sum()) <= bound * (1 + 1e-6)
    assert float(first.max()) > 3.0


def test_users_whose_examples_are_drawn_need_gaussian_noise(tmp_path: Path) -> None:
    dp = {"noise": "laplace", "user_sampling": "examples", **L1}
    refused(
        tmp_path,
        r"DPArguments\.noise='laplace': expected 'gaussian' with user_sampling='examples'",
        lambda: trainer_of_users(tmp_path, dp=dp),
    )


# ---- how many coordinates --------------------------------------------------------------------------


def test_coordinates_are_those_that_train_each_once(tmp_path: Path) -> None:
    dp_args = DPArguments(noise="laplace", noise_multiplier=1.0)
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2))
    assert tied.lm_head.weight is tied.transformer.wte.weight
    distinct = {id(p): p.numel() for p in tied.parameters()}
    assert num_noised(tied, dp_args) == sum(distinct.values()) + 1
    tied.transformer.wte.requires_grad_(False)
    assert num_noised(tied, dp_args) == sum(distinct.values()) + 1 - 44
    assert num_noised(tied, dataclasses.replace(dp_args, private_loss=False)) == (
        sum(distinct.values()) - 44
    )
    assert num_noised(tied, DPArguments(noise_multiplier=1.0)) is None


def test_the_plan_follows_what_is_frozen_before_training(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, dp={"noise": "laplace"})
    assert trainer.plan.noise.dimension == 5875  # type: ignore[attr-defined]
    trainer.model.bert.requires_grad_(False)
    trainer.train()
    assert trainer.plan.step_event == PoissonSampled(0.2, Laplace(1.0, "l2", 35))
    assert {run.event for run in read_ledger(tmp_path / LEDGER_NAME).releases} == {
        trainer.plan.step_event
    }


def test_a_release_of_more_coordinates_than_planned_is_refused(tmp_path: Path) -> None:
    planned = head_trainer(tmp_path, {"noise": "laplace", **L1}).plan
    assert planned.noise == LaplaceNoise(1.0, norm="l1", dimension=35)
    trainer = trainer_for(tmp_path, plan=planned)  # all of the model trains
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(ConfigurationError, match=r"LaplaceNoise\.dimension=35: .* 5875 coord"):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))


# ---- runs that go on -------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_under_the_same_noise_alone(tmp_path: Path) -> None:
    dp = {"noise": "laplace", **L1}
    first = head_trainer(tmp_path, dp, host={**SAVING, "max_steps": 4})
    first.train()
    spent = first.epsilon
    others = [
        {"noise": "laplace"},
        L1,
        {**dp, "noise_multiplier": 2.0},
        {**dp, "private_loss": False},
    ]
    for other in others:
        with pytest.raises(LedgerMismatchError, match=r"plan\.(noise|clipping|loss_release)"):
            head_trainer(tmp_path, other, host=SAVING).train(resume_from_checkpoint=True)
    resumed = head_trainer(tmp_path, dp, host=SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.epsilon > spent
    claims_of_the_ledger(resumed, tmp_path)


# ---- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dp", "beside"),
    [
        ({"sampling": "fixed_size"}, "sampling='fixed_size'.*sampling='poisson'"),
        ({"sampling": "balls_in_bins"}, "sampling='balls_in_bins'.*sampling='poisson'"),
        ({"sampling": "truncated_poisson"}, "sampling='truncated_poisson'.*sampling='poisson'"),
        ({"accountant": "edgeworth"}, "accountant='edgeworth'.*accountant='pld'"),
    ],
)
@pytest.mark.parametrize("noise", ["laplace", "lmo"])
def test_noise_that_no_proof_covers_is_refused_at_construction(
    noise: str, dp: dict[str, Any], beside: str, tmp_path: Path
) -> None:
    size = {"target_epsilon": 3.0} if noise == "lmo" else {"noise_multiplier": 1.0}
    message = refused(
        tmp_path,
        rf"DPArguments\.noise='{noise}': expected 'gaussian' with {beside}",
        lambda: head_trainer(tmp_path, {"noise": noise, **size, **dp}),
    )
    assert "no proven bound" in message


def test_shuffled_passes_are_covered(tmp_path: Path) -> None:
    trainer = head_trainer(tmp_path, {"noise": "laplace", "sampling": "shuffled", **L1})
    assert accountant_named("pld").can_cost(trainer.plan.event(), trainer.plan.relation)


@pytest.mark.parametrize("noise", ["lmo", "auto"])
def test_a_search_needs_a_target(noise: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"DPArguments\.noise='{noise}'.*target_epsilon"):
        DPArguments(noise=noise, noise_multiplier=1.0)


@pytest.mark.parametrize(("field", "value"), [("noise", "cauchy"), ("clipping_norm_type", "l3")])
def test_unknown_kinds_are_refused(field: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"DPArguments\.{field}='{value}'"):
        DPArguments(noise_multiplier=1.0, **{field: value})
