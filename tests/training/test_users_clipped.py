"""Whole users are drawn: what a step sums, and what one user can change."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import user_runs
from tiny_runs import fixed, weights
from user_runs import (
    EVERYBODY,
    NUM_USERS,
    ONE,
    Recorded,
    bert,
    brute_force,
    close,
    drawn,
    most_of_anybody,
    rows,
    trainer,
)

from hf_dp.engines.owners import Owners
from hf_dp.sampling import Users, UserSampling
from hf_dp.training import mixin, rehearsal

# ---- what a step sums ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduction", "engine", "host", "more"),
    [
        ("mean", "auto", {"per_device_train_batch_size": 8}, {}),
        ("sum", "two_pass", {"per_device_train_batch_size": 8}, {}),
        ("mean", "auto", {"per_device_train_batch_size": 3}, {}),  # some users alone
        ("sum", "auto", {"per_device_train_batch_size": 1}, {}),  # every example by itself
        ("mean", "sequential", {"per_device_train_batch_size": 5}, {}),
        ("sum", "auto", {}, {"max_tokens_per_micro_batch": 40}),
    ],
)
def test_a_step_sums_each_users_gradient_clipped_once(
    tmp_path: Path,
    recorded: Recorded,
    reduction: str,
    engine: str,
    host: dict[str, Any],
    more: dict[str, Any],
) -> None:
    asked = {
        **EVERYBODY,
        "engine": engine,
        "user_reduction": reduction,
        "clipping_norm": 0.4,
        **more,
    }
    made = trainer(tmp_path, host={**ONE, **host}, dp={**asked, "max_examples_per_user": 4})
    made.train()
    found = drawn(recorded, 0)
    assert len(found) == len(recorded.norms[0]) == NUM_USERS
    whole = brute_force(bert(), found, norm=0.4, reduction=reduction)
    assert close(recorded.sums[0], whole)
    other = "sum" if reduction == "mean" else "mean"
    assert not close(whole, brute_force(bert(), found, norm=0.4, reduction=other), 1e-3)


def test_what_is_released_is_divided_by_the_expected_number_of_users(
    tmp_path: Path, recorded: Recorded
) -> None:
    dp = {"expected_batch_size": 5, "private_loss": False, "noise_multiplier": 1e-6}
    made = trainer(tmp_path, host={**ONE, "learning_rate": 1.0}, dp=dp, coins=fixed())
    before = weights(made.model)
    made.train()
    moved = before - weights(made.model)
    assert torch.allclose(5 * moved, recorded.sums[0], atol=1e-5)
    assert (
        not torch.allclose(len(recorded.norms[0]) * moved, recorded.sums[0], atol=1e-5)
        or len(recorded.norms[0]) == 5
    )


@pytest.mark.parametrize("most", [2, None])
def test_nobody_brings_more_than_the_bound_nor_one_line_twice(
    tmp_path: Path, recorded: Recorded, most: int | None
) -> None:
    dp = {"max_examples_per_user": most, "expected_batch_size": 5}
    trainer(tmp_path, host={"max_steps": 4}, dp=dp).train()
    for number in range(4):
        found = drawn(recorded, number)
        assert most_of_anybody(found) <= (most or 7)
        assert all(len(set(texts)) == len(texts) for texts in found.values())
    assert most_of_anybody(drawn(recorded, 0)) >= 1 or most_of_anybody(drawn(recorded, 1)) >= 1


def test_a_user_who_brings_more_would_be_seen(
    tmp_path: Path, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = Users.fresh
    monkeypatch.setattr(
        Users, "fresh", lambda self, user, most, coins: fresh(self, user, 2 * most, coins)
    )
    dp = {"max_examples_per_user": 2, **EVERYBODY}
    trainer(tmp_path, host=ONE, dp=dp).train()
    assert most_of_anybody(drawn(recorded, 0)) > 2


def test_examples_are_drawn_afresh_at_every_step(tmp_path: Path, recorded: Recorded) -> None:
    """The same 2 of Austen's 7 lines in 6 steps: once in 21^5 runs."""
    trainer(tmp_path, host={"max_steps": 6}, dp=EVERYBODY).train()
    seen = {frozenset(drawn(recorded, number)["Austen"]) for number in range(6)}
    assert len(seen) > 1


# ---- what one user can change -------------------------------------------------------------------


def regression(value: float, count: int) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Everybody rates their lines by a number; Melville has `count` lines rated `value`."""

    def rated(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = [
            {**row, "labels": 0.1 * len(row["input_ids"])}
            for row in given
            if row["user_id"] != "Melville"
        ]
        own = [row for row in given if row["user_id"] == "Melville"]
        return found + [{**own[i % len(own)], "labels": value} for i in range(count)]

    return rated


@pytest.mark.parametrize(
    ("value", "count", "size"),
    [
        (0.5, 4, 8),
        (0.5, 4, 2),
        (math.nan, 3, 8),
        (math.nan, 3, 2),
        (math.inf, 3, 8),
        (1e30, 4, 8),
        (3.0, 70, 8),
        (3.0, 70, 2),
    ],
)
def test_a_user_moves_the_sum_by_no_more_than_the_norm_and_nobody_elses_share(
    tmp_path: Path, recorded: Recorded, value: float, count: int, size: int
) -> None:
    """End to end, with and without Melville: ordinary, broken, huge, with ten times the bound."""
    norm = 100.0 if (value, count) == (0.5, 4) else 0.3  # large: nobody's share is clipped
    everybody = regression(value, count)(rows())
    others = [row for row in everybody if row["user_id"] != "Melville"]
    for place, data in enumerate((everybody, others)):
        trainer(
            tmp_path / str(place),
            model=bert(num_labels=1),
            train_dataset=data,
            host={**ONE, "per_device_train_batch_size": size},
            dp={
                "expected_batch_size": NUM_USERS - place,
                "private_loss": False,
                "clipping_norm": norm,
                "max_examples_per_user": 7,
            },
        ).train()
    with_user, without = recorded.sums
    assert torch.isfinite(with_user).all()
    moved = with_user - without
    assert float(moved.norm()) <= norm * (1 + 1e-4)
    if not math.isfinite(value):
        assert float(moved.norm()) < 1e-4
    elif norm == 100.0:
        own = [row for row in everybody if row["user_id"] == "Melville"]
        alone = user_runs.gradient(bert(num_labels=1), own, "mean")
        assert close(moved, user_runs.clipped(alone, norm), 1e-3)
    assert sorted(len(norms) for norms in recorded.norms) == [NUM_USERS - 1, NUM_USERS]


def test_a_share_that_depends_on_the_others_would_be_seen(
    tmp_path: Path, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses divided by the rows of the micro-batch instead of the user's own."""
    monkeypatch.setattr(
        Owners, "weighted", lambda self, losses: losses * self.num_units / len(losses)
    )
    with pytest.raises(AssertionError):
        test_a_user_moves_the_sum_by_no_more_than_the_norm_and_nobody_elses_share(
            tmp_path, recorded, 0.5, 4, 8
        )


def test_a_divisor_that_counts_who_came_would_be_seen(
    tmp_path: Path, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The realised number of users: then one user changes what everybody's share is divided by."""
    real = mixin.set_gradients
    monkeypatch.setattr(
        mixin,
        "set_gradients",
        lambda model, released, _: real(model, released, len(recorded.norms[-1])),
    )
    # All 8 users are there where 5 are expected: a draw that Poisson sampling makes, too.
    monkeypatch.setattr(UserSampling, "batches", lambda *_: iter([list(range(NUM_USERS))] * 20))
    with pytest.raises(AssertionError):
        test_what_is_released_is_divided_by_the_expected_number_of_users(tmp_path, recorded)


@pytest.mark.parametrize(
    ("dp", "expected"),
    [
        ({"user_reduction": "sum"}, Owners((2, 1, 1), "sum")),
        ({}, Owners((2, 1, 1), "mean")),
        ({"user_sampling": "examples"}, None),
    ],
)
def test_the_preflight_takes_out_what_the_plan_protects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dp: dict[str, Any], expected: Owners | None
) -> None:
    flown: list[Any] = []
    real = rehearsal.preflight

    def noted(*args: Any, **parts: Any) -> None:
        flown.append(parts["owners"])
        real(*args, **parts)

    monkeypatch.setattr(rehearsal, "preflight", noted)
    trainer(tmp_path, host=ONE, dp={"preflight": True, **dp}).train()
    assert flown == [expected]
