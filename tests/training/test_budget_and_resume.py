"""The budget, the ledger across runs, and resuming: nothing spent is ever forgotten."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import train_lines, trainer_for
from transformers import TrainerCallback

from hf_dp.accounting import accountant_named
from hf_dp.errors import (
    BudgetExhaustedError,
    ConfigurationError,
    LedgerCorruptError,
    LedgerMismatchError,
)
from hf_dp.events import NeighboringRelation
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.training import mixin

SAVING = {"save_strategy": "steps", "save_steps": 2}


class Crash(TrainerCallback):
    """Stands for a machine that fails right after a step, before the next save."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def releases(folder: Path) -> int:
    return read_ledger(folder / LEDGER_NAME).num_releases


def test_epsilon_in_the_log_is_the_accountants(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.train()
    step, delta = trainer.plan.step_event, trainer.state.log_history[-1]["delta"]
    assert delta == pytest.approx(40**-1.1)
    pld = accountant_named("pld")
    for count, line in enumerate(train_lines(trainer), start=1):
        exact = pld.guarantee(
            [step] * count, delta=delta, relation=NeighboringRelation.REPLACE_SPECIAL
        ).epsilon
        assert exact <= line["epsilon"] * (1 + 1e-9)
        assert line["epsilon"] <= exact * 1.02 + 0.01
    assert line["epsilon"] == pytest.approx(trainer.privacy_report().guarantee.epsilon, rel=1e-6)
    assert trainer.epsilon == line["epsilon"]


def test_a_run_with_a_target_uses_it_up_and_never_passes_it(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, dp={"target_epsilon": 3.0})
    trainer.train()
    report = trainer.privacy_report()
    assert trainer.state.global_step == 6
    assert 2.9 < report.guarantee.epsilon <= 3.0


@pytest.mark.parametrize("accumulation", [1, 4])
def test_accumulation_does_not_change_the_calibration(tmp_path: Path, accumulation: int) -> None:
    """Peer fault P4: dividing the steps by the accumulation left epsilon above its target."""
    trainer = trainer_for(
        tmp_path,
        host={
            "gradient_accumulation_steps": accumulation,
            "per_device_train_batch_size": 8 // accumulation,
        },
        dp={"target_epsilon": 3.0},
    )
    trainer.train()
    assert trainer.plan.expected_batch_size == 8
    assert releases(tmp_path) == trainer.state.global_step == 6
    assert trainer.privacy_report().guarantee.epsilon <= 3.0


def test_epochs_are_a_count_of_draws_and_batches_never_merge(tmp_path: Path) -> None:
    """Peer fault P3: draws merged at epoch ends. Seven epochs of five draws are 35 releases."""
    trainer = trainer_for(tmp_path, host={"max_steps": -1, "num_train_epochs": 7})
    trainer.train()
    assert trainer.plan.num_steps == trainer.state.global_step == releases(tmp_path) == 35


def test_resume_counts_what_the_ledger_holds(tmp_path: Path) -> None:
    """Crash after release 5, resume from step 4: two more steps are made, and seven releases counted."""
    crashed = trainer_for(tmp_path, host=SAVING, callbacks=[Crash(5)])
    with pytest.raises(KeyboardInterrupt):
        crashed.train()
    assert releases(tmp_path) == 5
    assert releases(tmp_path / "checkpoint-4") == 4

    resumed = trainer_for(tmp_path, host=SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert releases(tmp_path) == 7
    straight = trainer_for(tmp_path / "straight")
    straight.train()
    assert resumed.epsilon > straight.epsilon
    assert train_lines(resumed)[-1]["epsilon"] == resumed.epsilon


def test_a_resumed_run_with_a_target_stops_and_saves_before_it_is_passed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crashed = trainer_for(tmp_path, host=SAVING, dp={"target_epsilon": 3.0}, callbacks=[Crash(5)])
    with pytest.raises(KeyboardInterrupt):
        crashed.train()
    resumed = trainer_for(tmp_path, host={**SAVING, "save_steps": 100}, dp={"target_epsilon": 3.0})
    result = resumed.train(resume_from_checkpoint=True)
    assert releases(tmp_path) == 6  # 5 before the crash, one more, and the seventh would pass
    assert resumed.state.global_step == 5
    assert "one more release would pass epsilon" in caplog.text
    assert result.metrics["epsilon"] <= 3.0
    assert releases(tmp_path / "checkpoint-5") == 6

    again = trainer_for(tmp_path, host=SAVING, dp={"target_epsilon": 3.0})
    before = [p.detach().clone() for p in again.model.parameters()]
    again.train(resume_from_checkpoint=True)
    assert releases(tmp_path) == 6
    del before


def test_a_step_past_the_budget_raises_and_records_nothing(tmp_path: Path) -> None:
    """The hard guard behind the polite stop, for whoever drives training_step by hand."""
    from hf_dp.training.batches import LogicalBatch
    from hf_dp.training.spending import Spending

    trainer = trainer_for(tmp_path, dp={"target_epsilon": 3.0})
    trainer.train()
    trainer._spending = Spending.begin(
        trainer._make_claim(),
        output_dir=tmp_path,
        checkpoint=None,
        header=trainer._make_claim().header(trainer.coins, trainer.dp_args),
        known_run=trainer._run_id,
        continues=False,
        fresh_weights=False,
    )
    with pytest.raises(BudgetExhaustedError, match="room for one more"):
        trainer.training_step(trainer.model, LogicalBatch([]))
    trainer._spending.close()
    assert releases(tmp_path) == 6


def test_a_moved_checkpoint_brings_its_spending_along(tmp_path: Path) -> None:
    first = trainer_for(tmp_path / "a", host=SAVING)
    first.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-4", tmp_path / "elsewhere")
    moved = trainer_for(tmp_path / "b", host=SAVING)
    moved.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    assert releases(tmp_path / "b") == 6
    assert moved.epsilon == first.epsilon


def test_an_earlier_runs_ledger_is_neither_reused_nor_overwritten(tmp_path: Path) -> None:
    trainer_for(tmp_path).train()
    written = (tmp_path / LEDGER_NAME).read_bytes()
    with pytest.raises(LedgerMismatchError, match="earlier run"):
        trainer_for(tmp_path).train()
    assert (tmp_path / LEDGER_NAME).read_bytes() == written

    counted = trainer_for(tmp_path, dp={"ledger": "continue"})
    counted.train()
    assert releases(tmp_path) == 12


def test_a_second_train_on_the_same_trainer_goes_on_spending(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.train()
    once = trainer.epsilon
    trainer.train()
    assert releases(tmp_path) == 12
    assert trainer.epsilon > once


def test_a_second_train_on_a_spent_target_says_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = trainer_for(tmp_path, dp={"target_epsilon": 3.0})
    trainer.train()
    trainer.train()
    assert "stopping at step 0" in caplog.text
    assert "a new trainer with more steps or a larger target_epsilon" in caplog.text
    assert "single sample" not in caplog.text, "the host's, who knows of no budget"
    assert releases(tmp_path) == 6
    monkeypatch.setattr(mixin, "without_talk_of_no_examples", contextlib.nullcontext)
    trainer.train()
    assert "single sample" in caplog.text, "heard, were it said"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"dp": {"noise_multiplier": 2.0}}, "plan.noise"),
        ({"dp": {"clipping_norm": 0.5}}, "plan.clipping"),
        ({"dp": {"expected_batch_size": 10}}, "plan.expected_batch_size"),
        ({"dp": {"private_loss": False}}, "plan.loss_release"),
    ],
)
def test_a_resume_with_another_plan_is_refused(
    tmp_path: Path, changes: dict[str, Any], names: str
) -> None:
    trainer_for(tmp_path, host=SAVING).train()
    with pytest.raises(LedgerMismatchError, match=names):
        trainer_for(tmp_path, host=SAVING, **changes).train(resume_from_checkpoint=True)
    assert releases(tmp_path) == 6


def test_more_steps_of_the_same_plan_may_follow(tmp_path: Path) -> None:
    trainer_for(tmp_path, host=SAVING).train()
    longer = trainer_for(tmp_path, host={**SAVING, "max_steps": 8})
    longer.train(resume_from_checkpoint=True)
    assert releases(tmp_path) == longer.state.global_step == 8


def test_a_checkpoint_without_ledger_is_refused(tmp_path: Path) -> None:
    trainer_for(tmp_path, host=SAVING).train()
    (tmp_path / "checkpoint-4" / LEDGER_NAME).unlink()
    with pytest.raises(LedgerMismatchError, match="already spent"):
        trainer_for(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_foreign_ledger_is_refused(tmp_path: Path) -> None:
    trainer_for(tmp_path / "a", host=SAVING).train()
    trainer_for(tmp_path / "b", host=SAVING).train()
    with pytest.raises(LedgerMismatchError):
        trainer_for(tmp_path / "b").train(
            resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4")
        )


def test_an_edited_ledger_is_refused(tmp_path: Path) -> None:
    trainer_for(tmp_path, host=SAVING).train()
    path = tmp_path / LEDGER_NAME
    lines = path.read_text().splitlines()
    entry = json.loads(lines[2])
    entry["event"]["sampling_probability"] = 0.01
    lines[2] = json.dumps(entry)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(LedgerCorruptError, match="Line 3"):
        trainer_for(tmp_path, host=SAVING).train(resume_from_checkpoint=True)


def test_resume_skips_a_checkpoint_that_was_not_written_to_its_end(tmp_path: Path) -> None:
    trainer_for(tmp_path, host=SAVING).train()
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 1.')
    resumed = trainer_for(tmp_path, host=SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert releases(tmp_path) == 8  # from step 4 again: two more releases


def test_resume_without_a_checkpoint_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="There is none, nor any ledger"):
        trainer_for(tmp_path).train(resume_from_checkpoint=True)
    trainer_for(tmp_path).train()
    with pytest.raises(ConfigurationError, match=r"ended before it saved one.*continue"):
        trainer_for(tmp_path).train(resume_from_checkpoint=True)


def test_resumed_noise_and_draws_are_fresh(tmp_path: Path) -> None:
    """A crash and a resume re-run a step: with replayed coins both would release the same noise."""
    weights = []
    trainer_for(tmp_path, host={**SAVING, "save_steps": 5}).train()
    for name in "ab":
        shutil.copytree(tmp_path / "checkpoint-5", tmp_path / name / "checkpoint-5")
        resumed = trainer_for(tmp_path / name)
        resumed.train(resume_from_checkpoint=True)
        weights.append([p.detach().clone() for p in resumed.model.parameters()])
    assert all(not bool((a == b).all()) for a, b in zip(*weights, strict=True))


def test_evaluating_spends_nothing(tmp_path: Path) -> None:
    from tiny_runs import Sentences

    trainer = trainer_for(tmp_path, eval_dataset=Sentences(seed=1))
    trainer.train()
    spent = trainer.epsilon
    trainer.evaluate()
    trainer.predict(Sentences(seed=2))
    assert trainer.epsilon == spent
    assert releases(tmp_path) == 6


def test_the_fullest_copy_wins(tmp_path: Path) -> None:
    """Wherever the run goes on, no release that some copy within reach knows of is left out."""
    first = trainer_for(tmp_path / "a", host={**SAVING, "max_steps": 8})
    first.train()
    elsewhere = trainer_for(tmp_path / "b", host={**SAVING, "max_steps": 6})
    elsewhere.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert releases(tmp_path / "b") == 8 + 2

    (tmp_path / "a" / LEDGER_NAME).unlink()  # only the checkpoints' copies are left
    resumed = trainer_for(tmp_path / "a", host={**SAVING, "max_steps": 6})
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert releases(tmp_path / "a") == 8 + 2


def test_a_trainer_does_not_forget_its_first_train(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "a")
    trainer.train()
    trainer.args.output_dir = str(tmp_path / "b")
    with pytest.raises(LedgerMismatchError, match="earlier train"):
        trainer.train()
    shutil.rmtree(tmp_path / "a")
    trainer.args.output_dir = str(tmp_path / "a")
    with pytest.raises(LedgerMismatchError, match="earlier train"):
        trainer.train()
