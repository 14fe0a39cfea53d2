"""Whole users are drawn: who comes, and what everybody is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import user_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import train_lines
from user_runs import (
    NUM_USERS,
    ONE,
    bert,
    pad,
    rows,
    tokenizer,
    trainer,
)

from hf_dp import DPArguments
from hf_dp.accounting import accountant_named, default_delta
from hf_dp.events import Gaussian, NeighboringRelation, PoissonSampled
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.sampling import PoissonSampling, UserSampling
from hf_dp.training import batches, ownership

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
