"""Whole users are drawn: what a step sums, what one user can change, and what everybody is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import user_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import train_lines, weights
from torch import Tensor, nn
from user_runs import (
    EVERYBODY,
    NUM_USERS,
    Recorded,
    bert,
    brute_force,
    close,
    drawn,
    most_of_anybody,
    pad,
    rows,
    tokenizer,
    trainer,
)

from hf_dp import DPArguments
from hf_dp.accounting import accountant_named, default_delta
from hf_dp.engines.owners import Owners
from hf_dp.events import Gaussian, NeighboringRelation, PoissonSampled
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.sampling import PoissonSampling, Users, UserSampling
from hf_dp.training import batches, memory, mixin, ownership, packing, rehearsal

ONE = {"max_steps": 1}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(monkeypatch)


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
    made = trainer(tmp_path, host={**ONE, "learning_rate": 1.0}, dp=dp)
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


# ---- micro-batches ------------------------------------------------------------------------------


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


# ---- who is drawn -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.statistical
def test_a_user_with_many_examples_is_drawn_as_often_as_one_with_one(tmp_path: Path) -> None:
    """2000 draws by the trainer's own loader: false alarm once in 10^6 (5.2 deviations of 8 counts)."""
    made = trainer(tmp_path, host={"max_steps": 2000}, dp={"expected_batch_size": 2})
    authors = [row["user_id"] for row in rows()]
    counts = dict.fromkeys(user_runs.TEXTS, 0)
    sampler = made.get_train_dataloader().batch_sampler
    number = 0
    while number < 2000:
        for draw in sampler:
            number += 1
            for author in {authors[index] for index in draw}:
                counts[author] += 1
    deviation = math.sqrt(number * 0.25 * 0.75)
    assert all(abs(count - number / 4) < 5.2 * deviation for count in counts.values())


def test_a_draw_of_examples_would_be_seen_in_who_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has more examples then comes more often."""

    def by_examples(self: Any, drawn_users: list[int]) -> batches.Draw:
        coins = self.coins.bits(self.users.num_examples) < 2**64 // 12
        found = batches.Draw(index for index, heads in enumerate(coins) if heads)
        found.sizes = (1,) * len(found)
        return found

    monkeypatch.setattr(ownership.WholeUsers, "__call__", by_examples)
    with pytest.raises(AssertionError):
        test_a_user_with_many_examples_is_drawn_as_often_as_one_with_one(tmp_path)


# ---- what everybody is told ---------------------------------------------------------------------


def test_epsilon_is_that_of_sampled_users_in_logs_ledger_and_report(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        host={"max_steps": 5, "report_to": ["tensorboard"]},
        dp={"noise_multiplier": 2.0, "preflight": True},
    )
    made.train()
    assert made.plan.sampler == UserSampling(PoissonSampling(0.5))
    assert made.plan.expected_batch_size == 4.0  # 4 x 2 examples, two of each user
    release = PoissonSampled(0.5, Gaussian(2.0))
    delta = default_delta(NUM_USERS)
    expected = accountant_named("pld").guarantee(
        [release] * 5, delta=delta, relation=NeighboringRelation.REPLACE_SPECIAL
    )
    assert train_lines(made)[-1]["epsilon"] == pytest.approx(expected.epsilon)
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    scalars = EventAccumulator(str(events.parent)).Reload()
    assert scalars.Scalars("train/epsilon")[-1].value == pytest.approx(expected.epsilon, rel=1e-6)

    record = read_ledger(tmp_path / LEDGER_NAME)
    assert (record.header["unit"], record.header["population_size"]) == ("user", NUM_USERS)
    assert record.header["users"] == {
        "sampling": "users",
        "max_examples_per_user": 2,
        "reduction": "mean",
    }
    report = made.privacy_report()
    assert report.guarantee.epsilon == pytest.approx(expected.epsilon)
    text = str(report)
    assert "per user" in text
    assert "replace one user by one that contributes nothing" in text
    assert "over 8 users" in text
    assert "at most 2 fresh examples" in text
    assert "ids are trusted" in text
    assert "UserSampling(users=PoissonSampling(sampling_probability=0.5))" in text
    assert report.by_examples_of_a_user() == {}
    assert report.to_json()["sampling_probability"] == 0.5
    assert report.to_json()["unit"] == "user"
    json.dumps(report.to_json(), allow_nan=False)
    made.create_model_card()
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "for each user" in card
    assert "8 users" in card


def test_neither_log_nor_host_tells_how_many_examples_there_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(tmp_path, dp={"expected_batch_size": 3})
    with caplog.at_level("INFO"):
        made.train()
    assert made.num_examples(made.get_train_dataloader()) == NUM_USERS
    assert made.get_total_train_batch_size(made.args) == 3
    shown = caplog.text + str(made.state.log_history) + str(made.privacy_report())
    assert not any(str(word) in shown for word in user_runs.TEXTS)


def test_the_private_loss_is_a_mean_over_users(tmp_path: Path) -> None:
    """With next to no noise the released loss is that of everybody's mean loss."""
    made = trainer(
        tmp_path,
        model=bert(initializer_range=0.5),
        host=ONE,
        dp={
            "expected_batch_size": NUM_USERS,
            "noise_multiplier": 1e-5,
            "max_examples_per_user": 7,
            "loss_ceiling": 10.0,
        },
    )
    made.train()
    model, by_user = bert(initializer_range=0.5), {}
    for row in rows():
        by_user.setdefault(row["user_id"], []).append(model(**pad([row])).loss.item())
    means = [sum(losses) / len(losses) for losses in by_user.values()]
    assert train_lines(made)[0]["loss"] == pytest.approx(sum(means) / NUM_USERS, rel=1e-3)
    assert sum(means) / NUM_USERS != pytest.approx(
        sum(sum(v) for v in by_user.values()) / len(rows()), rel=3e-3
    )


def test_exact_metrics_tell_how_many_users_were_cut_only_where_asked_for(tmp_path: Path) -> None:
    made = trainer(tmp_path / "a", dp={"nonprivate_metrics": True, "expected_batch_size": 5})
    made.train()
    assert train_lines(made)[-1]["nonprivate/users_cut"] == 3
    silent = trainer(tmp_path / "b")
    silent.train()
    assert "nonprivate/users_cut" not in str(silent.state.log_history)


def test_a_target_is_kept_by_noise_for_users(tmp_path: Path) -> None:
    made = trainer(tmp_path, dp={"target_epsilon": 2.0}, host={"max_steps": 4})
    made.train()
    assert 1.9 < made.epsilon <= 2.0
    assert DPArguments(noise_multiplier=1.0).delta_for(NUM_USERS) == default_delta(NUM_USERS)
    assert made.privacy_report().guarantee.delta == default_delta(NUM_USERS)


def test_evaluation_prediction_and_explanation_are_as_always(tmp_path: Path) -> None:
    held_out = [{k: v for k, v in row.items() if k != "user_id"} for row in rows()[:6]]
    made = trainer(tmp_path, eval_dataset=held_out)
    assert "epsilon" not in made.evaluate()
    assert len(made.predict(held_out).predictions) == 6
    assert "LoRA" not in str(made.explain_engine(length=8))
    assert tokenizer().pad_token_id == 0


def test_large_users_are_announced_once_and_by_public_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(
        tmp_path / "a",
        host={"per_device_train_batch_size": 2},
        dp={"max_examples_per_user": 4, "expected_batch_size": 2},
    ).train()
    assert caplog.text.count("taken alone, one after the other") == 1
    caplog.clear()
    trainer(tmp_path / "b").train()
    assert "taken alone" not in caplog.text
