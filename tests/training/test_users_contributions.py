"""Examples of users are drawn, of each no more than the bound: who stays, what it costs, what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import user_runs
from tiny_runs import train_lines
from user_runs import (
    NUM_USERS,
    Recorded,
    bert,
    close,
    drawn,
    most_of_anybody,
    rows,
    trainer,
)

from hf_dp.accounting import accountant_named, default_delta
from hf_dp.events import (
    Gaussian,
    NeighboringRelation,
    PoissonSampled,
    PoissonSampledContributions,
)
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.reports.of_users import fewer_than
from hf_dp.sampling import ContributionSampling, Users

KEPT = sum(min(len(lines), 2) for lines in user_runs.TEXTS.values())  # 14 of 22


def dp(**options: Any) -> dict[str, Any]:
    return {"user_sampling": "examples", "expected_batch_size": 6, **options}


@pytest.mark.parametrize("selection", ["random", "longest", "first"])
def test_no_more_than_the_bound_of_anybody_is_seen_in_the_whole_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, selection: str
) -> None:
    """In twelve steps, at 6 of the 14 that are kept in each, almost all of them come up."""
    recorded = Recorded(monkeypatch)
    asked = dp(user_selection=selection, noise_multiplier=3.0)
    made = trainer(tmp_path, host={"max_steps": 12}, dp=asked)
    made.train()
    assert all(sizes == [] for sizes in recorded.sizes)  # clipped example by example
    seen: dict[str, set[Any]] = {}
    for number in range(12):
        for author, texts in drawn(recorded, number).items():
            assert len(set(texts)) == len(texts)
            seen.setdefault(author, set()).update(texts)
    assert most_of_anybody({author: list(texts) for author, texts in seen.items()}) <= 2
    for author, texts in seen.items():
        own = [tuple(row["input_ids"]) for row in rows() if row["user_id"] == author]
        if selection == "first":
            assert texts <= set(own[:2])
        if selection == "longest":
            assert texts <= set(sorted(own, key=len, reverse=True)[:2])


def test_an_example_beyond_the_bound_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = np.arange(len(rows()))
    monkeypatch.setattr(Users, "bounded", lambda *_, **__: everything)
    monkeypatch.setattr(Users, "num_kept", lambda *_: len(everything))
    with pytest.raises(AssertionError):
        test_no_more_than_the_bound_of_anybody_is_seen_in_the_whole_training(
            tmp_path, monkeypatch, "random"
        )


def test_each_example_is_clipped_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch)
    asked = dp(expected_batch_size=KEPT, private_loss=False, clipping_norm=0.4)
    trainer(tmp_path, host={"max_steps": 1}, dp=asked).train()
    found = drawn(recorded, 0)
    assert sum(map(len, found.values())) == len(recorded.norms[0]) == KEPT
    one_each = {str(text): [text] for texts in found.values() for text in texts}
    assert close(recorded.sums[0], user_runs.brute_force(bert(), one_each, norm=0.4))
    assert not close(recorded.sums[0], user_runs.brute_force(bert(), found, norm=0.4), 1e-2)


def test_epsilon_counts_how_often_a_user_may_be_in_a_batch(tmp_path: Path) -> None:
    made = trainer(tmp_path, host={"max_steps": 3}, dp=dp(noise_multiplier=4.0))
    made.train()
    release = PoissonSampledContributions(6 / KEPT, 2, Gaussian(4.0))
    assert made.plan.sampler == ContributionSampling(6 / KEPT, 2)
    record = read_ledger(tmp_path / LEDGER_NAME)
    assert {run.event for run in record.releases} == {release}

    def epsilon(event: Any) -> float:
        return (
            accountant_named("pld")
            .guarantee(
                [event] * 3,
                delta=default_delta(NUM_USERS),
                relation=NeighboringRelation.REPLACE_SPECIAL,
            )
            .epsilon
        )

    assert train_lines(made)[-1]["epsilon"] == pytest.approx(epsilon(release), rel=1e-6)
    assert epsilon(release) > 1.5 * epsilon(PoissonSampled(6 / KEPT, Gaussian(4.0)))

    assert record.header["population_size"] == NUM_USERS
    assert record.header["users"] == {
        "sampling": "examples",
        "max_examples_per_user": 2,
        "selection": "random",
        "kept_examples": KEPT,
    }
    report = made.privacy_report()
    text = str(report)
    assert "the numbers of users and of kept examples are public" in text
    assert "at most 2 examples of each are kept (random), 14 in all" in text
    assert "over 8 users" in text
    assert report.to_json()["users"]["kept_examples"] == KEPT
    json.dumps(report.to_json(), allow_nan=False)
    own = report.by_examples_of_a_user()
    assert own.keys() == {1}
    assert own[1].epsilon == pytest.approx(epsilon(PoissonSampled(6 / KEPT, Gaussian(4.0))))
    assert "a user with at most 1 of the examples: epsilon <= " in text


def test_a_target_is_kept_by_noise_for_all_of_a_users_examples(tmp_path: Path) -> None:
    made = trainer(tmp_path, dp=dp(target_epsilon=2.0))
    made.train()
    assert 1.9 < made.epsilon <= 2.0
    alone = trainer(tmp_path / "one", dp=dp(target_epsilon=2.0, max_examples_per_user=1))
    assert made.plan.noise.noise_multiplier > alone.plan.noise.noise_multiplier


def test_the_loss_is_a_mean_over_examples_and_the_divisor_counts_them(tmp_path: Path) -> None:
    made = trainer(tmp_path, dp=dp())
    assert made.plan.expected_batch_size == 6
    assert made.plan.sampler.sampling_probability == 6 / KEPT
    assert made.num_examples(made.get_train_dataloader()) == KEPT
    made.train()
    assert all("loss" in line for line in train_lines(made))


def test_what_is_kept_stays_within_a_run_and_is_chosen_anew_by_the_next(tmp_path: Path) -> None:
    """Eight users keep 2 of their lines: the same choice once in about 4,000 runs of 12 loaders."""
    made = trainer(tmp_path, dp=dp(expected_batch_size=KEPT))
    kept = [tuple(next(iter(made.get_train_dataloader().batch_sampler))) for _ in range(12)]
    assert len(set(kept)) > 1
    loader = made.get_train_dataloader().batch_sampler
    assert len({tuple(draw) for _ in range(4) for draw in loader}) == 1


def test_smaller_bounds_are_powers_of_two() -> None:
    assert list(fewer_than(8)) == [1, 2, 4]
    assert list(fewer_than(9)) == [1, 2, 4, 8]
    assert list(fewer_than(1)) == []
