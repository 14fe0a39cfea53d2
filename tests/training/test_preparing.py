"""Methods of one's own between collator and model, where rows could be mixed, are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import refused, trainer_for
from transformers import Trainer

from hf_dp import DPTrainer, DPTrainerMixin


class Mixing:
    """Methods that a trainer may have between collator and model."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs


def test_methods_between_collator_and_model_are_refused(tmp_path: Path) -> None:
    def mixed(self: Any, *args: Any, **parts: Any) -> Any:
        return None

    for name in ("_prepare_inputs", "_prepare_input", "get_batch_samples"):
        cls = type("Mine", (DPTrainer,), {name: mixed})
        match = rf"^Mine\.{name}='.*mixed': expected the method of transformers, trl or hf_dp"
        refused(tmp_path, match, lambda cls=cls: trainer_for(tmp_path, cls=cls))
    below = type("Mine", (DPTrainer, Mixing), {})  # where a host's own would be
    refused(tmp_path, "_prepare_inputs", lambda: trainer_for(tmp_path, cls=below))
    trainer = trainer_for(tmp_path)
    trainer._prepare_inputs = lambda inputs: inputs
    refused(tmp_path, "_prepare_inputs='test_methods", lambda: trainer)


def test_a_library_s_wrapper_hides_no_method_of_ones_own(tmp_path: Path) -> None:
    cls = type("Mine", (DPTrainer,), {"_prepare_inputs": torch.no_grad()(Mixing._prepare_inputs)})
    refused(tmp_path, "_prepare_inputs", lambda: trainer_for(tmp_path, cls=cls))
    wrapped = torch.no_grad()(DPTrainer._prepare_inputs)
    cls = type("Mine", (DPTrainer,), {"_prepare_inputs": wrapped})
    trainer_for(tmp_path, cls=cls)


class Steps(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs)


class Plain(Trainer):
    pass


@pytest.mark.parametrize(("host", "warned"), [(Steps, True), (Plain, False)])
def test_a_step_that_is_not_called_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, host: type[Trainer], warned: bool
) -> None:
    class Private(DPTrainerMixin, host):  # type: ignore[valid-type, misc]
        pass

    trainer_for(tmp_path, cls=Private)
    assert ("Steps.training_step is not called" in caplog.text) == warned
