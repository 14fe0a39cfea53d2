"""Runs that protect users: where ids and rows come from, with workers, and what a collator sees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from tiny_runs import fixed
from torch import Tensor, nn
from user_runs import (
    EVERYBODY,
    NUM_USERS,
    Recorded,
    bert,
    brute_force,
    close,
    drawn,
    pad,
    rows,
    table,
    trainer,
)

from hf_dp.training.mixin import DPTrainerMixin


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["users", "examples"])
def test_owners_come_through_the_workers_of_the_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: str
) -> None:
    recorded = Recorded(monkeypatch)
    dp = {**EVERYBODY, "user_sampling": sampling, "max_examples_per_user": 4}
    if sampling == "examples":
        dp["expected_batch_size"] = 4
    trainer(tmp_path, host={"dataloader_num_workers": 2, "max_steps": 3}, dp=dp).train()
    if sampling == "users":
        found = [drawn(recorded, number) for number in range(3)]
        assert [len(by_user) for by_user in found] == [NUM_USERS] * 3
        assert [sum(map(len, sizes)) for sizes in recorded.sizes] == [NUM_USERS] * 3
    else:
        found = [
            {str(text): [text] for texts in drawn(recorded, number).values() for text in texts}
            for number in range(3)
        ]
    assert not found[0] or close(recorded.sums[0], brute_force(bert(), found[0], norm=1.0))


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """A dataset that reads its rows one at a time."""

    def __init__(self) -> None:
        self.rows = rows("author")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])


class Watching:
    """A collator that remembers the names of what it sees."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, given: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        self.seen |= {name for row in given for name in row}
        return pad(given)


@pytest.mark.parametrize("sampling", ["users", "examples"])
@pytest.mark.parametrize("removing", [True, False])
@pytest.mark.parametrize("make", [lambda: table("author"), lambda: rows("author"), Texts])
def test_neither_collator_nor_model_sees_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, removing: bool, sampling: str
) -> None:
    inner = type(bert())
    forward, passed = inner.forward, set()

    def watched(
        self: nn.Module,
        input_ids: Any = None,
        attention_mask: Any = None,
        labels: Any = None,
        **more: Any,
    ) -> Any:
        passed.update(more)
        return forward(
            self, input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more
        )

    monkeypatch.setattr(inner, "forward", watched)
    collator = Watching()
    made = trainer(
        tmp_path,
        train_dataset=make(),
        data_collator=collator,
        coins=fixed(),
        host={"remove_unused_columns": removing, "max_steps": 1},
        dp={"user_column": "author", "user_sampling": sampling, "expected_batch_size": 6},
    )
    made.explain_engine(length=8)
    made.train()
    assert made.plan.sampler.unit == "user"
    assert collator.seen == {"input_ids", "attention_mask", "labels"}
    assert not {name for name in passed if "author" in name}


def test_a_collator_that_is_shown_the_users_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_dp.training import batches

    monkeypatch.setattr(batches, "without_column", lambda row, _: row)
    with pytest.raises(AssertionError):
        test_neither_collator_nor_model_sees_the_users(tmp_path, monkeypatch, Texts, False, "users")


@pytest.mark.slow
def test_users_may_be_given_beside_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(monkeypatch)
    ids = [row["user_id"] for row in rows()]
    for place, users in enumerate(
        (ids, tuple(ids), torch.tensor([hash(i) % 1000003 for i in ids]))
    ):
        made = trainer(
            tmp_path / str(place),
            train_dataset=table().remove_columns("user_id"),
            users=users,
            host={"max_steps": 1},
            dp={**EVERYBODY, "max_examples_per_user": 7},
        )
        made.train()
        assert close(recorded.sums[-1], brute_force(bert(), drawn(recorded, place), norm=1.0))


@pytest.mark.parametrize("by_place", [False, True])
def test_users_are_read_before_the_host_drops_their_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_place: bool
) -> None:
    """Hosts that tokenize keep only what their models take."""

    class Host(tf.Trainer):
        def __init__(
            self, model: Any = None, args: Any = None, train_dataset: Any = None, **kw: Any
        ):
            kept = train_dataset.select_columns(["input_ids", "attention_mask", "labels"])
            super().__init__(model, args, train_dataset=kept, **kw)

    class Made(DPTrainerMixin, Host):
        pass

    recorded = Recorded(monkeypatch)
    base = trainer(tmp_path / "base", host={"max_steps": 1}, dp=EVERYBODY)
    options = {"processing_class": base.processing_class, "dp_args": base.dp_args}
    given = (bert(), base.args, table())
    made = (
        Made(*given, **options)
        if by_place
        else Made(**dict(zip(("model", "args", "train_dataset"), given, strict=True)), **options)
    )
    assert "user_id" not in made.train_dataset.column_names
    made.train()
    assert close(recorded.sums[0], brute_force(bert(), drawn(recorded, 0), norm=1.0))


@pytest.mark.slow
def test_views_and_transforms_of_a_table_keep_their_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shuffled, in part, in another format, transformed on reading."""
    recorded = Recorded(monkeypatch)
    whole: Dataset = table().shuffle(seed=3)
    views = [
        whole.select(range(1, 21)),
        whole.with_format("torch", columns=["input_ids", "attention_mask", "labels"]),
        whole.with_transform(lambda rows: {k: v for k, v in rows.items() if k != "user_id"}),
        torch.utils.data.Subset(whole, list(range(20, 0, -1))),
    ]
    for place, view in enumerate(views):
        made = trainer(
            tmp_path / str(place),
            train_dataset=view,
            host={"max_steps": 1, "remove_unused_columns": False},
            dp={**EVERYBODY, "max_examples_per_user": 7},
            data_collator=lambda given: pad(
                [
                    {n: v.tolist() if isinstance(v, Tensor) else v for n, v in row.items()}
                    for row in given
                ]
            ),
        )
        made.train()
        assert close(recorded.sums[-1], brute_force(bert(), drawn(recorded, place), norm=1.0))
