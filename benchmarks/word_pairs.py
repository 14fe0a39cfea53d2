"""A classifier of critics' snippets with four trained numbers, on a frozen encoder and three pairs of words.

How much closer the encoder puts a snippet to "a great film" than to "a terrible film" is known without any
data. What is learned is how much each pair counts, and what is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_dp.demo.assets import encoder_folder
from hf_dp.demo.data import Snippet, snippets, split

PAIRS = (
    ("a great film", "a terrible film"),
    ("beautifully made", "badly made"),
    ("superb acting", "poor acting"),
)
_AT_ONCE = 64


class Gates(nn.Module):
    """A weight for each score and one bias, all of which begin at zero."""

    main_input_name = "scores"

    def __init__(self) -> None:
        """One weight for each of `PAIRS`."""
        super().__init__()
        self.gates = nn.Linear(len(PAIRS), 1)
        nn.init.zeros_(self.gates.weight)
        nn.init.zeros_(self.gates.bias)

    def forward(self, scores: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Logits ``(B, 2)`` of scores ``(B, 3)``, and the mean cross-entropy given labels ``(B,)``."""
        fresh = self.gates(scores)
        logits = torch.cat([torch.zeros_like(fresh), fresh], dim=1)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@dataclass(frozen=True)
class Material:
    """Snippets as scores ``(N, 3)`` and labels.

    Attributes:
        train: What is protected.
        public: Scores are standardised by it, and clipping norms and learning rates come from it.
        test: Shares no snippet with the others.
    """

    train: Dataset
    public: Dataset
    test: Dataset


def material(train: int) -> Material:
    """The demo's parts: so many snippets to train on, 752 public ones, 2,000 to test."""
    parts = split(snippets())
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    encoder = AutoModel.from_pretrained(encoder_folder()).eval()

    def features(texts: list[str]) -> Tensor:
        return _features(texts, tokenizer, encoder)

    words = features([phrase for pair in PAIRS for phrase in pair])
    directions = nn.functional.normalize(words[0::2] - words[1::2])
    some = parts.train[:train], parts.validation, parts.test
    raw = [features([one.text for one in part]) @ directions.T for part in some]
    centre, spread = raw[1].mean(0), raw[1].std(0)
    private, public, test = (
        _dataset(part, (scores - centre) / spread) for part, scores in zip(some, raw, strict=True)
    )
    return Material(private, public, test)


def right_without_training(part: Dataset) -> Tensor:
    """Whether the sign of the mean score is the verdict, ``(N,)``."""
    scores, labels = torch.tensor(part["scores"][:]), torch.tensor(part["labels"][:])
    return (scores.mean(1) > 0) == (labels == 1)


def _dataset(part: tuple[Snippet, ...], scores: Tensor) -> Dataset:
    return Dataset.from_dict({"scores": scores.tolist(), "labels": [one.label for one in part]})


@torch.no_grad()
def _features(texts: list[str], tokenizer: Any, encoder: Any) -> Tensor:
    """Mean-pooled final states of length 1, ``(N, 384)``; neighbours in length are run together."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found = torch.empty(len(texts), encoder.config.hidden_size)
    for start in range(0, len(texts), _AT_ONCE):
        places = order[start : start + _AT_ONCE]
        batch = tokenizer(
            [texts[place] for place in places],
            padding=True,
            truncation=True,
            max_length=64,
            return_tensors="pt",
        )
        real = batch["attention_mask"][..., None]
        states = encoder(**batch).last_hidden_state
        found[places] = nn.functional.normalize((states * real).sum(1) / real.sum(1))
    return found
