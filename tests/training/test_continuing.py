"""What a run may continue, and what it refuses to overwrite or to misstate."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import trainer_for
from transformers import TrainerCallback

from hf_dp.errors import ConfigurationError, LedgerMismatchError
from hf_dp.events import Gaussian, PoissonSampled
from hf_dp.ledger import LEDGER_NAME, Ledger, read_ledger

SAVING = {"save_strategy": "steps", "save_steps": 2}


def releases(folder: Path) -> int:
    return read_ledger(folder / LEDGER_NAME).num_releases


class FailAt(TrainerCallback):
    """Fails when a step begins, before anything of it is released."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("out of memory")


def test_a_run_that_failed_before_its_first_release_leaves_nothing_in_the_way(
    tmp_path: Path,
) -> None:
    with pytest.raises(RuntimeError, match="memory"):
        trainer_for(tmp_path, callbacks=[FailAt(0)]).train()
    assert releases(tmp_path) == 0
    other_plan = trainer_for(tmp_path, dp={"noise_multiplier": 2.0})
    other_plan.train()
    assert releases(tmp_path) == 6
    assert other_plan.privacy_report().to_json()["noise_multiplier"] == 2.0


def test_one_release_is_enough_to_be_kept(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="memory"):
        trainer_for(tmp_path, callbacks=[FailAt(1)]).train()
    with pytest.raises(LedgerMismatchError, match="earlier run"):
        trainer_for(tmp_path).train()
    assert releases(tmp_path) == 1


def test_an_empty_ledger_in_use_is_not_removed(tmp_path: Path) -> None:
    from hf_dp.errors import LedgerInUseError

    with Ledger.create(tmp_path / LEDGER_NAME, {}), pytest.raises(LedgerInUseError):
        trainer_for(tmp_path).train()
    assert releases(tmp_path) == 0


def test_checkpoints_whose_ledger_was_deleted_still_count(tmp_path: Path) -> None:
    trainer_for(tmp_path, host=SAVING).train()
    (tmp_path / LEDGER_NAME).unlink()
    for mode in ("new", "continue"):
        with pytest.raises(LedgerMismatchError, match="checkpoint-2/privacy_ledger"):
            trainer_for(tmp_path, dp={"ledger": mode}).train()
    assert not (tmp_path / LEDGER_NAME).exists()
    resumed = trainer_for(tmp_path, host={**SAVING, "max_steps": 8})
    resumed.train(resume_from_checkpoint=True)
    assert releases(tmp_path) == 8


def test_checkpoints_of_another_run_are_not_overwritten(tmp_path: Path) -> None:
    trainer_for(tmp_path / "a", host=SAVING).train()
    trainer_for(tmp_path / "b", host=SAVING).train()
    (tmp_path / "b" / LEDGER_NAME).unlink()
    with pytest.raises(LedgerMismatchError, match="earlier run"):
        trainer_for(tmp_path / "b").train(
            resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4")
        )
    assert releases(tmp_path / "b" / "checkpoint-6") == 6


def test_saving_into_another_runs_folder_keeps_its_ledger(tmp_path: Path) -> None:
    first, second = trainer_for(tmp_path / "a"), trainer_for(tmp_path / "b")
    first.train()
    second.train()
    written = (tmp_path / "a" / LEDGER_NAME).read_bytes()
    with pytest.raises(LedgerMismatchError, match="overwrite the record"):
        second.save_model(str(tmp_path / "a"))
    assert (tmp_path / "a" / LEDGER_NAME).read_bytes() == written
    second.save_model(str(tmp_path / "c"))
    second.save_model(str(tmp_path / "c"))
    assert releases(tmp_path / "c") == 6


def test_exact_metrics_cannot_begin_behind_the_headers_back(tmp_path: Path) -> None:
    trainer_for(tmp_path, host=SAVING).train()
    with pytest.raises(LedgerMismatchError, match="nonprivate_metrics"):
        trainer_for(tmp_path, host=SAVING, dp={"nonprivate_metrics": True}).train(
            resume_from_checkpoint=True
        )


def test_the_preflight_cannot_end_behind_the_headers_back(tmp_path: Path) -> None:
    trainer_for(tmp_path, host=SAVING).train()
    more, off = {**SAVING, "max_steps": 8}, {"preflight": False}
    with pytest.raises(LedgerMismatchError, match=r"^DPArguments\.preflight=False"):
        trainer_for(tmp_path, host=more, dp=off).train(resume_from_checkpoint=True)
    assert releases(tmp_path) == 6
    trainer_for(tmp_path, host=more).train(resume_from_checkpoint=True)
    assert releases(tmp_path) == 8


def test_a_run_without_preflight_stays_one_in_the_report(tmp_path: Path) -> None:
    trainer_for(tmp_path, host=SAVING, dp={"preflight": False}).train()
    for dp in ({}, {"preflight": False}):
        resumed = trainer_for(tmp_path, host={**SAVING, "max_steps": 8}, dp=dp)
        resumed.train(resume_from_checkpoint=True)
        assert "preflight was switched off" in str(resumed.privacy_report())


def test_exact_metrics_may_end_and_stay_in_the_report(tmp_path: Path) -> None:
    trainer_for(tmp_path, host=SAVING, dp={"nonprivate_metrics": True}).train()
    resumed = trainer_for(tmp_path, host={**SAVING, "max_steps": 8})
    resumed.train(resume_from_checkpoint=True)
    assert "nonprivate/" in str(resumed.privacy_report())


def test_other_releases_in_the_ledger_are_not_priced_as_the_plans(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, host=SAVING)
    trainer.train()
    with Ledger.open(tmp_path / LEDGER_NAME) as ledger:
        ledger.append(PoissonSampled(1.0, Gaussian(0.5)), step=6)
    with pytest.raises(LedgerMismatchError, match="only releases of the plan"):
        trainer_for(tmp_path, host=SAVING).train(resume_from_checkpoint=True)
    assert trainer.privacy_report().guarantee.epsilon > trainer.epsilon + 1


@pytest.mark.parametrize("kind", [str, Path])
def test_a_named_checkpoint_is_the_one_that_is_resumed(tmp_path: Path, kind: type) -> None:
    trainer_for(tmp_path / "a", host=SAVING).train()
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "kept")
    resumed = trainer_for(tmp_path / "a", host=SAVING)
    resumed.train(resume_from_checkpoint=kind(tmp_path / "kept"))
    assert releases(tmp_path / "a") == 10


@pytest.mark.parametrize("resume", [None, False])
def test_without_a_wish_nothing_is_resumed(tmp_path: Path, resume: bool | None) -> None:
    trainer = trainer_for(tmp_path)
    trainer.train(resume_from_checkpoint=resume)
    assert releases(tmp_path) == 6


def test_resuming_a_finished_run_releases_nothing_more(tmp_path: Path) -> None:
    """The host alone would make one step more: its stop is only read after a step."""
    trainer_for(tmp_path, host=SAVING).train()
    resumed = trainer_for(tmp_path, host=SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == releases(tmp_path) == 6


def test_resume_ignores_what_is_no_checkpoint(tmp_path: Path) -> None:
    trainer_for(tmp_path, host=SAVING).train()
    (tmp_path / "checkpoint-99").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-98")
    (tmp_path / "checkpoint-98" / LEDGER_NAME).unlink()
    trainer_for(tmp_path, host=SAVING).train(resume_from_checkpoint=True)
    assert releases(tmp_path) == 6
    with pytest.raises(ConfigurationError, match="complete checkpoint"):
        trainer_for(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_weights_alone_can_be_resumed(tmp_path: Path) -> None:
    host = {**SAVING, "save_only_model": True}
    trainer_for(tmp_path, host=host).train()
    resumed = trainer_for(tmp_path, host={**host, "max_steps": 8})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == releases(tmp_path) == 8
