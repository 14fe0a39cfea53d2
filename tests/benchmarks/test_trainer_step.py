"""The benchmark of a whole step counts what it says, and leaves the library as it was."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks import trainer_step
from benchmarks.trainer_step import Clock, measure, parts_of_a_step, tiny_cases


def test_the_first_step_of_a_turn_is_not_counted() -> None:
    clock = Clock()
    clock.ends = [(10.0, 1.0), (12.0, 1.5), (16.0, 3.0)]
    clock.examples = [1000, 4, 8]
    assert clock.per_example() == pytest.approx((0.5, 2 / 12))
    assert clock.ends == clock.examples == []


def test_parts_are_timed_and_put_back() -> None:
    from hf_dp.noise import GaussianNoise
    from hf_dp.training import mixin

    before = GaussianNoise.release, mixin.clipped_sum_of
    spent: Counter[str] = Counter()
    with parts_of_a_step(spent):
        assert GaussianNoise.release is not before[0]
        with pytest.raises(TypeError):
            mixin.clipped_sum_of()
    assert (GaussianNoise.release, mixin.clipped_sum_of) == before
    assert set(spent) == {"clipped sum"}


def test_every_trainer_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_step, "ACCUMULATION", 1)
    cases, data, collator = tiny_cases()
    rows = measure("tiny", cases["tiny"], data, collator, rounds=1, steps=2)
    *trainers, shares = rows
    names = ["Trainer", "DPTrainer", "DPTrainer, token budget"]
    assert [row["trainer"] for row in trainers] == names
    assert trainers[0]["wall"] == trainers[0]["cpu"] == 1
    assert all(row["wall_ms_per_example"] > 0 for row in trainers)
    assert sum(shares["share_of_a_private_step"].values()) == pytest.approx(1)
    assert {"ledger", "noise", "optimizer"} <= set(shares["share_of_a_private_step"])
