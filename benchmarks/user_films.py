"""Critics' snippets grouped by film, and the two models that learn from them the critic's verdict."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, default_data_collator
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_dp.demo.assets import encoder_folder, reviews_csv
from hf_dp.demo.data import LABELS, Snippet, tokenized
from hf_dp.demo.model import load_classifier, with_lora

TRAIN_FILMS, PUBLIC_FILMS, TEST_SNIPPETS = 400, 30, 1500
_AT_ONCE = 64

Films = Mapping[str, Sequence[Snippet]]


def films() -> Films:
    """Film -> its distinct snippets, both in an order that depends on their text alone."""
    csv.field_size_limit(1_000_000)
    found: dict[str, dict[str, Snippet]] = defaultdict(dict)
    owners: dict[str, str] = {}
    for row in csv.DictReader(io.StringIO(reviews_csv(None))):
        if row["category"] in LABELS:
            text = row["text"]
            film = owners.setdefault(text, row["movie_name"])  # one owner, of repeated text, too
            found[film][text] = Snippet(text, LABELS.index(row["category"]))
    return {
        film: [found[film][text] for text in _shuffled(found[film])] for film in _shuffled(found)
    }


def _shuffled(texts: Mapping[str, Any]) -> list[str]:
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode("utf-8")).digest())


@dataclass(frozen=True)
class Material:
    """Three sets of films that share none, each snippet with its ``film``, and what trains on them."""

    train: Dataset
    public: Dataset
    test: Dataset
    collator: Any
    new_model: Callable[[], nn.Module]


def head_material(everything: Films, train: int, public: int) -> Material:
    """A linear head on what the frozen encoder makes of a snippet, computed once."""
    tokens = _parts(everything, train, public)
    encoder = AutoModel.from_pretrained(encoder_folder()).eval()
    train_part, public_part, test_part = (_features(part, encoder) for part in tokens)
    return Material(train_part, public_part, test_part, default_data_collator, Head)


def lora_material(everything: Films, train: int, public: int) -> Material:
    """The demo's classifier: LoRA on the encoder's two last layers, mean pooling, a linear head."""
    train_part, public_part, test_part = _parts(everything, train, public)
    collator = DataCollatorWithPadding(_tokenizer())
    return Material(train_part, public_part, test_part, collator, _adapted)


def _adapted() -> nn.Module:
    model: nn.Module = with_lora(load_classifier(encoder_folder()))
    return model


class Head(nn.Module):
    """A linear layer that begins with zeros."""

    main_input_name = "features"

    def __init__(self) -> None:
        """Of the encoder's width."""
        super().__init__()
        self.classifier = nn.Linear(384, 2)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Logits of features ``(B, 384)``, and the mean cross-entropy where there are labels ``(B,)``."""
        logits = self.classifier(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _parts(everything: Films, train: int, public: int) -> tuple[Dataset, Dataset, Dataset]:
    names, tokenizer = list(everything), _tokenizer()

    def part(some: Sequence[str]) -> Dataset:
        rows = [snippet for film in some for snippet in everything[film]]
        owners = [film for film in some for _ in everything[film]]
        return tokenized(rows, tokenizer).add_column("film", owners)

    cuts = names[:train], names[train : train + public], names[train + public :]
    *seen, test = map(part, cuts)
    return (*seen, test.shuffle(0).take(min(TEST_SNIPPETS, len(test))))


def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(encoder_folder())


@torch.no_grad()
def _features(part: Dataset, encoder: nn.Module) -> Dataset:
    """Mean-pooled final states, normalised to the length 1 at which the encoder's cosines are taken."""
    collator, found = DataCollatorWithPadding(_tokenizer()), []
    for start in range(0, len(part), _AT_ONCE):
        rows = part.select(range(start, min(start + _AT_ONCE, len(part))))
        names = ("input_ids", "attention_mask")
        batch = collator([{name: row[name] for name in names} for row in rows])
        real = batch["attention_mask"][..., None]
        states = encoder(**batch).last_hidden_state
        found.append(nn.functional.normalize((states * real).sum(1) / real.sum(1)))
    features = torch.cat(found).tolist()
    kept = {"features": features, "labels": part["labels"], "film": part["film"]}
    return Dataset.from_dict(kept)
