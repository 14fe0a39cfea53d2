"""Training with every sampler: what is drawn is what is accounted for, through crashes and resumes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sampler_runs import EVENTS, NOISE, PASS, PASSES, SAVING, Crash, Watched, dp, written
from tiny_runs import NUM_EXAMPLES, Sentences, train_lines, trainer_for
from torch import Tensor

from hf_dp import DPTrainer, PrivacyPlan
from hf_dp.accounting import accountant_named
from hf_dp.clipping import FlatClipping
from hf_dp.errors import (
    PrivacyError,
)
from hf_dp.events import (
    BallsInBins,
    Continued,
    Gaussian,
    NeighboringRelation,
    SelfComposed,
)
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.noise import GaussianNoise
from hf_dp.sampling import BallsInBinsSampling
from hf_dp.training.arguments import SAMPLINGS

SPECIAL, ONE = NeighboringRelation.REPLACE_SPECIAL, NeighboringRelation.REPLACE_ONE


def test_every_sampling_is_tried_here() -> None:
    assert set(EVENTS) == set(SAMPLINGS)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_run_is_accounted_as_its_sampler_draws(tmp_path: Path, sampling: str) -> None:
    """Seven steps: two passes of five, the second unfinished, or seven draws."""
    trainer = trainer_for(tmp_path, dp=dp(sampling), host={"max_steps": 7}, cls=Watched)
    trainer.train()
    event = EVENTS[sampling]
    count = 2 if sampling in PASSES else 7
    assert written(tmp_path) == {event: count}
    assert trainer.plan.expected_batch_size == 8
    report = trainer.privacy_report()
    assert report.num_releases == trainer.state.global_step == 7
    relation = ONE if sampling == "fixed_size" else SPECIAL
    assert report.guarantee.relation is trainer.plan.relation is relation
    exact = accountant_named("pld").guarantee(
        SelfComposed(event, count), delta=report.guarantee.delta, relation=relation
    )
    assert report.guarantee.epsilon == exact.epsilon
    assert trainer.epsilon == pytest.approx(exact.epsilon, rel=1e-3)
    assert trainer.epsilon >= exact.epsilon * (1 - 1e-9)
    assert "loss" in train_lines(trainer)[0]
    sizes = [len(rows) for rows in trainer.seen]
    if sampling in ("shuffled", "fixed_size"):
        assert sizes == [8] * 7
    else:
        assert len(set(sizes)) > 1  # equal with a chance below 1e-5


@pytest.mark.parametrize("sampling", PASSES)
def test_each_epoch_is_a_pass_over_the_data(tmp_path: Path, sampling: str) -> None:
    trainer = trainer_for(
        tmp_path, dp=dp(sampling), host={"max_steps": -1, "num_train_epochs": 3}, cls=Watched
    )
    trainer.train()
    assert trainer.state.global_step == 3 * PASS
    everybody = Counter(tuple(row["input_ids"]) for row in Sentences().rows)
    orders = []
    for epoch in range(3):
        steps = trainer.seen[epoch * PASS : (epoch + 1) * PASS]
        assert Counter(row for rows in steps for row in rows) == everybody
        orders.append([sorted(rows) for rows in steps])
    assert orders[0] != orders[1] != orders[2]
    runs = read_ledger(tmp_path / LEDGER_NAME).releases
    event = EVENTS[sampling]
    assert runs == (SelfComposed(event, 1), SelfComposed(Continued(event), PASS - 1)) * 3
    epsilons = [line["epsilon"] for line in train_lines(trainer)]
    assert len(set(epsilons)) == 3
    assert epsilons == sorted(epsilons)


@pytest.mark.parametrize("sampling", PASSES)
def test_an_abandoned_pass_stays_counted_and_a_new_one_begins(
    tmp_path: Path, sampling: str
) -> None:
    """Crash after step 3, resume from step 2: the pass of steps 0 to 2, then 2 to 4, then 5 to 9."""
    options: dict[str, Any] = {"dp": dp(sampling), "host": {**SAVING, "max_steps": 10}}
    with pytest.raises(KeyboardInterrupt):
        trainer_for(tmp_path, callbacks=[Crash(3)], **options).train()
    assert written(tmp_path) == {EVENTS[sampling]: 1}
    resumed = trainer_for(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 10
    assert written(tmp_path) == {EVENTS[sampling]: 3}
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 3 + 8
    exact = resumed.privacy_report().guarantee.epsilon
    assert exact <= resumed.epsilon * (1 + 1e-9) <= exact * 1.01


@pytest.mark.parametrize("sampling", PASSES)
def test_a_budget_for_two_passes_stops_before_a_third(
    tmp_path: Path, sampling: str, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {
        "dp": {"sampling": sampling, "target_epsilon": 3.0},
        "host": {**SAVING, "max_steps": 10},
    }
    with pytest.raises(KeyboardInterrupt):
        trainer_for(tmp_path, callbacks=[Crash(3)], **options).train()
    resumed = trainer_for(tmp_path, **options)
    result = resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == PASS  # the rest of the second pass is paid for
    assert "one more release would pass epsilon" in caplog.text
    assert 2.9 < result.metrics["epsilon"] <= 3.0
    assert sum(written(tmp_path).values()) == 2


@pytest.mark.parametrize("sampling", PASSES)
def test_a_budget_is_not_spent_before_the_last_planned_step(tmp_path: Path, sampling: str) -> None:
    trainer = trainer_for(
        tmp_path, dp={"sampling": sampling, "target_epsilon": 3.0}, host={"max_steps": 7}
    )
    trainer.train()
    assert trainer.state.global_step == 7
    assert 2.99 < trainer.privacy_report().guarantee.epsilon <= 3.0


@pytest.mark.parametrize("sampling", ["balls_in_bins", "poisson"])
def test_a_draw_is_released_once(tmp_path: Path, sampling: str) -> None:
    class Twice(DPTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Tensor:
            super().training_step(model, inputs, *args)
            return super().training_step(model, inputs, *args)

    trainer = trainer_for(tmp_path, dp=dp(sampling), cls=Twice)
    with pytest.raises(PrivacyError, match="expected a draw after"):
        trainer.train()
    assert written(tmp_path) == {EVENTS[sampling]: 1}


def test_a_batch_from_elsewhere_counts_as_a_pass_of_its_own(tmp_path: Path) -> None:
    from hf_dp.training.batches import LogicalBatch

    class Foreign(DPTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Tensor:
            return super().training_step(model, LogicalBatch(inputs.micro_batches), *args)

    trainer = trainer_for(tmp_path, dp={"sampling": "shuffled", "target_epsilon": 3.0}, cls=Foreign)
    trainer.train()
    assert trainer.state.global_step == sum(written(tmp_path).values()) == 2


@pytest.mark.slow
def test_workers_hand_on_which_draw_a_batch_is(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path,
        dp=dp("balls_in_bins"),
        host={"max_steps": 7, "dataloader_num_workers": 2},
    )
    trainer.train()
    assert written(tmp_path) == {EVENTS["balls_in_bins"]: 2}


def test_batches_may_be_empty(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path, dp=dp("balls_in_bins", expected_batch_size=2), host={"max_steps": 20}, cls=Watched
    )
    trainer.train()  # with 20 bins a pass has an empty one with a chance of 93%
    assert trainer.state.global_step == len(trainer.seen) == 20
    assert sum(map(len, trainer.seen)) == NUM_EXAMPLES


@pytest.mark.parametrize(("size", "batches"), [(9, 4), (12, 3), (40, 1), (15, 3), (3, 13)])
def test_the_number_of_batches_is_rounded(tmp_path: Path, size: int, batches: int) -> None:
    trainer = trainer_for(
        tmp_path,
        dp=dp("balls_in_bins", expected_batch_size=size),
        host={"max_steps": -1, "num_train_epochs": 2},
    )
    assert trainer.plan.sampler == BallsInBinsSampling(batches)
    assert trainer.plan.num_steps == 2 * batches
    assert trainer.plan.expected_batch_size == size


def test_a_given_plan_sets_the_length_of_an_epoch(tmp_path: Path) -> None:
    plan = PrivacyPlan(
        sampler=BallsInBinsSampling(3),
        clipping=FlatClipping(1.0),
        noise=GaussianNoise(NOISE),
        num_steps=6,
        expected_batch_size=13.0,
    )
    trainer = trainer_for(tmp_path, plan=plan, host={"max_steps": -1, "num_train_epochs": 2})
    trainer.train()
    assert written(tmp_path) == {BallsInBins(3, Gaussian(NOISE)): 2}
