"""Hosts that log more than the Trainer does."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import train_lines, trainer_for
from transformers import Trainer

from hf_dp import DPTrainerMixin
from hf_dp.training import shown


class GatheringTrainer(Trainer):
    """Gathers exact metrics in compute_loss and adds them in log, the way TRL's SFTTrainer does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self._metrics["train"]["exact_loss"].append(loss.detach().item())
        return 3 * loss  # matches no vectorised loss, so this is called for every example

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs.update(
            {name: sum(values) / len(values) for name, values in self._metrics["train"].items()}
        )
        super().log(logs, start_time)
        self._metrics["train"].clear()


class DPGatheringTrainer(DPTrainerMixin, GatheringTrainer):
    """The mixin in front of another host."""


def test_exact_metrics_of_another_host_stay_out_of_the_log(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "private", cls=DPGatheringTrainer, host={"max_steps": 3})
    trainer.train()
    assert len(train_lines(trainer)) == 3
    assert not any("exact_loss" in line for line in trainer.state.log_history)


def test_the_check_above_sees_a_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "forget_exact_metrics", lambda trainer: None)
    trainer = trainer_for(tmp_path, cls=DPGatheringTrainer, host={"max_steps": 3})
    trainer.train()
    assert any("exact_loss" in line for line in trainer.state.log_history)
