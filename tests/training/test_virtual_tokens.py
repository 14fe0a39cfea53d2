"""Prompt tuning: logits are longer than labels, by the positions that a model puts before each example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny_runs import host_arguments
from tiny_settings import GROUPED
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_dp import DPArguments, DPTrainer
from hf_dp.training.reductions import IGNORED, own_labels
from hf_dp.training.vectorised import Task, vectorised_loss

VIRTUAL = 3
KINDS: dict[str, Any] = {
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "p-tuning": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=8
    ),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
}


def prompted(kind: str, family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    base: Any = LlamaForCausalLM(LlamaConfig(**GROUPED))
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
        base = GPT2LMHeadModel(
            GPT2Config(vocab_size=61, pad_token_id=1, **sizes, resid_pdrop=0, embd_pdrop=0)
        )
    return get_peft_model(base, KINDS[kind]())


def sentences(lengths: list[int]) -> dict[str, torch.Tensor]:
    width, generator = max(lengths), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": ids.masked_fill(mask == 0, 1),
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, IGNORED),
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_peft_s_own_of_each_example(kind: str, family: str) -> None:
    model, lengths = prompted(kind, family).eval(), [5, 2, 1, 7]
    together = sentences(lengths)
    found = vectorised_loss(Task.CAUSAL_LM)(model, together)
    for place, length in enumerate(lengths):
        if kind == "prefix" and length == 1:
            continue  # nothing to predict: PEFT's is the mean of nothing
        one = {name: value[place : place + 1, :length] for name, value in together.items()}
        torch.testing.assert_close(found[place], model(**one).loss, rtol=1e-5, atol=1e-5)


def test_a_prompt_s_last_position_predicts_the_first_label() -> None:
    labels, mask = torch.tensor([[4, 5, 6]]), torch.tensor([[1, 1, 0]])
    found = own_labels(labels, mask, shifted=True, prompt=2)
    assert found.tolist() == [[IGNORED, 4, 5, IGNORED, IGNORED]]
    assert own_labels(labels, mask, shifted=True).tolist() == [[5, IGNORED, IGNORED]]


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_training_takes_several_examples_at_a_time(tmp_path: Path, kind: str) -> None:
    rows = sentences([2 + place % 4 for place in range(24)])
    data = [
        {name: value[i, : 2 + i % 4].tolist() for name, value in rows.items()} for i in range(24)
    ]
    trainer = DPTrainer(
        model=prompted(kind),
        args=host_arguments(tmp_path, max_steps=2),
        dp_args=DPArguments(noise_multiplier=1.0),
        train_dataset=data,
        data_collator=_padded,
    )
    trainer.train()
    choice = trainer._choice
    assert choice is not None
    assert not choice.alone
    assert choice.description == "causal lm; checked against compute_loss"


def _padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": 1, "attention_mask": 0, "labels": IGNORED}
    return {
        name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])
        for name, fill in fills.items()
    }
