from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hf_dp.demo import data
from hf_dp.demo.assets import encoder_folder
from hf_dp.demo.data import MAX_LENGTH, Snippet


@pytest.fixture(scope="module")
def everything(cache: Path) -> list[Snippet]:
    return data.snippets(cache)


def test_there_are_12752_distinct_snippets(everything: list[Snippet]) -> None:
    assert len(everything) == len({one.text for one in everything}) == 12_752
    assert sum(one.label for one in everything) == 7_368  # fresh; 5,384 are rotten


def test_the_order_is_the_same_everywhere(everything: list[Snippet]) -> None:
    joined = "\n".join(one.text for one in everything)
    digest = hashlib.sha256(joined.encode("utf-8")).hexdigest()
    assert digest == "5a9884e21a585b3bfff160306fa0e3eaaea83b29376ccb589c39dd85e16c0aca"


def test_labels_are_shuffled(everything: list[Snippet]) -> None:
    # The table is sorted by film; 250 of a fair shuffle stay within 5 standard errors of the share.
    shares = [sum(o.label for o in everything[i : i + 250]) / 250 for i in range(0, 12_500, 250)]
    assert max(abs(share - 0.578) for share in shares) < 5 * (0.578 * 0.422 / 250) ** 0.5


def test_parts_share_nothing_and_lose_nothing(everything: list[Snippet]) -> None:
    parts = data.split(everything)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (10_000, 752, 2_000)
    together = {*parts.train, *parts.validation, *parts.test}
    assert together == set(everything)


def test_majority_share_is_the_better_constant_answer() -> None:
    part = [Snippet("a", 1), Snippet("b", 0), Snippet("c", 0), Snippet("d", 0)]
    assert data.majority_share(part) == 0.75
    assert data.majority_share([Snippet("a", 1)]) == 1.0


def test_hardly_any_snippet_is_cut(cache: Path, everything: list[Snippet]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder(cache))
    encoded = data.tokenized(everything, tokenizer)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    assert max(lengths) == MAX_LENGTH
    assert sum(length == MAX_LENGTH for length in lengths) < 0.001 * len(lengths)
    assert sum(lengths) / len(lengths) == pytest.approx(27.0, abs=0.1)
    assert encoded.column_names == ["input_ids", "attention_mask", "labels"]
    assert encoded["labels"] == [one.label for one in everything]
