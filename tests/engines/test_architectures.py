"""Clipped sums of real architectures, in full and with LoRA, against a plain loop over examples."""

from __future__ import annotations

import pytest
import torch
from engine_zoo import (
    Batch,
    assert_same_sum,
    batch,
    build,
    build_lora,
    half_clipped,
    hosts_loss,
    naive,
    own_losses,
)
from torch import nn

from hf_dp.training.clipped_sum import clipped_sum

COVERED = [
    "bert-cls",
    "bert-mlm",  # decoder tied to the word embeddings
    "distilbert-cls",
    "roberta-cls",
    "roberta-mlm",
    "gpt2-lm",  # tied
    "llama-lm",
    "llama-lm-tied",
    "qwen3-lm",
    "t5-seq2seq",  # tied three times, relative bias
    "albert-cls",  # one layer, called three times
    "opt-lm",  # positions made of the mask, tokens folded into the first axis
    "bart-seq2seq",  # scaled embedding, tied three times
    "m2m-seq2seq",
]
WITH_LORA = [
    name
    for name in COVERED
    if name not in ("llama-lm-tied", "albert-cls", "opt-lm", "bart-seq2seq", "m2m-seq2seq")
]


def against_the_loop(model: nn.Module, inputs: Batch, clipping_norm: float | None = None) -> None:
    """In float64, on a loss of the test's own, with every engine."""
    if clipping_norm is None:
        clipping_norm = half_clipped(naive(model, inputs, 1.0).norms)
    expected = naive(model, inputs, clipping_norm)
    for engine in ("book_keeping", "two_pass", "sequential", "auto"):
        found = clipped_sum(
            model, inputs, clipping_norm=clipping_norm, engine=engine, example_loss=own_losses
        )
        assert_same_sum(found, expected, 1e-12)


def as_people_call_it(model: nn.Module, inputs: Batch) -> None:
    """In float32, on the loss that the model itself returns for one example.

    Targets of models that translate begin with one to be learned: what is ignored before it is padding.
    """
    if model.config.is_encoder_decoder:
        inputs = {**inputs, "labels": inputs["labels"].clone()}
        some = (inputs["labels"] != -100).any(1)
        inputs["labels"][some, 0] = 5
    clipping_norm = half_clipped(naive(model, inputs, 1.0, hosts_loss).norms)
    expected = naive(model, inputs, clipping_norm, hosts_loss)
    for engine in ("book_keeping", "two_pass", "sequential"):
        found = clipped_sum(model, inputs, clipping_norm=clipping_norm, engine=engine)
        assert_same_sum(found, expected, 1e-5)


@pytest.mark.parametrize("name", COVERED)
def test_full_fine_tuning_equals_the_loop(name: str) -> None:
    as_people_call_it(build(name), batch(name))
    against_the_loop(build(name, torch.float64), batch(name))


@pytest.mark.parametrize("name", WITH_LORA)
def test_lora_equals_the_loop(name: str) -> None:
    as_people_call_it(build_lora(name), batch(name))
    against_the_loop(build_lora(name, torch.float64), batch(name))


@pytest.mark.parametrize("name", ["bert-cls", "gpt2-lm", "t5-seq2seq"])
def test_a_batch_of_one_equals_the_loop(name: str) -> None:
    model = build(name, torch.float64)
    inputs = {key: value[:1] for key, value in batch(name).items()}
    against_the_loop(model, inputs, 0.5)


@pytest.mark.parametrize("rows", [6, 9])
def test_a_batch_as_large_as_the_query_is_long_equals_the_loop(rows: int) -> None:
    name = "t5-seq2seq"
    model, inputs = build(name, torch.float64), batch(name, rows=rows)
    assert rows in (inputs["input_ids"].shape[1], inputs["labels"].shape[1])
    against_the_loop(model, inputs, 0.5)


@pytest.mark.parametrize("name", ["bert-cls", "gpt2-lm", "llama-lm", "t5-seq2seq"])
def test_a_partly_frozen_model_equals_the_loop(name: str) -> None:
    model, inputs = build(name, torch.float64), batch(name)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    against_the_loop(model, inputs, 0.5)


def test_bias_terms_alone_equal_the_loop() -> None:
    model, inputs = build("bert-cls", torch.float64), batch("bert-cls")
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.endswith("bias"))
    against_the_loop(model, inputs, 0.5)


def test_a_relative_bias_alone_equals_the_loop() -> None:
    model, inputs = build("t5-seq2seq", torch.float64), batch("t5-seq2seq")
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("relative_attention_bias" in parameter_name)
    against_the_loop(model, inputs, 0.5)


@pytest.mark.parametrize("shared", [True, False])
def test_explicit_position_ids_equal_the_loop(shared: bool) -> None:
    model, inputs = build("gpt2-lm", torch.float64), batch("gpt2-lm")
    rows, width = inputs["input_ids"].shape
    positions = torch.arange(width)[None]
    expected = naive(model, inputs, 0.5)
    inputs["position_ids"] = positions if shared else positions.repeat(rows, 1)
    for engine in ("book_keeping", "two_pass", "sequential"):
        found = clipped_sum(
            model, inputs, clipping_norm=0.5, engine=engine, example_loss=own_losses
        )
        assert_same_sum(found, expected, 1e-12)
