"""What reaches the log: only what is public, whichever class puts it there, and whatever it is called."""

from __future__ import annotations

import json
import logging
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Sentences, train_lines, trainer_for
from transformers import Trainer, TrainerCallback

from hf_dp import DPTrainer, DPTrainerMixin
from hf_dp.training import mixin

PUBLIC = {"loss", "learning_rate", "epoch", "step", "epsilon", "delta", "train_loss"} | {
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
}


class GatheringTrainer(Trainer):
    """Gathers exact metrics in compute_loss and adds them in log, the way TRL's trainers do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.gathered: dict[str, list[float]] = defaultdict(list)
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.gathered["exact_loss"].append(loss.detach().item())
        return 3 * loss  # matches no vectorised loss, so this is called for every example

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name, values in self.gathered.items():
            logs[name] = logs["loss"] = sum(values) / len(values)
        super().log(logs, start_time)


class DPGatheringTrainer(DPTrainerMixin, GatheringTrainer):
    """The mixin in front of another host, whose own log runs below."""


class LoggingLoss(DPTrainer):
    """Logs the exact loss of every example, under public names too."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        exact = loss.detach().item()
        self.log({"ce": exact, "loss": exact, "public/ce": exact})
        return 3 * loss


class AddingAbove(DPTrainer):
    """Remembers the exact loss, and puts it into every line before this library sees it."""

    exact = 0.0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.exact = loss.detach().item()
        return 3 * loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs |= {"my_loss": self.exact, "loss": self.exact}
        super().log(logs, start_time)


class Heard(TrainerCallback):
    """Every line that a callback, such as TensorBoard's, gets to see."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append(dict(logs))


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was released as loss, step by step."""
    found: list[float] = []
    released = mixin.released_loss

    def noted(*args: Any) -> torch.Tensor:
        found.append(float(loss := released(*args)))
        return loss

    monkeypatch.setattr(mixin, "released_loss", noted)
    return found


LEAKING = [DPGatheringTrainer, LoggingLoss, AddingAbove]


@pytest.mark.parametrize("cls", LEAKING)
def test_nothing_but_what_is_public_reaches_the_log(
    tmp_path: Path, cls: type[DPTrainer], losses: list[float]
) -> None:
    heard = Heard()
    saving = {"max_steps": 4, "logging_steps": 2, "save_strategy": "steps", "save_steps": 4}
    trainer = trainer_for(tmp_path, cls=cls, host=saving, callbacks=[heard])
    result = trainer.train()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    for line in (*heard.lines, *trainer.state.log_history, *state["log_history"], result.metrics):
        assert set(line) <= PUBLIC
    assert len(heard.lines) == len(trainer.state.log_history) == 3
    assert len(state["log_history"]) == 2
    for lines in (heard.lines, trainer.state.log_history):
        means = [sum(losses[:2]) / 2, sum(losses[2:]) / 2]
        assert [line["loss"] for line in lines[:2]] == pytest.approx(means)
        assert lines[-1]["train_loss"] == pytest.approx(sum(losses) / 4)


@pytest.mark.parametrize("cls", LEAKING)
def test_the_check_above_sees_a_leak(
    tmp_path: Path, cls: type[DPTrainer], losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixin, "guard", lambda *_: None)
    with pytest.raises(AssertionError):
        test_nothing_but_what_is_public_reaches_the_log(tmp_path, cls, losses)


@pytest.mark.parametrize("cls", LEAKING)
def test_what_is_left_out_is_named_once(
    tmp_path: Path, cls: type[DPTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_dp.training.lines"):
        trainer_for(tmp_path, cls=cls, host={"max_steps": 2}).train()
    told = [one.getMessage() for one in caplog.records if "left out of the log" in one.getMessage()]
    assert len(told) == 1
    hidden = {DPGatheringTrainer: "'exact_loss'", LoggingLoss: "'ce'", AddingAbove: "'my_loss'"}
    assert f": {hidden[cls]}" in told[0]
    assert "nonprivate_metrics=True" in told[0]


@pytest.mark.parametrize("cls", LEAKING)
def test_what_was_asked_for_is_logged(tmp_path: Path, cls: type[DPTrainer]) -> None:
    trainer = trainer_for(tmp_path, cls=cls, host={"max_steps": 2}, dp={"nonprivate_metrics": True})
    trainer.train()
    names = {DPGatheringTrainer: "exact_loss", LoggingLoss: "ce", AddingAbove: "my_loss"}
    shown = [line for line in trainer.state.log_history if names[cls] in line]
    assert len(shown) >= 2
    assert "outside the guarantee" in str(trainer.privacy_report())


class Constants(TrainerCallback):
    """Logs between the steps."""

    trainer: DPTrainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.log({"my_constant": 3.0})
        self.trainer.log({"public/norm": 2.0, "my_other": 1.0})


def test_lines_between_steps_hold_what_is_said_to_be_public(tmp_path: Path) -> None:
    """What a callback knows may be exact, so that it must say so; before and after, all is the user's own."""
    constants = Constants()
    trainer = trainer_for(tmp_path, host={"max_steps": 2}, callbacks=[constants])
    constants.trainer = trainer
    trainer.log({"before": 1.0})
    trainer.train()
    trainer.log({"after": 3.0})
    lines = trainer.state.log_history
    assert [line["public/norm"] for line in lines if "public/norm" in line] == [2.0, 2.0]
    assert "my_constant" not in str(lines)
    assert "my_other" not in str(lines)
    assert "after" in lines[-1]
    assert len(train_lines(trainer)) == 2
    assert len(lines) == 6, "a line of which nothing is left is no line"


def test_after_a_run_a_host_adds_nothing_of_it(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, cls=DPGatheringTrainer, host={"max_steps": 1})
    trainer.train()
    trainer.log({"after": 3.0})
    assert set(trainer.state.log_history[-1]) == {"after", "epoch", "step"}


class OwnEvaluation(DPTrainer):
    """The evaluation of the question answering examples: its own loop, then a line."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.evaluation_loop(self.get_eval_dataloader(), "Evaluation", prediction_loss_only=True)
        self.log({"eval_exact_match": 0.5, "unnamed": 1.0})
        return {}


def test_evaluation_shows_what_has_its_prefix(tmp_path: Path) -> None:
    evaluated = {"a": Sentences(4, seed=1), "b": Sentences(4, seed=2)}
    options: dict[str, Any] = {"host": {"max_steps": 2, "eval_strategy": "epoch"}}
    trainer = trainer_for(
        tmp_path,
        cls=DPGatheringTrainer,
        eval_dataset=evaluated,
        compute_metrics=lambda _: {"accuracy": 0.5},
        host={"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1},
    )
    trainer.compute_loss = super(GatheringTrainer, trainer).compute_loss  # type: ignore[method-assign]
    trainer.gathered["exact_loss"].append(1.0)
    trainer.train()
    trainer.evaluate(Sentences(4, seed=3), metric_key_prefix="test")
    lines = [line for line in trainer.state.log_history if not set(line) <= PUBLIC]
    assert len(lines) == 5
    for line, prefix in zip(lines, ["eval_a", "eval_b", "eval_a", "eval_b", "test"], strict=True):
        assert {f"{prefix}_loss", f"{prefix}_accuracy"} < set(line)
        assert all(name.startswith(f"{prefix}_") for name in set(line) - {"epoch", "step"})
    assert not any("exact_loss" in line for line in trainer.state.log_history)

    own = trainer_for(
        tmp_path / "own", cls=OwnEvaluation, eval_dataset=Sentences(4, seed=1), **options
    )
    own.train()
    (line,) = [line for line in own.state.log_history if "eval_exact_match" in line]
    assert set(line) == {"eval_exact_match", "epoch", "step"}


class CountingTrainer(Trainer):
    """Counts tokens of training, and gathers figures of every loss, the way TRL's SFTTrainer does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._metrics: dict[str, list[float]] = {"entropy": []}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._metrics["entropy"].append(0.0)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs:
            logs |= {"eval_num_tokens": 123, "eval_calls": len(self._metrics["entropy"])}
        super().log(logs, start_time)


def as_if_of(module: str, function: Any) -> Any:
    """The same function, its code in a module of that name."""
    held = {**function.__globals__, "__name__": module}
    parts = (function.__name__, function.__defaults__, function.__closure__)
    return types.FunctionType(function.__code__, held, *parts)


CountingTrainer.compute_loss = as_if_of("trl.trainer", CountingTrainer.compute_loss)


class DPCountingTrainer(DPTrainerMixin, CountingTrainer):
    """The mixin in front of it."""


def test_evaluation_shows_neither_tokens_of_training_nor_what_made_up_examples_gave(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_for(
        tmp_path,
        cls=DPCountingTrainer,
        eval_dataset=Sentences(4, seed=1),
        host={"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
    )
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert line["eval_calls"] == 1, "one batch of evaluation"
    assert "eval_num_tokens" not in line
    assert "left out of the log: 'eval_num_tokens'" in caplog.text


def test_a_handler_that_is_put_there_later_is_guarded(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, cls=AddingAbove, host={"max_steps": 1})
    handler = trainer.callback_handler
    trainer.callback_handler = type(handler)(
        handler.callbacks, trainer.model, None, trainer.optimizer, trainer.lr_scheduler
    )
    trainer.train()
    assert "my_loss" not in str(trainer.state.log_history)
