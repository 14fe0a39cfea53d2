"""An example without any position, an empty line say, adds nothing and never stops a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Sentences, collate, host_arguments, tiny_bert, trainer_for
from tiny_settings import SMALL
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_dp import DPArguments, DPTrainer, clipped_sum
from hf_dp.errors import ConfigurationError
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.training.batches import Draw, LogicalBatchCollator
from hf_dp.training.joining import is_blank
from hf_dp.training.packing import UserCollator

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
EMPTY: dict[str, Any] = {"input_ids": [], "attention_mask": []}


def tokenizer(folder: Path) -> BertTokenizerFast:
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return BertTokenizerFast(str(folder / "vocab.txt"))


def lines(size: int = 24) -> list[dict[str, Any]]:
    """Every other one empty, the first, too."""
    full = [{"input_ids": [5 + i % 7] * (2 + i % 3)} for i in range(size)]
    made = [{**one, "attention_mask": [1] * len(one["input_ids"])} for one in full]
    return [dict(EMPTY) if i % 2 == 0 else one for i, one in enumerate(made)]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=13, n_positions=16, n_embd=8, n_layer=1, n_head=2, pad_token_id=0)
    )


def trained(folder: Path, model: Any, rows: Any, collator: Any, **dp: Any) -> DPTrainer:
    trainer = DPTrainer(
        model=model,
        args=host_arguments(folder, max_steps=8, per_device_train_batch_size=2),
        dp_args=DPArguments(noise_multiplier=1.0, expected_batch_size=3, **dp),
        train_dataset=rows,
        data_collator=collator,
    )
    trainer.train()
    assert read_ledger(folder / LEDGER_NAME).num_releases == 8
    return trainer


@pytest.mark.parametrize("engine", ["auto", "sequential"])
def test_empty_lines_stop_no_language_model(tmp_path: Path, engine: str) -> None:
    collator = DataCollatorForLanguageModeling(tokenizer(tmp_path), mlm=False)
    trainer = trained(tmp_path, gpt2(), lines(), collator, engine=engine)
    choice = trainer._choice
    assert choice is not None
    assert not choice.alone


def test_nor_where_a_collator_does_not_take_them(tmp_path: Path) -> None:
    masking = DataCollatorForLanguageModeling(tokenizer(tmp_path), mlm_probability=0.3)

    def collator(rows: list[dict[str, Any]]) -> Any:
        if any(not row["input_ids"] for row in rows):
            raise IndexError("there is no first token")
        return masking(rows)

    model = BertForMaskedLM(BertConfig(**{**SMALL, "vocab_size": 13, "pad_token_id": 0}))
    trained(tmp_path, model, lines(), collator)


def test_nor_where_users_are_protected(tmp_path: Path) -> None:
    collator = DataCollatorForLanguageModeling(tokenizer(tmp_path), mlm=False)
    rows = [{**row, "user_id": place // 3} for place, row in enumerate(lines())]
    rows[0:3] = [{**EMPTY, "user_id": 0}] * 3  # one user has nothing else
    trained(tmp_path, gpt2(), rows, collator, privacy_unit="user")


def test_nor_where_every_line_is_empty(tmp_path: Path) -> None:
    collator = DataCollatorForLanguageModeling(tokenizer(tmp_path), mlm=False)
    trained(tmp_path, gpt2(), [dict(EMPTY)] * 24, collator)


def test_they_are_left_out_of_micro_batches_and_others_are_not() -> None:
    rows = Sentences().rows[:4]
    empty = {"input_ids": [], "labels": 1}
    collator = LogicalBatchCollator(collate, 2, "input_ids")
    with_empty = collator([rows[0], empty, rows[1], rows[2], empty, rows[3]]).micro_batches
    without = collator(rows).micro_batches
    assert len(with_empty) == len(without) == 2
    for one, other in zip(with_empty, without, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert collator([empty]).micro_batches == []


def test_of_a_user_s_examples_those_that_are_empty_are_left_out() -> None:
    rows, empty = Sentences().rows[:3], {"input_ids": [], "labels": 1}
    draw = Draw([rows[0], empty, empty, empty, rows[1], rows[2]])
    draw.sizes = (2, 2, 2)
    batch = UserCollator(collate, 8, "input_ids")(draw)
    assert batch.owned is not None
    assert [owned.owners.sizes for owned in batch.owned] == [(2, 1)]


def test_what_a_collator_makes_of_an_empty_line_is_used() -> None:
    def beginning(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return collate([{**row, "input_ids": [3, *row["input_ids"]]} for row in rows])

    found = LogicalBatchCollator(beginning, 2, "input_ids")([{"input_ids": [], "labels": 1}])
    assert found.micro_batches[0]["input_ids"].tolist() == [[3]]


def test_errors_of_other_examples_are_not_hidden() -> None:
    def failing(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        raise ConfigurationError("no")

    collator = LogicalBatchCollator(failing, 2, "input_ids")
    assert collator([{"input_ids": []}]).micro_batches == []
    with pytest.raises(ConfigurationError, match="no"):
        collator([{"input_ids": [1]}])


@pytest.mark.parametrize(
    ("item", "blank"),
    [
        ({"input_ids": [], "labels": [4, 5]}, True),
        ({"input_ids": torch.zeros(0), "labels": torch.tensor(1)}, True),
        ({"text": "", "label": 1}, True),
        ({"input_ids": [[], []], "label": 1}, True),
        ({"input_ids": [[], [1]], "label": 1}, False),
        ({"text": "", "title": "a"}, False),
        ({"input_ids": [1], "labels": []}, False),
        ({"labels": torch.tensor(1)}, False),
        ({"number": 1}, False),
        ([1, 2], False),
    ],
)
def test_which_items_are_blank(item: Any, blank: bool) -> None:
    assert is_blank(item, "input_ids") is blank


@pytest.mark.parametrize("users", [None, [0, 0, 1]])
@pytest.mark.parametrize("engine", ["auto", "book_keeping", "sequential"])
def test_a_batch_of_empty_lines_has_a_clipped_sum_of_zero(
    engine: str, users: list[int] | None
) -> None:
    none = torch.zeros(3, 0)  # as tokenizers make them: of no whole numbers
    batch = {"input_ids": none, "attention_mask": none, "labels": none}
    summed = clipped_sum(gpt2(), batch, clipping_norm=1.0, engine=engine, users=users)
    assert len(summed.norms) == (3 if users is None else 2)
    assert all(float(grad.abs().max()) == 0 for grad in summed.grads.values())


def test_an_empty_classified_text_has_a_bounded_share() -> None:
    none = torch.zeros(2, 0, dtype=torch.long)
    batch = {"input_ids": none, "attention_mask": none, "labels": torch.tensor([0, 1])}
    summed = clipped_sum(tiny_bert(), batch, clipping_norm=1.0)
    assert bool(summed.norms.isfinite().all())


def test_training_goes_on_among_empty_texts(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [], "labels": 1} if place % 3 == 0 else row
        for place, row in enumerate(Sentences().rows)
    ]
    trainer = trainer_for(tmp_path, train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 6
