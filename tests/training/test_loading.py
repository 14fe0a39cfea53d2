"""What workers, collators and pinning do to logical batches: same draws, secret seeds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import collate, trainer_for
from torch import Tensor
from torch.nn import functional as F

from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.training.batches import LogicalBatch

SAVING = {"save_strategy": "steps", "save_steps": 2}


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
            real = torch.full((len(rows),), 77)  # below ten in made-up examples
            return {**collate(rows), "drawn": torch.tensor([drawn] * len(rows)), "real": real}

    seen: list[set[float]] = []

    def noting(model: Any, inputs: Any) -> Tensor:
        seen[-1].update(inputs["drawn"][inputs["real"] == 77].flatten().tolist())
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
