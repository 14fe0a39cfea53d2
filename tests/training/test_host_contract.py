"""How transformers' Trainer behaves where hf_dp relies on it, pinned for every release that is supported.

Nothing here is about privacy: each test runs the host itself, or watches it drive DPTrainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Sentences, collate, host_arguments, tiny_bert, trainer_for
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from hf_dp import DPSeq2SeqTrainer, DPTrainer, DPTrainerMixin
from hf_dp.errors import PrivacyError
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.training.settled import SettledMixin
from hf_dp.training.shown import ShownMixin


class Watched(Trainer):
    """Notes the order of what the host calls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[str] = []

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("batch")
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("step")
        return super().training_step(*args, **kwargs)


def watched(
    output_dir: Path,
    cls: type[Trainer] = Watched,
    host: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """The plain host, whose gradient accumulation is 1 as in the copy of the arguments that it gets."""
    defaults = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "max_steps": 3}
    return cls(
        tiny_bert(),
        host_arguments(output_dir, **{**defaults, **(host or {})}),
        train_dataset=Sentences(),
        data_collator=collate,
        **options,
    )


def test_one_item_is_one_update(tmp_path: Path) -> None:
    class Items(Watched):
        def get_train_dataloader(self) -> Any:
            return [collate([row]) for row in Sentences()]  # no DataLoader at all

    trainer = watched(tmp_path, Items)
    trainer.train()
    assert trainer.calls == ["batch", "step"] * 3
    assert trainer.state.global_step == 3


def test_a_plain_loader_is_taken_as_it_is(tmp_path: Path) -> None:
    loaders: list[object] = []

    class Plain(Watched):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Sentences(), batch_size=4, collate_fn=collate)

        def get_batch_samples(self, iterator: Iterator[Any], *args: Any) -> Any:
            loaders.append(iterator)
            return super().get_batch_samples(iterator, *args)

    watched(tmp_path, Plain).train()
    names = {f"{type(loader).__module__}.{type(loader).__name__}" for loader in loaders}
    assert names == {"torch.utils.data.dataloader._SingleProcessDataLoaderIter"}


def test_the_loaders_parts_are_where_they_are_looked_for(tmp_path: Path) -> None:
    trainer = watched(tmp_path, host={"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3})
    loader = trainer.get_train_dataloader()
    assert isinstance(loader.dataset, Sentences)
    assert loader.num_workers == 2
    assert loader.prefetch_factor == 3
    assert loader.persistent_workers is False
    assert loader.multiprocessing_context is None
    assert callable(loader.worker_init_fn)
    assert set(loader.collate_fn([Sentences()[0] | {"text": "x"}])) >= {"input_ids", "labels"}
    assert loader.collate_fn.data_collator is collate


def test_gradients_reach_the_optimizer_untouched_and_are_cleared(tmp_path: Path) -> None:
    given: list[Tensor] = []
    arrived: list[Tensor] = []
    before: list[bool] = []

    class Replacing(Watched):
        def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
            before.append(all(p.grad is None for p in model.parameters()))
            for p in model.parameters():
                p.grad = torch.full_like(p, 50.0)
            given.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            return torch.zeros(())

    trainer = watched(tmp_path, Replacing)
    trainer.create_optimizer()
    parameters = list(trainer.model.parameters())
    trainer.optimizer.register_step_pre_hook(
        lambda *_: arrived.append(torch.cat([p.grad.flatten() for p in parameters]))
    )
    trainer.train()
    assert before == [True] * 3, "zero_grad before each step"
    assert len(arrived) == 3
    assert all(torch.equal(g, a) for g, a in zip(given, arrived, strict=True))


def test_with_its_default_the_host_would_clip_them(tmp_path: Path) -> None:
    """Why max_grad_norm is set to 0 on the copy."""
    norms: list[float] = []

    class Large(Watched):
        def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
            for p in model.parameters():
                p.grad = torch.full_like(p, 50.0)
            return torch.zeros(())

    trainer = watched(tmp_path, Large, host={"max_grad_norm": 1.0})
    trainer.create_optimizer()
    parameters = list(trainer.model.parameters())
    trainer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(float(torch.cat([p.grad.flatten() for p in parameters]).norm()))
    )
    trainer.train()
    assert max(norms) < 1.01


def test_no_batch_and_a_wish_to_stop_end_the_run_and_save(tmp_path: Path) -> None:
    class Stopping(Watched):
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 2:
                self.control.should_training_stop = self.control.should_save = True
                return [], None
            return super().get_batch_samples(*args, **kwargs)

    trainer = watched(tmp_path, Stopping, host={"max_steps": 9})
    result = trainer.train()
    assert result.global_step == 2
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_the_ledger_is_in_a_checkpoint_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """save_model comes before the optimizer's and the trainer's state."""
    found: dict[str, set[str]] = {}

    class Failing(DPTrainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            found["at the optimizer"] = {path.name for path in Path(output_dir).iterdir()}

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            assert output_dir is not None
            found["at the weights"] = {path.name for path in Path(output_dir).iterdir()}
            super()._save(output_dir, state_dict)

    trainer = trainer_for(tmp_path, cls=Failing, host={"save_strategy": "steps", "save_steps": 6})
    trainer.train()
    # The ledger's lock file may stand beside it.
    assert {name for name in found["at the weights"] if not name.endswith(".lock")} == {LEDGER_NAME}
    assert "trainer_state.json" not in found["at the optimizer"]
    assert "model.safetensors" in found["at the optimizer"]


def test_values_given_to_log_reach_every_logger_and_the_history(tmp_path: Path) -> None:
    heard: list[dict[str, float]] = []

    class Hearing(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            heard.append(dict(logs))

    class Adding(Watched):
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            logs["added"] = 1.0
            super().log(logs, start_time)

    trainer = watched(tmp_path, Adding, callbacks=[Hearing()])
    result = trainer.train()
    assert all(line["added"] == 1.0 for line in heard)
    assert all(line["added"] == 1.0 for line in trainer.state.log_history)
    assert len(heard) == 4
    assert result.metrics["added"] == 1.0, "the final metrics are the very dict that is logged"


def test_prepare_inputs_moves_a_batch(tmp_path: Path) -> None:
    batch = collate([Sentences()[0]])
    prepared = watched(tmp_path)._prepare_inputs(batch)
    assert set(prepared) == set(batch)
    assert all(value.device.type == "cpu" for value in prepared.values())


def test_the_host_asks_a_batch_only_whether_it_holds_a_name(tmp_path: Path) -> None:
    """So an item without keys makes every exact count zero."""
    asked: list[str] = []

    class Item:
        def __contains__(self, name: str) -> bool:
            asked.append(name)
            return False

    class Opaque(Watched):
        def get_train_dataloader(self) -> Any:
            return [Item()] * 5

        def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
            return torch.zeros(())

    trainer = watched(tmp_path, Opaque)
    trainer.train()
    assert set(asked) <= {"labels", "input_ids"}
    assert trainer.state.total_flos == trainer.state.num_input_tokens_seen == 0


@pytest.mark.parametrize("epochs", [0.5, 1, 2.2])
def test_epochs_are_counted_by_the_loaders_length(tmp_path: Path, epochs: float) -> None:
    trainer = trainer_for(tmp_path, host={"max_steps": -1, "num_train_epochs": epochs})
    trainer.train()
    assert trainer.state.max_steps == trainer.state.global_step == trainer.plan.num_steps


OURS = {**vars(ShownMixin), **vars(SettledMixin), **vars(DPTrainerMixin)}


def test_only_public_methods_are_overridden() -> None:
    assert DPTrainerMixin.__mro__ == (DPTrainerMixin, SettledMixin, ShownMixin, object)
    ours = {name for name, value in OURS.items() if callable(value) and hasattr(Trainer, name)}
    assert ours - {"__init__"} == {
        "train",
        "num_examples",
        "get_train_dataloader",
        "get_batch_samples",
        "training_step",
        "log",
        "evaluate",
        "predict",
        "get_total_train_batch_size",
        "save_model",
        "create_model_card",
        "hyperparameter_search",
    }
    for cls in (DPTrainer, DPSeq2SeqTrainer):
        assert cls.training_step is DPTrainerMixin.training_step


def test_none_of_our_own_names_is_the_hosts() -> None:
    """A new attribute of the host must not be shadowed by one of ours."""
    trainer_names = set(dir(Trainer))
    ours = {name for name in OURS if not name.startswith("__")}
    overridden = {name for name in ours if name in trainer_names}
    assert not {name for name in overridden if name.startswith("_")}
    assert not {"plan", "epsilon", "privacy_report", "coins", "engine"} & trainer_names


def test_our_instance_attributes_do_not_collide(tmp_path: Path) -> None:
    plain, private = vars(watched(tmp_path / "a", Trainer)), vars(trainer_for(tmp_path / "b"))
    added = set(private) - set(plain)
    assert {"dp_args", "accountant", "coins", "engine", "_spending", "_claim"} <= added


def test_without_any_callback_the_budget_still_ends_the_run(tmp_path: Path) -> None:
    """The host's own stepping is a callback too: bare, it would go on to the end of its epochs."""
    trainer = trainer_for(tmp_path, dp={"target_epsilon": 3.0})
    trainer.callback_handler.callbacks = []
    trainer.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 6
    assert trainer.privacy_report().guarantee.epsilon <= 3.0

    meddling = trainer_for(tmp_path / "b", dp={"target_epsilon": 3.0}, callbacks=[GoOn()])
    meddling.train()
    assert read_ledger(tmp_path / "b" / LEDGER_NAME).num_releases == 6


class GoOn(TrainerCallback):
    """Takes every wish to stop back."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = False


def test_a_step_outside_train_is_refused(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    with pytest.raises(PrivacyError, match="train"):
        trainer.get_batch_samples(iter([]), 1, torch.device("cpu"))
