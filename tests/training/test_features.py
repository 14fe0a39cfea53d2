"""Ordinary features of the Trainer, one by one, under DPTrainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import (
    NUM_EXAMPLES,
    Sentences,
    collate,
    host_arguments,
    learns,
    tiny_bert,
    train_lines,
    trainer_for,
    weights,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertForSequenceClassification,
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainerCallback,
)

from hf_dp import DPTrainer, DPTrainerMixin
from hf_dp.ledger import LEDGER_NAME, read_ledger

HELD_OUT = Sentences(size=12, seed=1)
SAVING = {"save_strategy": "steps", "save_steps": 2}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_evaluate_predict_and_compute_metrics(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, eval_dataset=HELD_OUT, compute_metrics=accuracy)
    trainer.train()
    evaluated = trainer.evaluate()
    predicted = trainer.predict(HELD_OUT)
    assert predicted.predictions.shape == (12, 2)
    assert evaluated["eval_accuracy"] == predicted.metrics["test_accuracy"]
    assert evaluated["eval_loss"] == pytest.approx(predicted.metrics["test_loss"])
    assert "epsilon" not in evaluated, (
        "evaluating is no release, and its line goes to the model card"
    )


def test_several_evaluation_sets(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, host=EVALUATING, eval_dataset={"a": HELD_OUT, "b": HELD_OUT})
    trainer.train()
    assert {"eval_a_loss", "eval_b_loss"} <= set(trainer.evaluate())


class Events(TrainerCallback):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            self.seen[name] = self.seen.get(name, 0) + 1
        return super().__getattribute__(name)


def test_callbacks_hear_of_everything_as_often_as_under_the_trainer(tmp_path: Path) -> None:
    options: dict[str, Any] = {**SAVING, **EVALUATING}
    private, plain = Events(), Events()
    trainer_for(
        tmp_path / "private", host=options, eval_dataset=HELD_OUT, callbacks=[private]
    ).train()
    Trainer(
        tiny_bert(),
        host_arguments(tmp_path / "plain", **options),
        train_dataset=Sentences(),
        eval_dataset=HELD_OUT,
        data_collator=collate,
        callbacks=[plain],
    ).train()
    assert plain.seen.pop("on_substep_end") == 6  # a micro-batch is nobody's business here
    assert private.seen == plain.seen
    assert private.seen["on_step_end"] == private.seen["on_optimizer_step"] == 6


def test_a_saved_model_loads_and_has_its_ledger_beside_it(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "run", eval_dataset=HELD_OUT)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(weights(loaded), weights(trainer.model))
    assert read_ledger(tmp_path / "saved" / LEDGER_NAME).num_releases == 6
    trainer.save_model()
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_save_state_and_metrics_are_written(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    result = trainer.train()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    written = json.loads((tmp_path / "train_results.json").read_text())
    assert written["epsilon"] == trainer.epsilon
    assert json.loads((tmp_path / "trainer_state.json").read_text())["total_flos"] == 0


def test_the_best_model_is_loaded_at_the_end_and_old_checkpoints_go(tmp_path: Path) -> None:
    scores = iter([0.1, 0.9, 0.2])
    trainer = trainer_for(
        tmp_path,
        host={
            **SAVING,
            **EVALUATING,
            "load_best_model_at_end": True,
            "metric_for_best_model": "score",
            "save_total_limit": 2,
        },
        eval_dataset=HELD_OUT,
        compute_metrics=lambda _: {"score": next(scores)},
    )
    trainer.train()
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {"checkpoint-4", "checkpoint-6"}
    best = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(weights(best), weights(trainer.model))
    assert trainer.epsilon == train_lines(trainer)[-1]["epsilon"], "all six steps are counted"


def test_early_stopping_spends_only_what_was_released(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path,
        host={
            **SAVING,
            **EVALUATING,
            "max_steps": 30,
            "load_best_model_at_end": True,
            "metric_for_best_model": "flat",
        },
        eval_dataset=HELD_OUT,
        compute_metrics=lambda _: {"flat": 0.0},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.state.global_step == read_ledger(tmp_path / LEDGER_NAME).num_releases == 6
    assert trainer.privacy_report().num_releases == 6


def test_model_init_is_called_anew_for_each_run(tmp_path: Path) -> None:
    made: list[nn.Module] = []

    def model_init() -> nn.Module:
        made.append(tiny_bert())
        return made[-1]

    trainer = trainer_for(tmp_path, model_init=model_init)
    trainer.train()
    assert trainer.model is made[-1]
    assert len(made) == 2
    assert not torch.equal(weights(made[1]), weights(made[0]))


def test_the_progress_bar_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer_for(tmp_path, host={"disable_tqdm": False}).train()
    shown = capsys.readouterr()
    assert "6/6" in shown.err
    assert "epsilon" in shown.out + shown.err


class Bag(nn.Module):
    """Nothing of transformers in it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 2)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        mask = attention_mask[..., None].float()
        logits = self.head((self.table(input_ids) * mask).sum(1) / mask.sum(1))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_any_module_trains_saves_and_resumes(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, host=SAVING, model=Bag(), eval_dataset=HELD_OUT)
    learns(trainer)
    assert trainer.evaluate()["eval_loss"] > 0
    resumed = trainer_for(tmp_path, host={**SAVING, "max_steps": 8}, model=Bag())
    resumed.train(resume_from_checkpoint=True)
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 8


def test_final_metrics_are_in_what_train_returns(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    result = trainer.train()
    assert result.global_step == 6
    assert result.metrics["epsilon"] == trainer.epsilon > 0
    assert result.metrics["delta"] == pytest.approx(NUM_EXAMPLES**-1.1)
    losses = [line["loss"] for line in train_lines(trainer)]
    assert result.training_loss == result.metrics["train_loss"]
    assert result.training_loss == pytest.approx(np.mean(losses), abs=1e-4)


def test_without_a_released_loss_no_line_shows_one(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, dp={"private_loss": False})
    result = trainer.train()
    lines = train_lines(trainer)
    assert len(lines) == 6
    assert all("loss" not in line and line["epsilon"] > 0 for line in lines)
    assert "train_loss" not in result.metrics
    assert result.training_loss == 0


def test_the_mixin_serves_another_trainer_class(tmp_path: Path) -> None:
    class Weighted(Trainer):
        def __init__(self, *args: Any, weight: float = 1.0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.weight = weight

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return self.weight * super().compute_loss(*args, **kwargs)

    class DPWeighted(DPTrainerMixin, Weighted):
        pass

    trainer = trainer_for(tmp_path, cls=DPWeighted, weight=2.0)
    learns(trainer)


def test_positional_arguments_are_the_trainers(tmp_path: Path) -> None:
    from hf_dp import DPArguments

    dp_args = DPArguments(noise_multiplier=1.0)
    args = host_arguments(tmp_path)
    trainer = DPTrainer(tiny_bert(), args, collate, Sentences(), HELD_OUT, dp_args=dp_args)
    assert trainer.eval_dataset is HELD_OUT
    learns(trainer)
