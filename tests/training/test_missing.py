"""Rows and columns of which no loss can be computed are refused before training, and nothing of them told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_runs import Sentences, collate, trainer_for
from transformers import default_data_collator

from hf_dp.errors import ConfigurationError
from hf_dp.training import settled


def rows(label: str = "labels", bare: int | None = 11) -> list[dict[str, Any]]:
    """Forty sentences of one length; the row `bare` has no label."""
    found = []
    for index, row in enumerate(Sentences().rows):
        ids = (row["input_ids"] * 3)[:6]
        value = None if index == bare else row["labels"]
        found.append({"input_ids": ids, "attention_mask": [1] * 6, label: value})
    return found


def without(label: str, bare: int) -> list[dict[str, Any]]:
    found = rows(label)
    del found[bare][label]
    return found


BARE = {
    "a list": (rows(), "labels"),
    "another name": (rows("label"), "label"),
    "the first row": (rows(bare=0), "labels"),
    "a table": (Dataset.from_list(rows()), "labels"),
    "a mixed table": (Dataset.from_list(rows()).shuffle(seed=1), "labels"),
    "a field that is not there": (without("labels", 11), "labels"),
}


@pytest.mark.parametrize("name", BARE)
def test_a_row_without_a_label_is_refused(tmp_path: Path, name: str) -> None:
    data, field = BARE[name]
    trainer = trainer_for(tmp_path, train_dataset=data, data_collator=default_data_collator)
    with pytest.raises(ConfigurationError) as caught:
        trainer.train()
    assert str(caught.value).startswith(f"train_dataset['{field}']=None: expected a label in every")
    assert "11" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert trainer.epsilon == 0


def test_planted_without_the_look_the_run_stops_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settled, "refuse_missing_labels", lambda *_: None)
    with pytest.raises((Exception, pytest.fail.Exception)):  # the latter if it is never drawn
        test_a_row_without_a_label_is_refused(tmp_path, "a list")


def takes_none(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """No label is the label -100."""
    return collate(
        [{**row, "labels": -100 if row["labels"] is None else row["labels"]} for row in batch]
    )


@pytest.mark.parametrize(
    ("data", "collator"),
    [
        (rows(), takes_none),
        (rows(bare=None), default_data_collator),
        (Dataset.from_list(rows(bare=None)), default_data_collator),
        (Dataset.from_list(rows()).filter(lambda row: row["labels"] is not None), None),
        (Dataset.from_list(rows()).select(range(11)), None),
    ],
)
def test_other_rows_are_not(tmp_path: Path, data: Any, collator: Any) -> None:
    trainer_for(
        tmp_path,
        train_dataset=data,
        data_collator=collator or default_data_collator,
        host={"max_steps": 1},
        dp={"expected_batch_size": 8.0},
    ).train()


PAIRS = [{"chosen_input_ids": [2, 3, 4], "rejected_input_ids": [2, 5, 6]}] * 40


def test_columns_that_the_model_does_not_read_are_refused(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path,
        train_dataset=PAIRS,
        data_collator=default_data_collator,
        host={"remove_unused_columns": False},
    )
    with pytest.raises(ConfigurationError, match=r"expected a column that \w+\.forward takes"):
        trainer.train()
    assert trainer.epsilon == 0


def test_a_loss_of_ones_own_may_read_them(tmp_path: Path) -> None:
    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = (batch[f"{kind}_input_ids"] for kind in ("chosen", "rejected"))
        chosen, rejected = (model(input_ids=part).logits.square().mean(1) for part in parts)
        return chosen - rejected

    trainer_for(
        tmp_path,
        train_dataset=PAIRS,
        data_collator=default_data_collator,
        host={"remove_unused_columns": False, "max_steps": 1},
        example_loss=loss,
    ).train()
