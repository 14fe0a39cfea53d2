"""Optimizers, schedules, precision and the size of steps: what decides how a private model moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    NUM_EXAMPLES,
    Sentences,
    collate,
    fixed,
    host_arguments,
    learns,
    tiny_bert,
    train_lines,
    trainer_for,
    weights,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from hf_dp.ledger import LEDGER_NAME, read_ledger

HELD_OUT = Sentences(size=12, seed=1)
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler_type": "linear", "warmup_steps": 2},
        {"lr_scheduler_type": "cosine", "warmup_steps": 0.5},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 1},
        {"max_steps": -1, "num_train_epochs": 2, "lr_scheduler_type": "linear"},
    ],
    ids=lambda options: options["lr_scheduler_type"],
)
def test_learning_rates_are_the_trainers(tmp_path: Path, options: dict[str, Any]) -> None:
    private = trainer_for(tmp_path / "private", host=options)
    plain = Trainer(
        tiny_bert(),
        host_arguments(tmp_path / "plain", **options),
        train_dataset=Sentences(),
        data_collator=collate,
    )
    rates = []
    for trainer in (private, plain):
        trainer.train()
        history = trainer.state.log_history
        rates.append([line["learning_rate"] for line in history if "learning_rate" in line])
    assert len(rates[0]) == private.plan.num_steps
    assert rates[0] == rates[1]


def test_reduce_on_plateau_follows_the_evaluation(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path,
        host={
            **EVALUATING,
            "eval_steps": 1,
            "metric_for_best_model": "never",
            "greater_is_better": True,
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
        },
        eval_dataset=HELD_OUT,
        compute_metrics=lambda _: {"never": 0.0},
    )
    trainer.train()
    assert train_lines(trainer)[-1]["learning_rate"] <= 0.1 * 0.5**3


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adafactor", "rmsprop"])
def test_optimizers_by_name(tmp_path: Path, name: str) -> None:
    learns(trainer_for(tmp_path, host={"optim": name, "learning_rate": 0.01}))


def test_the_users_own_optimizer_and_scheduler(tmp_path: Path) -> None:
    model = tiny_bert()
    optimizer = torch.optim.Adamax(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = trainer_for(tmp_path, model=model, optimizers=(optimizer, scheduler))
    learns(trainer)
    assert trainer.optimizer.optimizer is optimizer
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.5**6)


def test_an_optimizer_class_with_its_arguments(tmp_path: Path) -> None:
    chosen = (torch.optim.NAdam, {"lr": 0.01})
    trainer = trainer_for(tmp_path, optimizer_cls_and_kwargs=chosen)
    learns(trainer)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.NAdam)


def test_label_smoothing_is_the_losss_own(tmp_path: Path) -> None:
    def smoothed(model: Any, inputs: Any) -> Tensor:
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits
        return F.cross_entropy(logits, inputs["labels"], reduction="none", label_smoothing=0.2)

    asked = trainer_for(tmp_path / "a", host={"label_smoothing_factor": 0.2}, coins=fixed())
    spelled = trainer_for(tmp_path / "b", example_loss=smoothed, coins=fixed())
    plain = trainer_for(tmp_path / "c", coins=fixed())
    for trainer in (asked, spelled, plain):
        trainer.train()
    torch.testing.assert_close(weights(asked.model), weights(spelled.model))
    assert (weights(asked.model) - weights(plain.model)).abs().max() > 1e-4


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    results = []
    for asked in (False, True):
        name = "activation_checkpointing"
        if name not in {f for f in host_arguments(tmp_path).__dataclass_fields__}:
            name = "gradient_checkpointing"
        trainer = trainer_for(tmp_path / str(asked), host={name: asked}, coins=fixed())
        trainer.train()
        assert trainer.model.bert.encoder.layer[0].gradient_checkpointing is asked
        results.append(weights(trainer.model))
    torch.testing.assert_close(*results)


def test_bf16_trains_near_float32(tmp_path: Path) -> None:
    results = []
    for asked in (False, True):
        trainer = trainer_for(tmp_path / str(asked), host={"bf16": asked}, coins=fixed())
        learns(trainer)
        assert all(p.dtype is torch.float32 for p in trainer.model.parameters())
        results.append(weights(trainer.model))
    gap = (results[0] - results[1]).norm() / (results[0] - weights(tiny_bert())).norm()
    assert 0 < gap < 0.02


@pytest.mark.parametrize(
    ("host", "dp", "steps", "batch"),
    [
        ({"max_steps": 7}, {}, 7, 8),
        ({"max_steps": -1, "num_train_epochs": 1.5}, {}, 8, 8),
        ({"max_steps": -1, "num_train_epochs": 2}, {"expected_batch_size": 15}, 6, 15),
        ({"max_steps": 3}, {"expected_batch_size": 40}, 3, 40),
        ({"per_device_train_batch_size": 5, "gradient_accumulation_steps": 1}, {}, 6, 5),
    ],
)
def test_steps_and_batch_size_are_fixed_in_advance(
    tmp_path: Path, host: dict[str, Any], dp: dict[str, Any], steps: int, batch: float
) -> None:
    trainer = trainer_for(tmp_path, host=host, dp=dp)
    assert trainer.plan.num_steps == steps
    assert trainer.plan.expected_batch_size == batch
    assert trainer.plan.sampler.sampling_probability == batch / NUM_EXAMPLES
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == steps
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == steps
