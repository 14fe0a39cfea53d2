"""Whole users are drawn: in which micro-batches their examples stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import user_runs
from torch import Tensor, nn
from user_runs import (
    EVERYBODY,
    NUM_USERS,
    ONE,
    Recorded,
    bert,
    brute_force,
    close,
    drawn,
    pad,
    rows,
    trainer,
)

from hf_dp.training import batches, memory, packing


@pytest.mark.parametrize(
    ("size", "budget", "most"),
    [(4, None, 2), (4, None, None), (3, None, 3), (4, 30, None), (8, 200, 4)],
)
def test_no_user_is_in_two_micro_batches(
    tmp_path: Path, recorded: Recorded, size: int, budget: int | None, most: int | None
) -> None:
    dp = {**EVERYBODY, "max_examples_per_user": most, "max_tokens_per_micro_batch": budget}
    trainer(tmp_path, host={**ONE, "per_device_train_batch_size": size}, dp=dp).train()
    authors = user_runs.author_of()
    seen: list[str] = []
    for texts, sizes in zip(recorded.texts(0), recorded.sizes[0], strict=True):
        owners = [authors[text] for text in texts]
        runs = [owner for place, owner in enumerate(owners) if owner not in owners[:place]]
        assert [owners.count(owner) for owner in runs] == list(sizes)
        assert owners == [owner for owner in runs for _ in range(owners.count(owner))]
        most_rows = size if budget is None else budget // max(map(len, texts))
        assert len(runs) == 1 or len(texts) <= most_rows
        seen += runs
    assert sorted(seen) == sorted(user_runs.TEXTS)


def test_a_user_in_two_micro_batches_would_be_seen(
    tmp_path: Path, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece then is clipped by itself, and the user counts twice."""

    def torn(examples: Any) -> list[Any]:
        whole = _users(examples)
        return [piece for rows in whole for piece in (rows[:1], rows[1:]) if piece]

    _users = packing._users
    monkeypatch.setattr(packing, "_users", torn)
    trainer(tmp_path, host=ONE, dp={**EVERYBODY, "max_examples_per_user": 4}).train()
    found = drawn(recorded, 0)
    assert not close(recorded.sums[0], brute_force(bert(), found, norm=1.0), 1e-3)


def test_users_of_like_size_and_length_stand_together() -> None:
    collator = packing.UserCollator(pad, 100, "input_ids")
    draw = batches.Draw(rows())
    draw.sizes = (3, 1, 4, 1, 5, 2, 3, 1, 2)
    (owned,) = collator(draw).owned or ()
    assert owned.owners.sizes == (5, 4, 3, 3, 2, 2, 1, 1, 1)
    one_each = batches.Draw(rows())
    one_each.sizes = (1,) * len(one_each)
    (batch,) = collator(one_each).micro_batches
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("fits", [1, 2, 5])
def test_where_memory_ends_users_stay_whole_and_the_sum_is_the_same(
    tmp_path: Path, recorded: Recorded, monkeypatch: pytest.MonkeyPatch, fits: int
) -> None:
    """A model that takes so many rows at once: users are halved among, then taken alone."""
    inner = type(bert().bert)
    forward = inner.forward

    def small(self: nn.Module, input_ids: Tensor, *args: Any, **inputs: Any) -> Any:
        if len(input_ids) > fits and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, input_ids, *args, **inputs)

    monkeypatch.setattr(inner, "forward", small)
    dp = {**EVERYBODY, "max_examples_per_user": 4}
    made = trainer(tmp_path, host={**ONE, "per_device_train_batch_size": 16}, dp=dp)
    made.train()
    monkeypatch.undo()
    assert close(recorded.sums[0], brute_force(bert(), drawn(recorded, 0), norm=1.0))
    assert len(recorded.norms[0]) == NUM_USERS


def test_a_part_of_a_user_left_out_would_be_seen(
    tmp_path: Path, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = memory._together

    def cut(sizes: Any, most: int) -> Any:
        yield from (tuple(min(size, most) for size in together) for together in real(sizes, most))

    monkeypatch.setattr(memory, "_together", cut)
    with pytest.raises(AssertionError):
        test_where_memory_ends_users_stay_whole_and_the_sum_is_the_same(
            tmp_path, recorded, monkeypatch, 2
        )
