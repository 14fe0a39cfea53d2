"""Runs that protect users with every sampler, and what they may be taken up again with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sampler_runs import SAVING, Crash
from user_runs import (
    NUM_USERS,
    Recorded,
    drawn,
    rows,
    trainer,
)

from hf_dp.errors import LedgerMismatchError
from hf_dp.events import (
    BallsInBins,
    Continued,
    Gaussian,
    PoissonSampled,
    SampledWithoutReplacement,
    Shuffled,
    TruncatedPoissonSampled,
)
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.sampling import UserSampling

EVENTS = {
    "poisson": PoissonSampled(0.5, Gaussian(2.0)),
    "truncated_poisson": TruncatedPoissonSampled(NUM_USERS, 0.5, 6, Gaussian(2.0)),
    "balls_in_bins": BallsInBins(2, Gaussian(2.0)),
    "shuffled": Shuffled(2, Gaussian(2.0)),
    "fixed_size": SampledWithoutReplacement(NUM_USERS, 4, Gaussian(2.0)),
}


@pytest.mark.parametrize("sampling", EVENTS)
def test_every_sampler_draws_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: str
) -> None:
    recorded = Recorded(monkeypatch)
    cap = {"max_batch_size": 6} if sampling == "truncated_poisson" else {}
    dp = {"sampling": sampling, "noise_multiplier": 2.0, **cap}
    made = trainer(tmp_path, host={"max_steps": 4}, dp=dp)
    made.train()
    assert isinstance(made.plan.sampler, UserSampling)
    whole = EVENTS[sampling]
    later = Continued(whole) if made.plan.pass_length == 2 else whole
    written = [
        r.event for r in read_ledger(tmp_path / LEDGER_NAME).releases for _ in range(r.count)
    ]
    assert written == [whole, later, whole, later]
    users = [drawn(recorded, number).keys() for number in range(4)]
    if sampling == "fixed_size":
        assert [len(found) for found in users] == [4] * 4
    if made.plan.pass_length == 2:  # everybody once in each pass
        for first, second in (users[:2], users[2:]):
            assert not first & second
            assert len(first | second) == NUM_USERS
    assert f"over {NUM_USERS} users" in str(made.privacy_report())


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["users", "examples"])
def test_a_resumed_run_goes_on_with_what_was_spent(tmp_path: Path, sampling: str) -> None:
    options = {
        "dp": {"noise_multiplier": 2.0, "user_sampling": sampling, "expected_batch_size": 3},
        "host": {**SAVING, "max_steps": 6},
    }
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[Crash(3)], **options).train()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    record = read_ledger(tmp_path / LEDGER_NAME)
    assert record.num_releases == 7  # the third step was made twice
    whole = trainer(tmp_path / "whole", **{**options, "host": {"max_steps": 7}})
    whole.train()
    assert resumed.epsilon == pytest.approx(whole.epsilon)
    assert resumed.privacy_report().guarantee.epsilon == pytest.approx(whole.epsilon)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"max_examples_per_user": 3}, "users"),
        ({"user_reduction": "sum"}, "users"),
        ({"user_sampling": "examples"}, "users|step_event|sampler|expected"),
        ({"privacy_unit": "example", "max_examples_per_user": None}, "unit"),
        ({"expected_batch_size": 4}, "plan"),
    ],
)
def test_a_run_is_not_resumed_under_other_options(
    tmp_path: Path, changed: dict[str, Any], match: str
) -> None:
    host = {**SAVING, "max_steps": 2}
    trainer(tmp_path, host=host, dp={"expected_batch_size": 3}).train()
    other = trainer(
        tmp_path, host={**host, "max_steps": 4}, dp={"expected_batch_size": 3, **changed}
    )
    with pytest.raises(LedgerMismatchError, match=match):
        other.train(resume_from_checkpoint=True)
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 2


def test_a_run_is_not_resumed_with_another_number_of_users(tmp_path: Path) -> None:
    host = {**SAVING, "max_steps": 2}
    dp = {"expected_batch_size": 3, "target_delta": 0.01}
    trainer(tmp_path, host=host, dp=dp).train()
    fewer = [row for row in rows() if row["user_id"] != "Poe"]
    other = trainer(tmp_path, host={**host, "max_steps": 4}, dp=dp, train_dataset=fewer)
    with pytest.raises(LedgerMismatchError, match="population_size"):
        other.train(resume_from_checkpoint=True)


def test_contributions_of_another_number_of_kept_examples_are_not_resumed(tmp_path: Path) -> None:
    host = {**SAVING, "max_steps": 2}
    dp = {"user_sampling": "examples", "expected_batch_size": 3}
    trainer(tmp_path, host=host, dp=dp).train()
    given = rows()
    given[-1]["user_id"] = "Poe"  # who had a single line
    other = trainer(tmp_path, host={**host, "max_steps": 4}, dp=dp, train_dataset=given)
    with pytest.raises(LedgerMismatchError, match="users"):
        other.train(resume_from_checkpoint=True)
