"""Runs of DPTrainer that train 34 numbers, and what their ledgers claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import tiny_bert, train_lines, trainer_for
from torch import nn

from hf_dp import DPTrainer
from hf_dp.accounting import accountant_named
from hf_dp.ledger import LEDGER_NAME, read_ledger

L1 = {"clipping_norm_type": "l1"}
SAVING = {"save_strategy": "steps", "save_steps": 2}


def only_the_head() -> nn.Module:
    """A model of which 34 numbers are trained."""
    model = tiny_bert()
    model.bert.requires_grad_(False)
    return model


def head_trainer(folder: Path, dp: dict[str, Any], **options: Any) -> DPTrainer:
    return trainer_for(folder, dp=dp, **{"model": only_the_head(), **options})


def claims_of_the_ledger(trainer: DPTrainer, folder: Path) -> None:
    """Epsilon in the log is the accountant's for what the ledger holds."""
    record = read_ledger(folder / LEDGER_NAME)
    assert record.num_releases == 6
    exact = accountant_named("pld").guarantee(
        record.event(), delta=record.header["delta"], relation=trainer.plan.relation
    )
    shown = train_lines(trainer)[-1]["epsilon"]
    assert exact.epsilon <= shown * (1 + 1e-9)
    assert shown <= exact.epsilon * 1.02 + 0.01
    assert trainer.privacy_report().guarantee.epsilon == pytest.approx(exact.epsilon, rel=1e-6)
