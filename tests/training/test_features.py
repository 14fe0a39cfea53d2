"""Ordinary features of the Trainer, one by one, under DPTrainer."""

from __future__ import annotations

import json
import random
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
from hf_dp.training.batches import LogicalBatch

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


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_and_collate(tmp_path: Path, persistent: bool) -> None:
    trainer = trainer_for(
        tmp_path,
        host={
            "dataloader_num_workers": 2,
            "dataloader_persistent_workers": persistent,
            "max_steps": 60,
            **SAVING,
            "save_steps": 50,
            "logging_steps": 60,
        },
        dp={"expected_batch_size": 1},
    )
    trainer.train()
    assert trainer.state.global_step == read_ledger(tmp_path / LEDGER_NAME).num_releases == 60
    resumed = trainer_for(
        tmp_path,
        host={**SAVING, "dataloader_num_workers": 2, "max_steps": 60},
        dp={"expected_batch_size": 1},
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-50"))
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 70


def test_workers_of_a_resumed_epoch_are_seeded_secretly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host rebuilds the loader to skip batches; a lost generator would mean the public seed."""
    from hf_dp.training import mixin

    generators: list[object] = []
    start = torch.utils.data.DataLoader.__iter__

    def spy(loader: Any) -> Any:
        generators.append(loader.generator)
        return start(loader)

    trainer_for(tmp_path, host=SAVING).train()
    resumed = trainer_for(tmp_path, host=SAVING)
    made: list[object] = []
    logical_loader = mixin.logical_loader

    def noted(*args: Any) -> Any:
        loader = logical_loader(*args)
        made.append(loader.generator)
        return loader

    monkeypatch.setattr(mixin, "logical_loader", noted)
    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", spy)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert made[0] is not None
    assert generators
    assert all(generator is made[0] for generator in generators)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_collator_draws_is_secret_too(tmp_path: Path, workers: int) -> None:
    """Masks of a language model, say: from the public seed, an observer could recompute them."""

    class Drawing:
        def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            drawn = [float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002
            real = torch.ones(len(rows), dtype=torch.long)  # zero in made-up examples
            return {**collate(rows), "drawn": torch.tensor([drawn] * len(rows)), "real": real}

    seen: list[set[float]] = []

    def noting(model: Any, inputs: Any) -> Tensor:
        seen[-1].update(inputs["drawn"][inputs["real"] == 1].flatten().tolist())
        given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        return F.cross_entropy(model(**given).logits, inputs["labels"], reduction="none")

    for name in "ab":
        seen.append(set())
        trainer_for(
            tmp_path / name,
            data_collator=Drawing(),
            example_loss=noting,
            host={"seed": 1, "max_steps": 1, "dataloader_num_workers": workers},
            dp={"expected_batch_size": 39},
        ).train()
    assert all(len(drawn) > 10 for drawn in seen)
    assert not seen[0] & seen[1]


def test_pinning_reaches_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def pinned(tensor: Tensor, *_: object) -> Tensor:
        return tensor + 1

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    pieces = [
        {"input_ids": torch.zeros(2, 3), "nested": [torch.zeros(1)]},
        {"labels": torch.ones(1)},
    ]
    batch = torch.utils.data._utils.pin_memory.pin_memory(LogicalBatch(pieces))
    assert isinstance(batch, LogicalBatch)
    assert batch.micro_batches[0]["input_ids"].sum() == 6
    assert batch.micro_batches[0]["nested"][0] == 1
    assert batch.micro_batches[1]["labels"] == 2
    assert LogicalBatch([]).pin_memory().micro_batches == []


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
