"""The engines see whose code a run's loss is, and what becomes of it while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import fixed, trainer_for
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_dp.engines.familiar import is_from_library
from hf_dp.errors import ConfigurationError
from hf_dp.ledger import LEDGER_NAME, read_ledger


class Objective:
    """A loss of each example's own, until it is told to look at the batch."""

    def __init__(self) -> None:
        self.normalise = False

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        losses = F.cross_entropy(logits, inputs["labels"], reduction="none")
        return losses / losses.detach().mean() if self.normalise else losses


class Curriculum(TrainerCallback):
    """Tells it so after some steps."""

    def __init__(self, objective: Objective, step: int) -> None:
        self.objective, self.step = objective, step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.objective.normalise = state.global_step >= self.step


def run(folder: Path, objective: Objective) -> Any:
    return trainer_for(
        folder,
        coins=fixed(),
        host={"max_steps": 3},
        dp={"preflight": False},
        example_loss=objective,
        callbacks=[Curriculum(objective, 1)],
    )


@pytest.mark.slow
def test_a_loss_that_a_callback_makes_look_at_the_batch_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="batch mates"):
        run(tmp_path / "a", Objective()).train()
    assert read_ledger(tmp_path / "a" / LEDGER_NAME).num_releases == 1
    monkeypatch.setattr("hf_dp.engines.recorder.is_from_library", lambda _: True)  # planted
    run(tmp_path / "b", Objective()).train()


def test_a_loss_of_ones_own_is_seen_through_the_trainer(tmp_path: Path) -> None:
    own, chosen = run(tmp_path / "a", Objective()), trainer_for(tmp_path / "b")
    for trainer, library in ((own, False), (chosen, True)):
        trainer.explain_engine()
        assert is_from_library(trainer._loss_of_each) is library
