"""Evaluation on training rows is refused, whole or in part; parts that are apart are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from tiny_runs import Sentences, trainer_for
from torch.utils.data import ConcatDataset, Subset, TensorDataset, random_split
from transformers import Trainer

from hf_dp import DPTrainerMixin
from hf_dp.errors import ConfigurationError
from hf_dp.training import held_out
from hf_dp.training.held_out import have_rows_in_common

SIZE = 20
LIST: list[Any] = Sentences(SIZE).rows
TABLE = Dataset.from_list(LIST)
MIXED = TABLE.shuffle(seed=1)
SPLIT = TABLE.train_test_split(test_size=6, seed=0)
IN_ORDER = TABLE.train_test_split(test_size=6, shuffle=False)
CHUNKS = concatenate_datasets([TABLE.select(range(7)), TABLE.select(range(7, SIZE))])
NESTED = Dataset.from_list(
    [{"a": {"b": [n, n]}, "c": None, "d": str(n), "e": n > 3} for n in range(SIZE)]
)
ITEMS = Sentences(SIZE)
TENSORS = TensorDataset(torch.arange(SIZE))


def subset(data: Any, places: Any) -> Any:
    return Subset(data, places)


TOGETHER: dict[str, tuple[Any, Any]] = {
    "a selection of a table": (TABLE, TABLE.select(range(6))),
    "the rows of a selection": (TABLE.select(range(6)), TABLE),
    "scattered rows": (TABLE, TABLE.select([3, 19, 5])),
    "selections that meet": (TABLE.select(range(6)), TABLE.select(range(5, 9))),
    "scattered rows that meet": (TABLE.select([1, 3, 5]), TABLE.select([0, 2, 5])),
    "rows of a mixed table": (MIXED, TABLE.select([4])),
    "selections of a mixed table": (MIXED.select(range(6)), MIXED.select(range(5, 9))),
    "a split and the whole": (SPLIT["train"], TABLE),
    "two splits": (SPLIT["train"], TABLE.train_test_split(test_size=6, seed=1)["test"]),
    "a split and a part of it": (IN_ORDER["train"], IN_ORDER["train"].select([2])),
    "other columns": (
        TABLE,
        TABLE.select([2]).remove_columns("input_ids").rename_column("labels", "y"),
    ),
    "a column more": (TABLE, TABLE.add_column("new", list(range(SIZE))).select([2])),
    "another format": (TABLE, TABLE.with_format("torch").select([2, 1])),
    "tables in a row": (CHUNKS, TABLE.select([8])),
    "a part of tables in a row": (CHUNKS.select(range(5, 9)), TABLE.select([8])),
    "nested columns": (NESTED.select(range(5)), NESTED.select([4, 9])),
    "a part of a list": (LIST, LIST[:6]),
    "scattered rows of a list": (LIST[:6], [LIST[9], LIST[5]]),
    "a list of itself": (LIST, list(LIST)),
    "a subset": (ITEMS, subset(ITEMS, range(3))),
    "the whole of a subset": (subset(ITEMS, [1, 2]), ITEMS),
    "subsets that meet": (subset(ITEMS, [1, 2]), subset(ITEMS, [2, 3])),
    "subsets of subsets": (subset(ITEMS, [1, 2]), subset(subset(ITEMS, [9, 2]), [1])),
    "places from the end": (subset(ITEMS, [-1]), subset(ITEMS, [SIZE - 1])),
    "subsets of a table": (subset(TABLE, [1, 2]), TABLE.select([2])),
    "subsets of a selection": (subset(MIXED, np.array([1, 2])), subset(MIXED, [2])),
    "subsets of a list": (subset(LIST, [1, 2]), LIST[2:]),
    "one part of several": (ConcatDataset([ITEMS, TENSORS]), subset(TENSORS, [0])),
    "a subset of several": (subset(ConcatDataset([ITEMS, TENSORS]), [SIZE]), subset(TENSORS, [0])),
}

APART: dict[str, tuple[Any, Any]] = {
    "a split": (SPLIT["train"], SPLIT["test"]),
    "a split in order": (IN_ORDER["train"], IN_ORDER["test"]),
    "a split of a mixed table": tuple(MIXED.train_test_split(test_size=0.3).values()),  # type: ignore[dict-item]
    "a split of a split": (
        SPLIT["train"],
        SPLIT["test"].train_test_split(test_size=2)["train"],
    ),
    "halves": (TABLE.select(range(10)), TABLE.select(range(10, SIZE))),
    "shards": (TABLE.shard(2, 0), TABLE.shard(2, 1)),
    "odd and even": (TABLE.select(range(0, SIZE, 2)), TABLE.select(range(1, SIZE, 2))),
    "tables in a row": (CHUNKS.select(range(5)), CHUNKS.select(range(5, SIZE))),
    "nested columns": (NESTED.select(range(5)), NESTED.select([5, 9])),
    "another table": (TABLE, Dataset.from_list(LIST)),
    "an empty one": (TABLE, TABLE.select([])),
    "lists": (LIST[:6], LIST[6:]),
    "lists of plain values": ([1, 2, 3], [3, 2, 1]),
    "subsets": tuple(random_split(ITEMS, [12, 8])),  # type: ignore[dict-item]
    "subsets of a table": (subset(TABLE, [1, 2]), subset(TABLE, [0, 3])),
    "a subset of several": (subset(ConcatDataset([ITEMS, TENSORS]), [0]), subset(TENSORS, [0])),
    "something else": (ITEMS, TENSORS),
    "no rows at all": (ITEMS, None),
    "a stream": (TABLE, TABLE.to_iterable_dataset()),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_rows_in_common_are_seen(name: str) -> None:
    one, other = TOGETHER[name]
    assert have_rows_in_common(one, other)
    assert have_rows_in_common(other, one)


@pytest.mark.parametrize("name", APART)
def test_parts_that_are_apart_are_not_taken_for_others(name: str) -> None:
    one, other = APART[name]
    assert not have_rows_in_common(one, other)
    assert not have_rows_in_common(other, one)


def test_tables_on_the_disk(tmp_path: Path) -> None:
    TABLE.save_to_disk(tmp_path / "t", num_shards=3)
    read = Dataset.load_from_disk(tmp_path / "t")
    assert have_rows_in_common(read, read.select([8]))
    assert have_rows_in_common(read.select(range(9)), read.shuffle(seed=0))
    parts = read.train_test_split(test_size=0.3)
    assert not have_rows_in_common(*parts.values())


def test_a_table_of_many_rows_is_compared_in_no_time() -> None:
    large = Dataset.from_dict({f"c{n}": np.arange(300_000) for n in range(4)})
    large = concatenate_datasets(
        [large.select(range(n, n + 1000)) for n in range(0, 300_000, 1000)]
    )
    parts = large.train_test_split(test_size=0.2)
    assert not have_rows_in_common(parts["train"], parts["test"])


EVALUATES: dict[str, Callable[[Any, Any], Any]] = {
    "evaluate": lambda trainer, data: trainer.evaluate(data),
    "evaluate a dict": lambda trainer, data: trainer.evaluate({"a": Sentences(2), "b": data}),
    "predict": lambda trainer, data: trainer.predict(data),
}


@pytest.mark.parametrize("name", EVALUATES)
def test_trainers_refuse_a_part_of_what_they_train_on(tmp_path: Path, name: str) -> None:
    part = TABLE.select(range(6))
    for evaluated in (part, {"held out": Sentences(3), "part": part}):
        with pytest.raises(
            ConfigurationError, match=r"^eval_dataset='rows of the training"
        ) as caught:
            trainer_for(tmp_path, train_dataset=TABLE, eval_dataset=evaluated)
        assert "train_test_split" in str(caught.value)
    trainer = trainer_for(tmp_path, train_dataset=TABLE, host={"eval_strategy": "no"})
    with pytest.raises(ConfigurationError, match="rows of the training"):
        EVALUATES[name](trainer, part)
    trainer.eval_dataset = {"part": part}
    for evaluated in (None, "part"):
        with pytest.raises(ConfigurationError, match="rows of the training"):
            trainer.evaluate(evaluated)
    with pytest.raises(ConfigurationError, match="rows of the training"):
        trainer.train()
    split = trainer_for(tmp_path, train_dataset=SPLIT["train"], eval_dataset=SPLIT["test"])
    assert split.evaluate()["eval_loss"] > 0
    asked = trainer_for(
        tmp_path, train_dataset=TABLE, eval_dataset=part, dp={"nonprivate_metrics": True}
    )
    assert asked.evaluate()["eval_loss"] > 0


class Preparing(Trainer):
    """Makes tables of its own of what it is given, as TRL's trainers do."""

    def __init__(self, *args: Any, train_dataset: Any, eval_dataset: Any, **kwargs: Any) -> None:
        one, other = (data.map(lambda row: row) for data in (train_dataset, eval_dataset))
        super().__init__(*args, train_dataset=one, eval_dataset=other, **kwargs)


class Prepared(DPTrainerMixin, Preparing):
    """Sees what was given before the host does."""


def test_what_is_given_to_a_host_that_copies_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="rows of the training"):
        trainer_for(tmp_path, cls=Prepared, train_dataset=TABLE, eval_dataset=TABLE.select([2]))  # type: ignore[arg-type]
    trainer_for(tmp_path, cls=Prepared, train_dataset=SPLIT["train"], eval_dataset=SPLIT["test"])  # type: ignore[arg-type]


def test_planted_without_the_comparison_parts_go_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "have_rows_in_common", lambda *_: False)
    with pytest.raises(pytest.fail.Exception):
        test_trainers_refuse_a_part_of_what_they_train_on(tmp_path, "evaluate")
