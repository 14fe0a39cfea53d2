"""Families that the generic rule serves: wild examples, checkpoints, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_zoo import adapted
from engine_zoo import Batch, assert_same_sum, difference, length, naive, own_losses
from family_zoo import batch, build
from influence import ROUNDING
from torch import Tensor, nn

from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine, GradientEngine, TwoPassEngine
from hf_dp.sums import ClippedSum

C = 0.5
WILD = {
    "nan": lambda x: torch.full_like(x, torch.nan),
    "inf": lambda x: torch.full_like(x, torch.inf),
    "1e30": lambda x: x * 1e30,
    "1e6": lambda x: x * 1e6,
    "zeros": torch.zeros_like,
}


def clipped(engine: GradientEngine, model: nn.Module, inputs: Batch) -> ClippedSum:
    return engine.clipped_sum(model, inputs, example_loss=own_losses, clipping=FlatClipping(C))


@pytest.mark.parametrize("wild", WILD)
@pytest.mark.parametrize(
    "family", ["vit", "swin", "beit", "dinov2", "convnext", "wav2vec2", "whisper"]
)
def test_one_example_moves_the_sum_by_at_most_the_sensitivity(family: str, wild: str) -> None:
    model, inputs, engine = build(family), batch(family), BookKeepingEngine()
    clipped(engine, model, inputs)
    rest = [0, 2, 3]
    clean = clipped(engine, model, {key: value[rest] for key, value in inputs.items()})
    name = next(iter(inputs))
    inputs[name][1] = WILD[wild](inputs[name][1])
    whole = clipped(engine, model, inputs)
    assert all(torch.isfinite(grad).all() for grad in whole.grads.values())
    assert length(difference(whole.grads, clean.grads)) <= C * ROUNDING
    torch.testing.assert_close(whole.norms[rest], clean.norms, rtol=1e-4, atol=1e-6)


def checkpointed(model: nn.Module) -> nn.Module:
    """Every layer recomputed in the backward pass, and no dropout."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    for module in model.modules():
        for name in ("p", "drop_prob", "dropout", "attention_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.train()


@pytest.mark.parametrize("kind", [BookKeepingEngine, TwoPassEngine])
@pytest.mark.parametrize("family", ["opt", "mixtral", "deberta-v2", "swin", "beit", "gemma3"])
def test_checkpoints_change_nothing(family: str, kind: Any) -> None:
    expected = naive(build(family, torch.float64), batch(family, dtype=torch.float64), C)
    model = checkpointed(build(family, torch.float64))
    found = clipped(kind(), model, batch(family, dtype=torch.float64))
    assert_same_sum(found, expected, 1e-6 if family == "gemma3" else 1e-12)


def test_checkpoints_change_nothing_for_dora() -> None:
    make = lambda: adapted("llama", torch.float64, use_dora=True)  # noqa: E731
    expected = naive(make(), batch("llama"), C)
    assert_same_sum(
        clipped(BookKeepingEngine(), checkpointed(make()), batch("llama")), expected, 1e-12
    )


def in_bfloat16(model: nn.Module, inputs: Batch) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return own_losses(model, inputs).float()


@pytest.mark.parametrize("family", ["bert", "opt", "deberta-v2", "vit", "whisper", "wav2vec2"])
def test_norms_under_autocast_are_those_of_training(family: str) -> None:
    model, inputs = build(family), batch(family)
    expected = naive(model, inputs, C, in_bfloat16)
    found = BookKeepingEngine().clipped_sum(
        model, inputs, example_loss=in_bfloat16, clipping=FlatClipping(C)
    )
    torch.testing.assert_close(found.norms.double(), expected.norms, rtol=2e-2, atol=1e-6)
    gap = length(difference(found.grads, expected.grads))
    assert gap <= 3e-2 * length(expected.grads)
