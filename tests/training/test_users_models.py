"""Runs that protect users: losses, models, adapters and engines."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tiny_runs import train_lines
from torch import Tensor, nn
from user_runs import (
    EVERYBODY,
    NUM_USERS,
    Recorded,
    bert,
    brute_force,
    close,
    drawn,
    pad,
    trainer,
)

from hf_dp import DPTrainer
from hf_dp.engines import BookKeepingEngine, SequentialEngine

CHECKPOINTING = next(  # the older name warns where there is the newer one
    field.name
    for field in dataclasses.fields(tf.TrainingArguments)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)


class Own(DPTrainer):
    """Its loss has no vectorised form, so that it is called for one example at a time."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if options.get("return_outputs") else outputs.loss


@pytest.mark.parametrize("size", [1, 8])
def test_a_loss_that_is_called_for_one_example_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    recorded = Recorded(monkeypatch)
    made = trainer(
        tmp_path,
        cls=Own,
        host={"max_steps": 1, "per_device_train_batch_size": size},
        dp={**EVERYBODY, "max_examples_per_user": 4},
    )
    made.train()
    assert isinstance(made.engine, SequentialEngine)
    assert close(recorded.sums[0], brute_force(bert(), drawn(recorded, 0), norm=1.0))


@pytest.mark.parametrize("masked", [True, False])
def test_examples_whose_padding_matters_are_collated_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    """A loss that reads its padding, and a collator that may mark none."""

    def collate(given: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: v for name, v in pad(given).items() if masked or name != "attention_mask"}

    def reads_padding(model: nn.Module, inputs: Any) -> Tensor:
        ids = inputs["input_ids"]
        outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return nn.functional.cross_entropy(outputs.logits, inputs["labels"], reduction="none")

    monkeypatch.setattr("hf_dp.training.choice.padding_matters", lambda *_: True)
    recorded = Recorded(monkeypatch)
    monkeypatch.setattr(
        Recorded,
        "texts",
        lambda self, step: [
            [
                tuple(ids.tolist())
                for piece in batch.get("collated apart", [batch])
                for ids in piece["input_ids"]
            ]
            for batch in self.batches[step]
        ],
    )
    made = trainer(
        tmp_path,
        example_loss=reads_padding,
        data_collator=collate,
        host={"max_steps": 1, "per_device_train_batch_size": 8},
        dp={**EVERYBODY, "max_examples_per_user": 4},
    )
    made.train()
    assert close(recorded.sums[0], brute_force(bert(), drawn(recorded, 0), norm=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_adapters_with_checkpointed_gradients_in_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    def adapted() -> nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
        return get_peft_model(bert(), config)

    recorded = Recorded(monkeypatch)
    made = trainer(
        tmp_path,
        model=adapted(),
        host={
            "max_steps": 2,
            CHECKPOINTING: True,
            "bf16": bf16,
            "per_device_train_batch_size": 8,
        },
        dp={**EVERYBODY, "max_examples_per_user": 4, "clipping_norm": 0.2, "preflight": True},
    )
    made.train()
    found = drawn(recorded, 0)
    assert sum(map(len, recorded.sizes[0])) == NUM_USERS
    assert max(map(max, recorded.sizes[0])) == 4
    model = adapted()
    for name, module in model.named_modules():
        if "lora_dropout" in name and isinstance(module, nn.Dropout):
            module.p = 0.0
    assert close(recorded.sums[0], brute_force(model, found, norm=0.2), 5e-2 if bf16 else 1e-4)
    assert all(torch.isfinite(total).all() for total in recorded.sums)


def test_the_engine_that_clips_users_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    made = trainer(tmp_path, dp={"engine": "book_keeping"}, host={"per_device_train_batch_size": 8})
    made.train()
    assert isinstance(made.engine, BookKeepingEngine)
    assert len(train_lines(made)) == 2
