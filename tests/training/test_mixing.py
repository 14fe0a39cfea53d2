"""Collators that make rows of several examples are refused; those that draw, pad and mask are not."""

from __future__ import annotations

import collections
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tiny_runs import collate, trainer_for
from torch import Tensor, nn
from transformers import (
    BertTokenizerFast,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    default_data_collator,
)

from hf_dp.errors import ConfigurationError
from hf_dp.training.mixing import refuse_mixing

PICTURE = {"pixel_values": torch.arange(48.0).view(3, 4, 4), "labels": 1}
WORDS = {"input_ids": [2, 7, 8, 9, 3], "attention_mask": [1] * 5, "labels": [0, 1, 2, 3, 4]}


def stacked(items: list[Any]) -> tuple[Tensor, Tensor]:
    labels = torch.tensor([item["labels"] for item in items])
    return torch.stack([torch.as_tensor(i["pixel_values"]) for i in items]), nn.functional.one_hot(
        labels, 3
    ).float()


def mixup(items: list[Any]) -> dict[str, Tensor]:
    x, y = stacked(items)
    partners, share = torch.randperm(len(x)), float(np.random.beta(0.4, 0.4))  # noqa: NPY002
    return {"pixel_values": share * x + (1 - share) * x[partners],
            "labels": share * y + (1 - share) * y[partners]}  # fmt: skip


def cutmix(items: list[Any]) -> dict[str, Tensor]:
    x, y = stacked(items)
    x[..., :2, :2] = x.roll(1, 0)[..., :2, :2]
    return {"pixel_values": x, "labels": y}


def centred(items: list[Any]) -> dict[str, Tensor]:
    x, y = stacked(items)
    return {"pixel_values": x - x.mean((0, 2, 3), keepdim=True), "labels": y}


@pytest.mark.parametrize("collator", [mixup, cutmix, centred])
def test_rows_of_several_examples_are_refused(collator: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^data_collator='\w+': .* one example each"):
        refuse_mixing(collator, PICTURE)


def jittered(items: list[Any]) -> dict[str, Tensor]:
    x, y = stacked(items)
    return {"pixel_values": x + torch.randn_like(x), "labels": y}


def of_its_own_generator(items: list[Any]) -> dict[str, Tensor]:
    x, y = stacked(items)
    noise = np.random.default_rng().normal(size=tuple(x.shape))
    return {"pixel_values": x + torch.from_numpy(noise), "labels": y}


@pytest.mark.parametrize("collator", [jittered, of_its_own_generator])
def test_noise_for_each_example_is_no_mixing(collator: Any) -> None:
    refuse_mixing(collator, PICTURE)


def test_the_collators_of_transformers_mix_nothing(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    one = {**WORDS, "labels": 1}
    refuse_mixing(DataCollatorWithPadding(tokenizer), one)
    refuse_mixing(default_data_collator, WORDS)
    refuse_mixing(DataCollatorForTokenClassification(tokenizer), WORDS)
    refuse_mixing(DataCollatorForSeq2Seq(tokenizer), WORDS)
    plain = {k: v for k, v in WORDS.items() if k != "labels"}
    refuse_mixing(DataCollatorForLanguageModeling(tokenizer), plain)
    options = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0}
    refuse_mixing(
        DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True, **options), plain
    )


class Pair(NamedTuple):
    pixel_values: Tensor
    labels: int


@pytest.mark.parametrize("kind", [tuple, list, Pair._make])
def test_pairs_are_mixed_item_by_item(kind: Any) -> None:
    """What torchvision's datasets give, with the usual recipe for mixup."""

    def mixed(items: list[Any]) -> dict[str, Tensor]:
        assert len(items) % 2 == 0
        pictures, labels = torch.utils.data.default_collate(items)
        return mixup(
            [{"pixel_values": x, "labels": int(y)} for x, y in zip(pictures, labels, strict=True)]
        )

    with pytest.raises(ConfigurationError, match="one example each"):
        refuse_mixing(mixed, kind((torch.rand(3, 4, 4), 1)))


def reordered(items: list[Any]) -> dict[str, Tensor]:
    random.shuffle(items)
    x, y = stacked(items)
    return {"pixel_values": x, "labels": y, "padded": torch.ones(len(x), 3).bool()}


def of_sparse(items: list[Any]) -> dict[str, Tensor]:
    return {"x": torch.stack([item["x"] for item in items])}


def test_what_cannot_be_tried_or_is_only_reordered_passes() -> None:
    refuse_mixing(reordered, PICTURE)
    refuse_mixing(of_sparse, {"x": torch.eye(3).to_sparse()})
    refuse_mixing(lambda items: items, PICTURE)
    kept = collections.deque([1, 2, 3])
    refuse_mixing(lambda items: {"x": torch.tensor([list(i["x"]) for i in items])}, {"x": kept})
    assert list(kept) == [1, 2, 3]


def test_a_trainer_refuses_to_mix(tmp_path: Path) -> None:
    def shifted(items: list[Any]) -> Any:
        batch = collate(items)
        batch["input_ids"] = torch.where(
            torch.rand(len(items), 1) < 0.5, batch["input_ids"].roll(1, 0), batch["input_ids"]
        )
        return batch

    with pytest.raises(ConfigurationError, match="one example each"):
        trainer_for(tmp_path, data_collator=shifted).train()
