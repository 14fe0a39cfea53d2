"""Dropout on: under the masks of one pass, each example's gradient is that of its own loss in that pass."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from adapter_zoo import adapted
from engine_zoo import Batch, assert_same_sum, own_losses
from family_zoo import batch, build
from torch import Tensor, nn
from torch.nn import functional as F
from toy_nets import C, Net, data, squares

from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine, TwoPassEngine, vectorised
from hf_dp.engines.base import ExampleLoss, GradientEngine
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.randomness import Randomness
from hf_dp.sums import ClippedSum


def seed_all() -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)


def under_the_same_masks(model: nn.Module, inputs: Batch, loss: ExampleLoss) -> ClippedSum:
    """One pass over the whole batch for each example, every time with the same draws."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
    norms = []
    for index in range(len(next(iter(inputs.values())))):
        seed_all()
        losses = loss(model, inputs)
        grads = torch.autograd.grad(losses[index], list(parameters.values()), allow_unused=True)
        written = [g.double() for g in grads if g is not None]
        norm = torch.cat([g.reshape(-1) for g in written]).norm()
        for total, grad in zip(sums.values(), grads, strict=True):
            if grad is not None:
                total += min(1.0, C / float(norm)) * grad.double()
        norms.append(norm)
    return ClippedSum(grads=sums, norms=torch.stack(norms), losses=losses.detach().double())


def check_masks(
    model: nn.Module,
    inputs: Batch,
    loss: ExampleLoss = own_losses,
    engine: GradientEngine | None = None,
) -> None:
    expected = under_the_same_masks(model, inputs, loss)
    seed_all()
    found = (engine or BookKeepingEngine()).clipped_sum(
        model, inputs, example_loss=loss, clipping=FlatClipping(C)
    )
    assert_same_sum(found, expected, 1e-12)


def forms_of(engine: BookKeepingEngine, model: nn.Module) -> set[str]:
    points = engine.recorder.coverage(model).points
    forms: set[str] = set()
    return forms.union(*(point.generic.forms for point in points if point.generic is not None))


@pytest.mark.parametrize(
    "family",
    ["bert", "gpt2", "t5", "bart", "opt", "deberta-v2", "xlnet", "swin", "wav2vec2", "whisper"],
)
def test_full_fine_tuning_with_dropout_keeps_to_the_masks_of_the_pass(family: str) -> None:
    model = build(family, torch.float64, training=True)
    inputs = batch(family, dtype=torch.float64)
    check_masks(model, inputs)
    check_masks(model, inputs, engine=TwoPassEngine())


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_with_dropout_keep_to_the_masks_of_the_pass(dora: bool) -> None:
    engine = BookKeepingEngine()
    model = adapted("llama", torch.float64, lora_dropout=0.3, use_dora=dora).train()
    check_masks(model, batch("llama"), engine=engine)
    assert forms_of(engine, model) == ({"one by one"} if dora else set())


def test_masked_frames_of_speech_have_a_gradient_of_their_own() -> None:
    """The masks come from numpy, and their embedding is a parameter of the encoder itself."""
    model, inputs = build("wav2vec2", torch.float64, training=True), batch("wav2vec2")
    seed_all()
    inputs["input_values"] = inputs["input_values"].double()
    found = BookKeepingEngine().clipped_sum(
        model, inputs, example_loss=own_losses, clipping=FlatClipping(C)
    )
    assert float(found.grads["wav2vec2.masked_spec_embed"].norm()) > 0


class Noisy(Net):
    """Draws from every generator there is, between uses of a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(x * self.gain, 0.4)
        hidden = hidden * (1 + random.random()) + float(np.random.rand())  # noqa: NPY002
        return super().forward(F.dropout(hidden, 0.3) * self.gain)


def test_a_module_that_draws_from_every_generator_is_repeated_exactly() -> None:
    engine, model = BookKeepingEngine(), Noisy()
    check_masks(model, data(), squares, engine)
    assert forms_of(engine, model) == {"one by one"}


def test_other_masks_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the generators are not set back before the module is run again."""
    engine, model = BookKeepingEngine(), Noisy()
    check_masks(model, data(), squares, engine)
    monkeypatch.setattr(Randomness, "restore", lambda self: None)
    with pytest.raises(UncoveredParameterError, match="draw the same random numbers"):
        check_masks(model, data(), squares, engine)


def test_a_poisoned_example_does_not_reach_the_others_through_the_masks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # as the one pass shows it, before the others are run again, with masks of their own
    monkeypatch.setattr(vectorised, "without_dropped", lambda summed, *_: summed)
    model, inputs = Noisy(), data()
    expected = under_the_same_masks(model, inputs, squares)
    inputs["x"][2] = torch.nan
    seed_all()
    found = BookKeepingEngine().clipped_sum(
        model, inputs, example_loss=squares, clipping=FlatClipping(C)
    )
    assert torch.isfinite(found.norms).tolist() == [True, True, False, True, True]
    others = [0, 1, 3, 4]
    torch.testing.assert_close(found.norms[others], expected.norms[others])


def test_draws_that_depend_on_the_examples_are_refused() -> None:
    class Unsteady(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            out = F.dropout(x * self.gain, 0.4)
            for _ in range(int(x.abs().sum().item()) % 5):
                out = F.dropout(out, 0.1)
            return self.second(out)

    with pytest.raises(UncoveredParameterError, match="depends on the examples"):
        check_masks(Unsteady(), data(), squares)


def test_establishing_leaves_the_generators_alone() -> None:
    model, engine = Noisy(), BookKeepingEngine()
    seed_all()
    before = Randomness.now(torch.device("cpu"))
    engine.recorder._settled(model, data(), squares)
    assert Randomness.now(torch.device("cpu")).same(before)


@pytest.mark.parametrize("draw", [torch.rand, random.random, np.random.rand])
def test_a_draw_from_any_generator_is_seen(draw: Any) -> None:
    before = Randomness.now(torch.device("cpu"))
    draw(3) if draw is not random.random else draw()
    assert not Randomness.now(torch.device("cpu")).same(before)
    before.restore()
    assert Randomness.now(torch.device("cpu")).same(before)
