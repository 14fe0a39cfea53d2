"""Clipped sums of tiny models of many families against a plain loop over examples, by every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_zoo import adapted, with_ia3, with_prompt
from engine_zoo import Batch, assert_same_sum, half_clipped, naive, own_losses
from family_zoo import FAMILIES, batch, build, freeze_partly
from left_alone import left_alone
from torch import Tensor, nn

from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine, engine_named
from hf_dp.engines.base import ExampleLoss
from hf_dp.engines.rows import select_rows

pytestmark = pytest.mark.filterwarnings("ignore:.loss_type=None. was set:UserWarning")

# These compute in float32 inside whatever they are given, in an order that the batch's size decides.
FLOAT32_INSIDE = {"gemma2", "gemma3", "gpt_neo"}


def against_the_loop(
    model: nn.Module,
    inputs: Batch,
    tolerance: float,
    *,
    engines: tuple[str, ...] = ("book_keeping",),
    loss: ExampleLoss = own_losses,
) -> None:
    clipping_norm = half_clipped(naive(model, inputs, 1.0, loss).norms)
    expected = naive(model, inputs, clipping_norm, loss)
    assert float(expected.norms.max()) > 0
    for name in engines:
        with left_alone(model):
            found = engine_named(name).clipped_sum(
                model, inputs, example_loss=loss, clipping=FlatClipping(clipping_norm)
            )
        assert_same_sum(found, expected, tolerance)


def both_precisions(family: str, make: Any, loss: ExampleLoss = own_losses) -> None:
    double = 1e-6 if family in FLOAT32_INSIDE else 1e-12
    inputs = batch(family, dtype=torch.float64)
    against_the_loop(
        make(torch.float64), inputs, double, engines=("book_keeping", "two_pass"), loss=loss
    )
    against_the_loop(make(torch.float32), batch(family), 1e-5, loss=loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_equals_the_loop(family: str) -> None:
    both_precisions(family, lambda dtype: build(family, dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_partly_frozen_model_equals_the_loop(family: str) -> None:
    both_precisions(family, lambda dtype: freeze_partly(build(family, dtype)))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_equals_the_loop(family: str) -> None:
    both_precisions(family, lambda dtype: adapted(family, dtype))


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize(
    "targets", [["experts.gate_up_proj", "experts.down_proj"], ["gate.weight"]]
)
def test_lora_of_parameters_equals_the_loop(family: str, targets: list[str]) -> None:
    both_precisions(family, lambda dtype: adapted(family, dtype, target_parameters=targets))
    alone = select_rows(batch(family), [0])  # one wrapper within another is told apart by outputs
    against_the_loop(adapted(family, target_parameters=targets), alone, 1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "opt", "swin"])
def test_dora_equals_the_loop(family: str) -> None:
    both_precisions(family, lambda dtype: adapted(family, dtype, use_dora=True))


@pytest.mark.parametrize(
    ("family", "targets", "feedforward"),
    [
        ("bert", ["key", "value", "output.dense"], ["output.dense"]),
        ("llama", ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        ("t5", ["k", "v", "wo"], ["wo"]),
    ],
)
def test_ia3_equals_the_loop(family: str, targets: list[str], feedforward: list[str]) -> None:
    both_precisions(family, lambda dtype: with_ia3(family, targets, feedforward).to(dtype))


def after_the_prompt(model: nn.Module, inputs: Batch) -> Tensor:
    """As `own_losses`, without the positions of the learned prompt."""
    logits, labels = model(**inputs).logits, inputs["labels"]
    if labels.dim() == 1:
        return nn.functional.cross_entropy(logits, labels, reduction="none")
    logits = logits[:, -labels.shape[1] :]
    each = nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    return each.sum(1) / (labels != -100).sum(1).clamp(min=1)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart"])
def test_learned_prompts_and_prefixes_equal_the_loop(family: str, kind: str) -> None:
    both_precisions(
        family, lambda dtype: with_prompt(family, kind).to(dtype), loss=after_the_prompt
    )


@pytest.mark.parametrize("family", ["bert", "gpt2", "swin", "mamba", "mixtral"])
def test_the_sequential_engine_equals_the_loop(family: str) -> None:
    inputs = batch(family, dtype=torch.float64)
    against_the_loop(build(family, torch.float64), inputs, 1e-12, engines=("sequential", "auto"))


@pytest.mark.parametrize(
    "family", ["opt", "gemma3", "mixtral", "deberta-v2", "swin", "mamba", "beit"]
)
def test_batches_of_other_sizes_equal_the_loop(family: str) -> None:
    """One example, as many as there are positions, and fewer again, with what was learned of the first."""
    engine = BookKeepingEngine()
    model = build(family, torch.float64)
    tolerance = 1e-6 if family in FLOAT32_INSIDE else 1e-12
    for rows in (1, 3, 9):
        inputs = batch(family, rows=rows, dtype=torch.float64)
        if "input_ids" in inputs and rows == 9:  # other lengths too
            inputs = {k: v[:, :7] if v.dim() > 1 else v for k, v in inputs.items()}
        expected = naive(model, inputs, 0.5)
        found = engine.clipped_sum(
            model, inputs, example_loss=own_losses, clipping=FlatClipping(0.5)
        )
        assert_same_sum(found, expected, tolerance)


SPECIAL = {
    "opt": {"lookup"},
    "gemma3": {"lookup"},
    "bart": {"lookup", "vectorised"},
    "mixtral": {"vectorised", "experts"},
    "qwen3-moe": {"vectorised", "experts"},
    "gpt-oss": {"vectorised", "experts"},
    "mamba": {"vectorised"},
    "deberta-v2": {"vectorised"},
    "vit": {"vectorised"},
    "swin": {"vectorised"},
    "wav2vec2": {"vectorised"},
    "llama": set(),
    "bert": set(),
    "t5": set(),
    "falcon": set(),
}


@pytest.mark.parametrize("family", SPECIAL)
def test_the_generic_rule_takes_only_what_no_formula_fits(family: str) -> None:
    engine, model = BookKeepingEngine(), build(family, torch.float64)
    inputs = batch(family, dtype=torch.float64)
    engine.clipped_sum(model, inputs, example_loss=own_losses, clipping=FlatClipping(0.5))
    points = engine.recorder.coverage(model).points
    generic = [point for point in points if point.generic is not None]
    forms: set[str] = set().union(*(point.generic.forms for point in generic if point.generic))
    assert forms == SPECIAL[family]
    assert all(point.name for point in generic)  # none climbed up to the model itself
    assert len(points) - len(generic) >= 10
