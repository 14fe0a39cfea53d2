"""Tiny real models and data for runs of the Trainer, shared by the tests of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from hf_dp import DPArguments, DPTrainer
from hf_dp.coins import FixedCoins
from hf_dp.errors import ConfigurationError
from hf_dp.ledger import LEDGER_NAME

NUM_EXAMPLES = 40
VOCABULARY = 50


class Sentences(torch.utils.data.Dataset[dict[str, Any]]):
    """Sentences of differing length whose label is whether token 7 occurs."""

    def __init__(self, size: int = NUM_EXAMPLES, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for index in range(size):
            length = int(torch.randint(3, 9, (1,), generator=generator))
            ids = torch.randint(8, VOCABULARY, (length,), generator=generator).tolist()
            if index % 2:
                ids[1] = 7
            self.rows.append({"input_ids": ids, "labels": index % 2})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad to the longest row, as DataCollatorWithPadding does."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[index, : len(row["input_ids"])] = 1
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tiny_bert(**options: Any) -> nn.Module:
    """Two layers of width 16, always the same weights."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(config)


def host_arguments(output_dir: Path, **options: Any) -> TrainingArguments:
    """Six steps of an expected batch of 8, on the CPU, logging every step, saving nothing."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
    }
    return TrainingArguments(str(output_dir), **{**defaults, **options})


def trainer_for(
    output_dir: Path,
    *,
    host: dict[str, Any] | None = None,
    dp: dict[str, Any] | None = None,
    cls: type[DPTrainer] = DPTrainer,
    **options: Any,
) -> DPTrainer:
    """A DPTrainer on the tiny model; `host` and `dp` override the two sets of arguments."""
    wanted = {"noise_multiplier": 1.0, **(dp or {})}
    if "target_epsilon" in wanted and "noise_multiplier" not in (dp or {}):
        del wanted["noise_multiplier"]
    defaults: dict[str, Any] = {"train_dataset": Sentences(), "data_collator": collate}
    if "model_init" not in options:
        defaults["model"] = tiny_bert()
    return cls(
        args=host_arguments(output_dir, **(host or {})),
        dp_args=DPArguments(**wanted),
        **{**defaults, **options},
    )


def train_lines(trainer: DPTrainer) -> list[dict[str, Any]]:
    """The training lines of the log, the final one left out."""
    return [
        line
        for line in trainer.state.log_history
        if "epsilon" in line and "train_runtime" not in line
    ]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def fixed(seed: int = 0) -> FixedCoins:
    return FixedCoins(torch.Generator().manual_seed(seed))


def learns(trainer: DPTrainer, *, steps: int = 6) -> None:
    """Train, and see that every trainable coordinate moved, as noise moves it, and no other."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == steps
    for name, p in trainer.model.named_parameters():
        moved = (p.detach() != before[name]).float().mean()
        assert moved > 0.9 if p.requires_grad else moved == 0, name


def refused(output_dir: Path, match: str, make: Callable[[], Any]) -> str:
    """The message of the refusal; the making alone must refuse, and nothing may be left behind."""
    with pytest.raises(ConfigurationError, match=match) as caught:
        make().train()
    assert not (output_dir / LEDGER_NAME).exists()
    message = str(caught.value)
    assert "=" in message
    assert ": expected " in message
    return message
