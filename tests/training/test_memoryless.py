"""Collators that keep something of the examples before are refused; those that draw and mask are not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import collate, trainer_for
from torch import Tensor, nn
from transformers import BertTokenizerFast, DataCollatorForLanguageModeling, default_data_collator

from hf_dp.errors import ConfigurationError
from hf_dp.training import memoryless
from hf_dp.training.memoryless import refuse_memory

PICTURE = {"pixel_values": torch.arange(48.0).view(3, 4, 4), "labels": 1}
BLANK = {"pixel_values": torch.zeros(3, 4, 4), "labels": 0}
WORDS = {"input_ids": [2, 7, 8, 9, 3], "attention_mask": [1] * 5}

Items = list[dict[str, Any]]


def pictures(items: Items) -> Tensor:
    return torch.stack([item["pixel_values"] for item in items])


class MixesWithTheLast:
    last: Tensor | None = None

    def __call__(self, items: Items) -> dict[str, Tensor]:
        now = pictures(items)
        mixed = now if self.last is None else (now + self.last) / 2
        self.last = now
        return {"pixel_values": mixed}


class Normalises:
    mean = 0.0

    def __call__(self, items: Items) -> dict[str, Tensor]:
        self.mean = 0.9 * self.mean + 0.1 * float(pictures(items).mean())
        return {"pixel_values": pictures(items) - self.mean}


class DrawsItself:
    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __call__(self, items: Items) -> dict[str, Any]:
        return {"pixel_values": pictures(items), "shift": self.generator.normal(size=1)}


class Counts:
    seen = 0

    def __call__(self, items: Items) -> dict[str, Any]:
        self.seen += 1
        return {"pixel_values": pictures(items), "curriculum": [self.seen]}


@pytest.mark.parametrize("kind", [MixesWithTheLast, Normalises, DrawsItself, Counts])
def test_collators_with_a_memory_are_refused(kind: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"data_collator='{kind.__name__}': expected the same"
    ):
        refuse_memory(kind(), [PICTURE])


class Standardises:
    """Of the targets so far, as Welford did."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def __call__(self, items: Items) -> dict[str, Any]:
        target = float(items[0]["target"])
        self.count += 1
        step = target - self.mean
        self.mean += step / self.count
        self.squares += step * (target - self.mean)
        spread = (self.squares / self.count) ** 0.5 + 1e-6
        return {"labels": torch.tensor([(target - self.mean) / spread])}


class BalancesClasses:
    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def __call__(self, items: Items) -> dict[str, Any]:
        label = items[0]["label"]
        self.counts[label] += 1
        share = self.counts[label] / self.counts.total()
        return {"labels": [label], "weight": [1 / share]}


class CountsWords:
    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()

    def __call__(self, items: Items) -> dict[str, Any]:
        words = items[0]["text"].split()
        self.rows.update(set(words))
        return {"rarity": [1 / self.rows[word] for word in words]}


class PadsToTheLongestSoFar:
    width = 0

    def __call__(self, items: Items) -> dict[str, Any]:
        ids = items[0]["input_ids"]
        self.width = max(self.width, len(ids))
        return {"input_ids": torch.tensor([ids + [0] * (self.width - len(ids))])}


@pytest.mark.parametrize(
    ("kind", "item"),
    [
        (Standardises, {"target": 2.5}),
        (Standardises, {"target": 3}),
        (BalancesClasses, {"label": 1}),
        (CountsWords, {"text": "a dull film"}),
        (PadsToTheLongestSoFar, WORDS),
    ],
)
def test_a_memory_of_numbers_words_and_lengths_is_seen(kind: Any, item: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected the same batch"):
        refuse_memory(kind(), [item])


@pytest.mark.parametrize("kind", [MixesWithTheLast, Normalises])
def test_a_blank_example_does_not_hide_a_memory(kind: Any) -> None:
    """Nor do real ones have to be altered: they differ."""
    with pytest.raises(ConfigurationError, match="expected the same batch"):
        refuse_memory(kind(), [BLANK])
    with pytest.raises(ConfigurationError, match="expected the same batch"):
        refuse_memory(kind(), [BLANK, PICTURE, BLANK])


def test_real_examples_alone_show_a_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memoryless, "_others", lambda item: [])
    with pytest.raises(ConfigurationError, match="expected the same batch"):
        refuse_memory(PadsToTheLongestSoFar(), [{"input_ids": [2]}, WORDS])


def jittered(items: Items) -> dict[str, Tensor]:
    flipped = np.random.rand() < 0.5  # noqa: NPY002
    return {"pixel_values": pictures(items) + torch.randn(1, 3, 4, 4) * (1 + flipped)}


def test_collators_that_draw_from_global_generators_pass(tmp_path: Path) -> None:
    refuse_memory(jittered, [PICTURE])
    refuse_memory(default_data_collator, [PICTURE, BLANK])
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    refuse_memory(
        DataCollatorForLanguageModeling(BertTokenizerFast(str(tmp_path / "vocab.txt"))), [WORDS]
    )


def test_what_cannot_be_tried_passes() -> None:
    refuse_memory(lambda items: 1 / 0, [PICTURE])
    refuse_memory(lambda items: {"x": items[0]["x"]}, [{"x": torch.eye(3).to_sparse()}])
    refuse_memory(lambda items: {"x": pictures(items), "of": object()}, [PICTURE])


def test_a_trainer_refuses_a_collator_that_came_later(tmp_path: Path) -> None:
    class Remembers:
        kept = 0

        def __call__(self, items: Items) -> Any:
            made = collate(items)
            made["input_ids"] = made["input_ids"].roll(self.kept, 1)
            self.kept += 1
            return made

    with pytest.raises(ConfigurationError, match="Remembers"):
        trainer_for(tmp_path / "a", data_collator=Remembers()).train()
    trainer = trainer_for(tmp_path / "b")
    trainer.train()
    trainer.data_collator = Remembers()
    with pytest.raises(ConfigurationError, match="Remembers"):
        trainer.train()
    assert isinstance(trainer.model, nn.Module)
