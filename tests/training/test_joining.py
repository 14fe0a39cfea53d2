"""A collator sees one example at a time, and what it makes is joined as it would have joined it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import Sentences, collate, trainer_for
from torch import Tensor
from transformers import (
    BatchEncoding,
    BertTokenizerFast,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
)

from hf_dp.engines.rows import row
from hf_dp.training import batches
from hf_dp.training.batches import LogicalBatchCollator
from hf_dp.training.joining import MASK, USUAL_FILLS, fills_of, join, kind_of

Items = list[dict[str, Any]]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizerFast:
    (tmp_path / "vocab.txt").write_text("\n".join(["x", *WORDS]), encoding="utf-8")
    return BertTokenizerFast(str(tmp_path / "vocab.txt"))


def texts(*, of_tokens: bool = False, targets: bool = False) -> Items:
    made: Items = []
    for length in (5, 3, 4, 5):
        ids = list(range(6, 6 + length))
        one: dict[str, Any] = {"input_ids": ids, MASK: [1] * length, "token_type_ids": [1] * length}
        one["labels"] = ids if of_tokens else [7] * (9 - length) if targets else length % 2
        made.append(one)
    return made


def as_trained(collator: Any, items: Items, size: int = 4) -> list[Mapping[str, Any]]:
    fills = {**USUAL_FILLS, **fills_of(collator, items[0])}
    found: list[Any] = LogicalBatchCollator(collator, size, "input_ids", None, fills)(
        items
    ).micro_batches
    return found


@pytest.mark.parametrize("to_a_multiple", [None, 8])
@pytest.mark.parametrize("kind", ["sentences", "tokens", "translation", "translation, shifted"])
def test_the_library_s_collators_are_joined_as_they_join(
    kind: str, to_a_multiple: int | None, tokenizer: BertTokenizerFast
) -> None:
    items = texts(of_tokens=kind == "tokens", targets=kind.startswith("translation"))
    model = None
    if kind == "translation, shifted":
        tiny = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8}
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=20, decoder_start_token_id=1, **tiny)
        )
    more: dict[str, Any] = {"pad_to_multiple_of": to_a_multiple}
    collator: Any = {
        "sentences": DataCollatorWithPadding,
        "tokens": DataCollatorForTokenClassification,
    }.get(kind, lambda tok, **options: DataCollatorForSeq2Seq(tok, model=model, **options))(
        tokenizer, **more
    )
    expected = collator([dict(one) for one in items])
    ordered = sorted(range(4), key=lambda place: len(items[place]["input_ids"]), reverse=True)
    if to_a_multiple is not None:
        ordered = list(range(4))
    [found] = as_trained(collator, items)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        mine, theirs = found[name], value[ordered]
        if (
            name == "decoder_input_ids"
        ):  # theirs have the last target once more, which predicts nothing
            counted = found["labels"] != -100
            mine, theirs = mine[counted], theirs[counted]
        assert torch.equal(mine, theirs), name


def test_a_collator_is_never_given_two_examples_of_a_run(tmp_path: Path) -> None:
    given: list[int] = []

    def noting(items: Items) -> dict[str, Tensor]:
        given.append(len(items))
        return collate(items)

    trainer = trainer_for(tmp_path, data_collator=noting)
    loader = trainer.get_train_dataloader()
    assert given.count(2) == 1  # an example and its made-up double, which show the padding
    given.clear()
    assert any(len(m["labels"]) > 1 for batch in loader for m in batch.micro_batches)
    assert set(given) == {1}


def mixup(items: Items) -> dict[str, Tensor]:
    x = torch.stack([item["x"] for item in items])
    return {"x": (x + x.flip(0)) / 2}


def cropped(items: Items) -> dict[str, Tensor]:
    least = min(item["x"].shape[-1] for item in items)
    return {"x": torch.stack([item["x"][..., :least] for item in items])}


def centred(items: Items) -> dict[str, Tensor]:
    return {"x": mixup(items)["x"], "centre": torch.stack([i["x"] for i in items]).mean()}


def filled_up(items: Items) -> dict[str, Tensor]:
    most = max(item["x"].shape[-1] for item in items)
    wide = [torch.nn.functional.pad(i["x"], (0, most - i["x"].shape[-1])) for i in items]
    return {"x": torch.stack(wide)}


def first_row_s_columns(items: Items) -> dict[str, Tensor]:
    return {name: torch.stack([i[name] for i in items if name in i]) for name in items[0]}


@pytest.mark.parametrize("collator", [mixup, cropped, centred, filled_up, first_row_s_columns])
def test_what_an_example_is_does_not_depend_on_the_others(collator: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    items: Items = [{"x": torch.randn(3, 4, 4 + i % 3, generator=generator)} for i in range(6)]
    items[0]["y"] = torch.ones(2)

    def rows(some: Items) -> list[dict[str, Any]]:
        made = as_trained(collator, some)
        return [row(batch, index) for batch in made for index in range(len(batch["x"]))]

    def told(one: dict[str, Any]) -> tuple[Any, ...]:
        return tuple((name, tuple(value.flatten().tolist())) for name, value in sorted(one.items()))

    whole = sorted(map(told, rows(items)))
    for left_out in range(6):
        rest = sorted(map(told, rows(items[:left_out] + items[left_out + 1 :])))
        gone = told(collator([items[left_out]]) | {})
        assert sorted([*rest, gone]) == whole


def test_a_collator_that_is_given_the_whole_draw_would_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: examples are collated together again."""

    def together(self: LogicalBatchCollator, examples: Items) -> Any:
        return batches.LogicalBatch([self.collator(list(examples))])

    monkeypatch.setattr(LogicalBatchCollator, "__call__", together)
    with pytest.raises(AssertionError):
        test_what_an_example_is_does_not_depend_on_the_others(cropped)


def test_only_what_a_mask_marks_is_filled_up() -> None:
    fills = {**USUAL_FILLS, "x": 0}

    def kind(**columns: Any) -> Any:
        return kind_of(columns, fills)

    def one(width: int, of: float = 1.0) -> Tensor:
        return torch.full((1, width), of)

    assert kind(x=one(3), attention_mask=one(3)) == kind(x=one(4), attention_mask=one(4))
    assert kind(x=one(3)) != kind(x=one(4))
    assert kind(x=one(3), attention_mask=one(2)) != kind(x=one(4), attention_mask=one(2))
    assert kind(z=one(3), attention_mask=one(3)) != kind(z=one(4), attention_mask=one(4))
    assert kind(labels=one(3), attention_mask=one(3)) != kind(labels=one(4), attention_mask=one(4))
    assert kind(x=one(3)) != kind(x=one(3).double())
    assert kind(x=one(3)) != kind(x=one(3), y=one(3))
    assert kind(x=one(3), scale=1.0) != kind(x=one(3), scale=2.0)
    assert kind(x=one(3), scale=torch.tensor(1)) != kind(x=one(3), scale=torch.tensor(2))
    assert kind(x=one(3), scale=None) == kind(x=one(3), scale=None) != kind(x=one(3), scale=0)
    assert kind(x=one(3).to_sparse()) != kind(x=one(3).to_sparse())


def test_whatever_has_rows_is_joined() -> None:
    parts = [
        {
            "x": np.full((1, 2), i),
            "text": [f"t{i}"],
            "more": {"y": torch.full((1,), i)},
            "flag": True,
        }
        for i in range(3)
    ]
    assert len({kind_of(part, {}) for part in parts}) == 1
    found = join(parts, {})
    assert found["x"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert found["text"] == ["t0", "t1", "t2"]
    assert found["more"]["y"].tolist() == [0, 1, 2]
    assert found["flag"] is True
    assert parts[0]["text"] == ["t0"]


def test_the_collators_padding_is_read_off_its_result(tokenizer: BertTokenizerFast) -> None:
    one = texts()[0]
    found = fills_of(DataCollatorWithPadding(tokenizer), one)
    assert found == {"input_ids": tokenizer.pad_token_id, "token_type_ids": 0}
    tokenizer.padding_side = "left"
    assert fills_of(DataCollatorWithPadding(tokenizer), one) == found
    written = fills_of(
        lambda items: tokenizer([i["text"] for i in items], padding=True, return_tensors="pt"),
        {"text": "a b c"},
    )
    assert written["input_ids"] == tokenizer.pad_token_id
    assert fills_of(default_data_collator, {"pixel_values": torch.zeros(3, 4, 4)}) == {}
    assert fills_of(lambda items: 1 / 0, one) == {}


def test_rows_without_some_columns_train_beside_others(tmp_path: Path) -> None:
    class Ragged(Sentences):
        def __getitem__(self, index: int) -> dict[str, Any]:
            found = super().__getitem__(index)
            ids = found["input_ids"]
            more = {"token_type_ids": [0] * len(ids)} if index % 3 else {}
            return {**found, **more}

    def padded(items: Items) -> BatchEncoding:
        made = collate(items)
        if "token_type_ids" in items[0]:
            made["token_type_ids"] = torch.zeros_like(made["input_ids"])
        return BatchEncoding(made)

    trainer = trainer_for(tmp_path, train_dataset=Ragged(), data_collator=padded)
    seen = {
        "token_type_ids" in micro_batch
        for batch in trainer.get_train_dataloader()
        for micro_batch in batch.micro_batches
    }
    assert seen == {True, False}
    trainer.train()
