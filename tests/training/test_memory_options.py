"""What saves memory or time around the step: exact through the real trainer, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_runs import collate, fixed, tiny_bert, trainer_for
from torch import Tensor, nn

from hf_dp.errors import ConfigurationError
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.noise import GaussianNoise
from hf_dp.sums import NoisySum
from hf_dp.training import mixin, step

DEPRECATED = "ignore:.*gradient_checkpointing.*:FutureWarning"
ENGINES = ["book_keeping", "two_pass", "sequential"]
Sums = list[dict[str, Tensor]]


def sums(
    output_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: nn.Module | None = None,
    *,
    engine: str = "auto",
    **options: Any,
) -> Sums:
    """The clipped sums of two steps, always of the same draws, at weights that do not move."""
    released: Sums = []

    def bare(_: GaussianNoise, summed: Any, **options: Any) -> NoisySum:
        released.append({name: grad.clone() for name, grad in summed.grads.items()})
        return NoisySum(summed.grads, summed.loss_sum)

    host = {"max_steps": 2, "learning_rate": 0.0, **options.pop("host", {})}
    with monkeypatch.context() as patch:
        patch.setattr(GaussianNoise, "release", bare)
        trainer_for(
            output_dir,
            model=model or tiny_bert(),
            coins=fixed(),
            host=host,
            dp={"engine": engine},
            **options,
        ).train()
    return released


def far(found: Sums, expected: Sums) -> float:
    """The largest distance of two sums over the norm of the second."""
    gaps = []
    for a, b in zip(found, expected, strict=True):
        left, right = (torch.cat([s[name].flatten() for name in b]) for s in (a, b))
        gaps.append(float((left - right).norm() / right.norm()))
    return max(gaps)


def test_a_sum_that_is_off_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sums(tmp_path / "a", monkeypatch)
    assert far(sums(tmp_path / "b", monkeypatch), plain) == 0
    real = step.clipped_sum_of

    def off(*args: Any, **parts: Any) -> Any:
        summed = real(*args, **parts)
        summed.grads["classifier.weight"].mul_(1.01)
        return summed

    monkeypatch.setattr(mixin, "clipped_sum_of", off)
    assert far(sums(tmp_path / "c", monkeypatch), plain) > 1e-4


# ---- gradient checkpointing ------------------------------------------------------------------------


def checkpointed(use_reentrant: bool) -> Any:
    model: Any = tiny_bert()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


@pytest.mark.filterwarnings(DEPRECATED)
@pytest.mark.parametrize("engine", ENGINES)
def test_checkpoints_of_the_users_own_change_no_sum(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sums(tmp_path / "a", monkeypatch, engine="sequential")
    found = sums(tmp_path / "b", monkeypatch, checkpointed(False), engine=engine)
    assert far(found, plain) < 1e-5


@pytest.mark.filterwarnings(DEPRECATED, "ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("preflight", [True, False])
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_reentrant_checkpoints_of_the_users_own_are_refused(
    tmp_path: Path, engine: str, preflight: bool
) -> None:
    dp = {"engine": engine, "preflight": preflight}
    with pytest.raises(ConfigurationError, match=r"^model\.gradient_checkpointing_enable="):
        trainer_for(tmp_path, model=checkpointed(True), coins=fixed(), dp=dp).train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 0


@pytest.mark.parametrize("engine", ["book_keeping", "two_pass"])
def test_bf16_sums_are_near_those_of_one_by_one(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = {"bf16": True}
    one_by_one = sums(tmp_path / "a", monkeypatch, engine="sequential", host=host)
    found = sums(tmp_path / "b", monkeypatch, engine=engine, host=host)
    assert 0 < far(found, one_by_one) < 2e-2


def test_adapters_in_bf16_pass_the_preflight(tmp_path: Path) -> None:
    """What rounds to half precision is the forward of the adapted model, not that of the one inside."""
    model = get_peft_model(
        tiny_bert(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    )
    trainer_for(tmp_path, model=model, host={"bf16": True, "max_steps": 1}).train()


# ---- compiled models -------------------------------------------------------------------------------


def wrapped() -> tuple[Any, str]:
    return torch.compile(tiny_bert(), backend="eager"), "model="


def in_place() -> tuple[Any, str]:
    model = tiny_bert()
    model.compile(backend="eager")
    return model, "model="


def one_layer() -> tuple[Any, str]:
    model: Any = tiny_bert()
    model.bert.encoder.layer[1].compile(backend="eager")
    return model, r"model\.bert\.encoder\.layer\.1="


def one_forward() -> tuple[Any, str]:
    model: Any = tiny_bert()
    layer = model.bert.encoder.layer[0].output
    layer.forward = torch.compile(layer.forward, backend="eager")
    return model, r"model\.bert\.encoder\.layer\.0\.output="


@pytest.mark.parametrize("make", [wrapped, in_place, one_layer, one_forward])
def test_a_compiled_model_is_refused_by_its_name(tmp_path: Path, make: Any) -> None:
    model, name = make()
    with pytest.raises(ConfigurationError, match=rf"^{name}.*not compiled"):
        trainer_for(tmp_path, model=model)


# ---- inference mode --------------------------------------------------------------------------------


def test_batches_made_in_inference_mode_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collate_there(rows: Any) -> Any:
        with torch.inference_mode():
            return collate(rows)

    plain = sums(tmp_path / "a", monkeypatch)
    assert far(sums(tmp_path / "b", monkeypatch, data_collator=collate_there), plain) < 1e-6
    alone = {"per_device_train_batch_size": 1}  # others are joined, which makes ordinary tensors
    sums(tmp_path / "c", monkeypatch, data_collator=collate_there, host=alone)
    monkeypatch.setattr(mixin, "tracked", lambda inputs: inputs)
    with pytest.raises(RuntimeError, match="Inference tensors"):
        sums(tmp_path / "d", monkeypatch, data_collator=collate_there, host=alone)


def test_parameters_made_in_inference_mode_are_refused(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = tiny_bert()
    with pytest.raises(ConfigurationError, match=r"^model\.bert.*inference mode"):
        trainer_for(tmp_path, model=model)


# ---- others' hooks and in-place modules ------------------------------------------------------------


def hooked(seen: list[str]) -> Any:
    """Hooks that change an input and an output, and others that look on."""
    model: Any = tiny_bert()
    dense = model.bert.encoder.layer[0].intermediate.dense
    dense.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0.5,))
    dense.register_forward_hook(lambda _, inputs, output: output * 2)
    dense.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.classifier.register_forward_hook(lambda *_: seen.append("forward"))
    return model


@pytest.mark.parametrize("engine", ["book_keeping", "two_pass"])
def test_hooks_of_others_are_obeyed(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    plain = sums(tmp_path / "a", monkeypatch)
    expected = sums(tmp_path / "b", monkeypatch, hooked([]), engine="sequential")
    found = sums(tmp_path / "c", monkeypatch, hooked(seen), engine=engine)
    assert far(found, expected) < 1e-5
    assert far(found, plain) > 1e-4
    assert {"forward", "backward"} <= set(seen)


class InPlace(nn.Module):
    """What people write to save memory."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, states: Tensor) -> Tensor:
        states += 0.1
        return self.relu(states.mul_(0.5))


@pytest.mark.parametrize("engine", ["book_keeping", "two_pass"])
def test_modules_that_write_over_their_input_are_exact(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model() -> Any:
        made: Any = tiny_bert()
        for layer in made.bert.encoder.layer:
            layer.intermediate.intermediate_act_fn = InPlace()
        return made

    expected = sums(tmp_path / "a", monkeypatch, model(), engine="sequential")
    found = sums(tmp_path / "b", monkeypatch, model(), engine=engine)
    assert far(found, expected) < 1e-5
