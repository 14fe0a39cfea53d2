"""Real sentences of a few authors, and runs of DPTrainer that protect the authors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from tiny_runs import host_arguments
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from hf_dp import DPArguments, DPTrainer
from hf_dp.training import mixin, packing

TEXTS = {
    "Austen": [
        "It is a truth universally acknowledged that a single man must be in want of a wife",
        "Vanity and pride are different things",
        "There is no charm equal to tenderness of heart",
        "I declare after all there is no enjoyment like reading",
        "One half of the world cannot understand the pleasures of the other",
        "What are men to rocks and mountains",
        "Silly things do cease to be silly if they are done by sensible people",
    ],
    "Melville": [
        "Call me Ishmael",
        "It is not down on any map",
        "True places never are",
        "I know not all that may be coming but be it what it will I will go to it laughing",
    ],
    "Dickens": [
        "It was the best of times it was the worst of times",
        "There is prodigious strength in sorrow and despair",
    ],
    "Shelley": ["Beware for I am fearless and therefore powerful", "Nothing is so painful"],
    "Stoker": ["There are darknesses in life and there are lights"],
    "Wilde": [
        "Be yourself",
        "To live is the rarest thing in the world",
        "I can resist everything except temptation",
    ],
    "Poe": ["All that we see or seem is but a dream within a dream"],
    "Woolf": ["Lock up your libraries if you like", "Arrange whatever pieces come your way"],
}
"""Opening and other lines by author: 22 in all, from 1 to 7 of each of 8 authors."""

NUM_USERS = len(TEXTS)
NUM_EXAMPLES = sum(map(len, TEXTS.values()))
LINES = [
    (author, line)
    for place in range(7)
    for author, lines in TEXTS.items()
    for line in lines[place : place + 1]
]  # in turns, so that nobody's lines stand together


@functools.cache
def tokenizer() -> tf.PreTrainedTokenizerFast:
    """Whole words."""
    words = sorted({word for _, line in LINES for word in line.lower().split()})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )


def rows(column: str = "user_id") -> list[dict[str, Any]]:
    """Token ids, whether the line is long, and its author."""
    read = tokenizer()
    return [
        {
            "input_ids": read(line.lower())["input_ids"],
            "attention_mask": [1] * len(line.split()),
            "labels": int(len(line.split()) > 7),
            column: author,
        }
        for author, line in LINES
    ]


def table(column: str = "user_id") -> Dataset:
    return Dataset.from_list(rows(column))


def pad(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """What a collator makes of examples without an author."""
    width = max(len(row["input_ids"]) for row in examples)
    batch: dict[str, Tensor] = {}
    for name in ("input_ids", "attention_mask"):
        padded = [row[name] + [0] * (width - len(row[name])) for row in examples]
        batch[name] = torch.tensor(padded)
    return {**batch, "labels": torch.tensor([row["labels"] for row in examples])}


def bert(**options: Any) -> nn.Module:
    """Two layers of width 16 without dropout, always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tf.BertConfig(
            vocab_size=len(tokenizer()),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **options,
        )
        return tf.BertForSequenceClassification(config)


def trainer(
    folder: Path,
    *,
    host: dict[str, Any] | None = None,
    dp: dict[str, Any] | None = None,
    cls: type[DPTrainer] = DPTrainer,
    **options: Any,
) -> DPTrainer:
    """Two steps in which 4 of 8 authors are expected, with two lines each."""
    asked = {
        "privacy_unit": "user",
        "max_examples_per_user": 2,
        "preflight": False,  # half of the time of a run
        **(dp or {}),
    }
    if "target_epsilon" not in asked:
        asked.setdefault("noise_multiplier", 1.0)
    data: dict[str, Any] = {"train_dataset": table(), "processing_class": tokenizer()}
    if "model_init" not in options:
        data["model"] = bert()
    return cls(
        args=host_arguments(folder, **{"max_steps": 2, **(host or {})}),
        dp_args=DPArguments(**asked),
        **{**data, **options},
    )


EVERYBODY = {"expected_batch_size": NUM_USERS, "private_loss": False}
"""Every user is in every batch: no coin decides."""

ONE = {"max_steps": 1}


class Recorded:
    """What each step was made of, and its clipped sum."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[dict[str, Any]]] = []
        self.sizes: list[list[tuple[int, ...]]] = []
        self.sums: list[Tensor] = []
        self.norms: list[Tensor] = []
        real = mixin.clipped_sum_of

        def noted(model: nn.Module, micro_batches: Any, **parts: Any) -> Any:
            batches = list(micro_batches)
            self.batches.append(batches)
            self.sizes.append([own.owners.sizes for own in parts["owned"] or ()])
            summed = real(model, batches, **parts)
            self.sums.append(torch.cat([grad.flatten().clone() for grad in summed.grads.values()]))
            self.norms.append(summed.norms.clone())
            return summed

        monkeypatch.setattr(mixin, "clipped_sum_of", noted)

    def texts(self, step: int) -> list[list[tuple[int, ...]]]:
        """The token ids in each micro-batch of a step."""
        found = []
        for batch in self.batches[step]:
            found.append([])
            for piece in packing.apart(batch) or [batch]:
                for ids, mask in zip(piece["input_ids"], piece["attention_mask"], strict=True):
                    found[-1].append(tuple(ids[mask.bool()].tolist()))
        return found


def author_of() -> dict[tuple[int, ...], str]:
    return {tuple(row["input_ids"]): row["user_id"] for row in rows()}


def drawn(recorded: Recorded, step: int) -> dict[str, list[tuple[int, ...]]]:
    """The texts of a step by author, whatever the trainer believes whose they are."""
    authors, found = author_of(), {}
    for batch in recorded.texts(step):
        for text in batch:
            found.setdefault(authors[text], []).append(text)
    return found


def gradient(model: nn.Module, examples: Sequence[dict[str, Any]], reduction: str) -> Tensor:
    """Of the mean, or the sum, of the losses of each example alone, by plain autograd."""
    model.train().zero_grad()
    losses = [model(**pad([row])).loss for row in examples]
    total = torch.stack(losses).sum() / (len(losses) if reduction == "mean" else 1)
    total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def clipped(whole: Tensor, norm: float) -> Tensor:
    return whole * min(1.0, norm / float(whole.norm()))


def brute_force(
    model: nn.Module,
    by_user: dict[str, list[tuple[int, ...]]],
    *,
    norm: float,
    reduction: str = "mean",
) -> Tensor:
    """The sum over users of their clipped gradients."""
    known = {tuple(row["input_ids"]): row for row in rows()}
    parts = [
        clipped(gradient(model, [known[text] for text in texts], reduction), norm)
        for texts in by_user.values()
    ]
    return torch.stack(parts).sum(0) if parts else torch.zeros(())  # a draw may be empty


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


def most_of_anybody(found: dict[str, list[Any]]) -> int:
    return max(map(len, found.values()), default=0)
