"""What a private step costs, counted: FLOPs against the floor, kernels, peak bytes, host syncs.

Counts are deterministic; times are measured by benchmarks/step_time.py. The floor is plain training's
count plus the upper triangle of every Gram matrix, each shared input once (with F the forward pass, 3 F
and the norms' own cost).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cases import Case, example_losses
from benchmarks.counting import Cost, Counter, Step, cost_of
from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


@pytest.fixture(autouse=True)
def losses_count_as_the_library_s(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "foreign" not in request.node.name:
        monkeypatch.setattr("hf_dp.engines.recorder.is_from_library", lambda loss: True)


BERT = Case("bert", 512, 128, 2)
GPT2 = Case("gpt2", 512, 128, 2)
DEEP = {
    "bert": Case("bert", 64, 16, 2, layers=6),
    "gpt2": Case("gpt2", 64, 16, 2, layers=6),
    "llama": Case("llama", 64, 16, 2, layers=6),
    "bert LoRA": Case("bert", 64, 16, 2, layers=6, lora_rank=8),
}


def every_position(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """A loss that depends on all positions of the last layer, so that none can be left out."""
    hidden = model.base_model(inputs["input_ids"]).last_hidden_state  # type: ignore[operator]
    losses: Tensor = hidden.square().mean((1, 2))
    return losses


def model_of(case: Case, dropout: float = 0.0) -> nn.Module:
    model = case.model()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = dropout  # type: ignore[assignment]
    return model


def plain_step(case: Case, loss: Loss = example_losses, dropout: float = 0.0) -> Step:
    model, inputs = model_of(case, dropout), case.batch()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(loss(model, inputs).sum(), parameters, allow_unused=True)


def our_step(case: Case, loss: Loss = example_losses, dropout: float = 0.0) -> Step:
    model, inputs, engine = model_of(case, dropout), case.batch(), BookKeepingEngine()
    clipping = FlatClipping(0.1)
    return lambda: engine.clipped_sum(model, inputs, example_loss=loss, clipping=clipping)


@functools.cache
def plain_cost(case: Case, loss: Loss, dropout: float) -> Cost:
    return cost_of(plain_step(case, loss, dropout))


def costs(case: Case, loss: Loss = example_losses, dropout: float = 0.0) -> tuple[Cost, Cost]:
    """Of a plain step and of ours on the same model and batch."""
    return plain_cost(case, loss, dropout), cost_of(our_step(case, loss, dropout))


def triangles(case: Case, widths: list[int]) -> int:
    """FLOPs of the upper triangles of Gram matrices of tensors that wide."""
    return case.examples * case.positions**2 * sum(widths)


def bert_widths(case: Case) -> list[int]:
    d = case.width
    query_key_value, attention_output = [d, 3 * d], [d, d]
    return case.layers * [*query_key_value, *attention_output, d, 4 * d, 4 * d, d]


def gpt2_widths(case: Case, vocabulary: int = 8192) -> list[int]:
    d = case.width
    return case.layers * [d, 3 * d, d, d, d, 4 * d, 4 * d, d] + [d, vocabulary]


def flops_over_floor(case: Case, loss: Loss, widths: list[int]) -> float:
    plain, ours = costs(case, loss)
    return ours.flops / (plain.flops + triangles(case, widths))


def test_flops_of_bert_are_within_3_percent_of_the_floor() -> None:
    assert flops_over_floor(BERT, every_position, bert_widths(BERT)) <= 1.03


def test_flops_of_gpt2_are_within_3_percent_of_the_floor() -> None:
    assert flops_over_floor(GPT2, example_losses, gpt2_widths(GPT2)) <= 1.03


def test_without_sharing_the_input_s_gram_matrix_the_floor_is_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hf_dp.layers.gram.same_numbers", lambda one, other: False)
    assert flops_over_floor(BERT, every_position, bert_widths(BERT)) > 1.03


def test_without_triangles_the_floor_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_dp.layers.gram.row_blocks", lambda positions: [(0, positions)])
    assert flops_over_floor(BERT, every_position, bert_widths(BERT)) > 1.03


def test_a_classifier_s_last_layer_costs_one_position_where_plain_training_pays_for_all() -> None:
    plain, ours = costs(BERT)
    assert ours.flops < plain.flops


def test_positions_written_out_cost_no_flops_beyond_plain_training() -> None:
    case = Case("gpt2", 64, 128, 2)
    plain, ours = costs(case)
    head = triangles(case, [64, 8192])
    assert ours.flops <= 1.02 * (plain.flops + 1.5 * head)


@pytest.mark.parametrize("case", [BERT, GPT2], ids=["bert", "gpt2"])
def test_peak_bytes_are_within_5_percent_of_plain_training(case: Case) -> None:
    plain, ours = costs(case)
    assert ours.peak_bytes <= 1.05 * plain.peak_bytes


def test_lora_costs_no_more_flops_and_bytes_than_plain_training() -> None:
    plain, ours = costs(Case("gpt2", 512, 128, 2, lora_rank=8))
    assert ours.flops <= 1.001 * plain.flops
    assert ours.peak_bytes <= 1.01 * plain.peak_bytes


@pytest.mark.parametrize("name", DEEP)
def test_kernels_are_less_than_one_and_a_half_times_those_of_plain_training(name: str) -> None:
    plain, ours = costs(DEEP[name])  # without dropout, which would add to both
    assert ours.kernels < 1.5 * plain.kernels


def test_small_layers_of_twelve_cost_hardly_more_kernels_than_plain_training() -> None:
    plain, ours = costs(Case("bert", 64, 16, 2, layers=12))
    assert ours.kernels < 1.1 * plain.kernels


def test_layers_answered_for_one_by_one_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_dp.engines.together.SMALL", 0)
    with pytest.raises(AssertionError):
        test_small_layers_of_twelve_cost_hardly_more_kernels_than_plain_training()
    with pytest.raises(AssertionError):
        test_kernels_are_less_than_one_and_a_half_times_those_of_plain_training("bert")


def test_a_foreign_loss_costs_passes_through_itself_alone() -> None:
    """Two backward, and three forward and backward on a row or two, each with a copy of its batch."""
    plain, ours = costs(Case("gpt2", 64, 16, 2, layers=6))
    assert ours.kernels < 1.5 * plain.kernels + 180
    assert ours.flops < 1.3 * plain.flops


def syncs(step: Step) -> int:
    """How often a step reads a number from the device."""
    step()
    with Counter() as counter:
        step()
    waits = ("_local_scalar_dense", "is_nonzero", "nonzero")
    return sum(count for name, count in counter.names.items() if any(w in name for w in waits))


def test_an_accelerator_is_waited_for_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_dp.layers.mat.Mat.trimmed", lambda self: False)  # on the CPU only
    case = Case("gpt2", 64, 16, 2, layers=3)
    assert syncs(our_step(case)) == syncs(plain_step(case)) + 1
