"""When a step takes each example alone: a loss without a fast form, padding that shows in the loss."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import VOCABULARY, Sentences, collate, trainer_for
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from hf_dp import DPTrainer
from hf_dp.engines import SequentialEngine


def test_a_loss_without_fast_form_is_taken_one_example_at_a_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def odd(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return 3.0 * F.cross_entropy(outputs.logits, labels) + outputs.logits.square().mean()

    trainer = trainer_for(tmp_path, compute_loss_func=odd)
    trainer.train()
    assert isinstance(trainer.engine, SequentialEngine)
    assert "one example at a time" in caplog.text


def weighed(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
    """Counts a token that no made-up example has five times: there it is the library's own loss."""
    outputs = model(**inputs)
    rare = (inputs["input_ids"] == VOCABULARY - 1).any(1)
    losses = F.cross_entropy(outputs.logits, inputs["labels"], reduction="none") * (1 + 4 * rare)
    return (losses.mean(), outputs) if return_outputs else losses.mean()


@pytest.mark.parametrize("how", ["overridden", "wrapped", "of the object", "partial"])
def test_a_loss_of_ones_own_is_known_by_its_code(tmp_path: Path, how: str) -> None:
    """Whatever name a decorator gives it, and wherever it was put."""
    wrapped = functools.wraps(Trainer.compute_loss)(weighed)
    method = {"overridden": weighed, "wrapped": wrapped}.get(how)
    cls = DPTrainer if method is None else type("Own", (DPTrainer,), {"compute_loss": method})
    trainer = trainer_for(tmp_path, cls=cls)
    if method is None:
        bound = functools.partial(weighed, trainer)
        trainer.compute_loss = (
            bound if how == "partial" else lambda *given, **named: bound(*given, **named)
        )
    trainer.get_train_dataloader()
    assert isinstance(trainer.engine, SequentialEngine)


def pad_left(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = collate(rows)
    for index, row in enumerate(rows):
        unused = batch["input_ids"].shape[1] - len(row["input_ids"])
        for name in ("input_ids", "attention_mask"):
            batch[name][index] = batch[name][index].roll(unused)
    return batch


def test_a_collator_that_pads_on_the_left_pads_nothing(tmp_path: Path) -> None:
    """It would shift absolute positions; examples that it was given alone are filled up on the right."""
    trainer = trainer_for(tmp_path, data_collator=pad_left)
    for batch in trainer.get_train_dataloader():
        for micro_batch in batch.micro_batches:
            mask = micro_batch["attention_mask"]
            assert torch.equal(mask, mask.sort(1, descending=True).values)
    trainer.train()


def test_a_loss_that_depends_on_the_padding_is_taken_on_each_example_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A mean over padding, too: then every example is collated by itself, whatever was drawn."""

    def careless(model: Any, inputs: Any) -> Tensor:
        embedded = model.bert.embeddings.word_embeddings(inputs["input_ids"]).mean(1)
        return F.cross_entropy(9 * model.classifier(embedded), inputs["labels"], reduction="none")

    trainer = trainer_for(tmp_path, example_loss=careless, dp={"engine": "sequential"})
    loader = trainer.get_train_dataloader()
    assert "changes with its neighbours or their padding" in caplog.text
    assert all(len(m["labels"]) == 1 for batch in loader for m in batch.micro_batches)
    trainer.train()


def test_no_real_example_decides_which_loss_is_used(tmp_path: Path) -> None:
    """A choice made on drawn examples would let one of them switch the loss of all the others."""

    class Weighted(DPTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            logits = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).logits
            weights = torch.tensor([1.0, 5.0])
            return F.cross_entropy(logits, inputs["labels"], weights, reduction="sum")

    class OneLabel(Sentences):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**super().__getitem__(index), "labels": 0}

    for dataset in (Sentences(), OneLabel()):
        trainer = trainer_for(tmp_path, cls=Weighted, train_dataset=dataset)
        trainer.get_train_dataloader()
        assert isinstance(trainer.engine, SequentialEngine)
        ordinary = trainer_for(tmp_path, train_dataset=dataset)
        ordinary.get_train_dataloader()
        assert not isinstance(ordinary.engine, SequentialEngine)


def test_without_a_mask_every_example_is_collated_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def unmasked(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows)
        del batch["attention_mask"]
        return batch

    trainer = trainer_for(tmp_path, data_collator=unmasked)
    trainer.train()
    assert "changes with its neighbours or their padding" in caplog.text
    assert all(
        len(m["labels"]) == 1
        for batch in trainer.get_train_dataloader()
        for m in batch.micro_batches
    )


class Plain(nn.Module):
    """A module of one's own, of which nothing says what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.layer(x), labels, reduction="none")


@pytest.mark.parametrize("unit", [{}, {"privacy_unit": "user"}])
def test_a_module_need_not_name_its_input(tmp_path: Path, unit: dict[str, str]) -> None:
    """With batches of several rows and the host's own collator, which pads nothing."""
    data = [
        {"x": torch.full((3,), 0.1 * row), "labels": row % 2, "user_id": row % 5}
        for row in range(20)
    ]
    options: dict[str, Any] = {
        "train_dataset": data if unit else [{**row, "user_id": 0} for row in data],
        "example_loss": lambda model, batch: model(batch["x"], batch["labels"]),
        "data_collator": None,
        "host": {"max_steps": 1},
        "dp": {**unit, "expected_batch_size": 5},
    }
    trainer_for(tmp_path, model=Plain(), **options).train()
