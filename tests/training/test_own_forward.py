"""A loss that a model of one's own computes is taken at its word, not at four made-up examples'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_zoo import batch, build
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification, LlamaForCausalLM

import hf_dp
from hf_dp.engines import engine_named
from hf_dp.training import clipped_sum
from hf_dp.training.alone import definition_loss
from hf_dp.training.own_forward import has_library_loss, state_of_loss


class RareClass(BertForSequenceClassification):
    def forward(self, labels: Any = None, **inputs: Any) -> Any:  # type: ignore[override]
        output = super().forward(**inputs)
        weight = torch.ones(output.logits.shape[-1])
        weight[-1] = 0.01
        if labels is not None:
            output["loss"] = F.cross_entropy(output.logits, labels, weight, reduction="sum")
        return output


class Masked(LlamaForCausalLM):
    def forward(self, labels: Any = None, **inputs: Any) -> Any:  # type: ignore[override]
        if labels is not None:
            labels = labels.masked_fill(labels == 7, -100)
        return super().forward(labels=labels, **inputs)


def own_loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    loss: Tensor = model(**inputs)["loss"]
    return loss


def is_right(model: nn.Module, inputs: dict[str, Any], engine: Any = "auto") -> bool:
    options: dict[str, Any] = {"clipping_norm": 0.1}
    found = hf_dp.clipped_sum(model, inputs, engine=engine, **options)
    right = hf_dp.clipped_sum(
        model, inputs, engine="sequential", example_loss=definition_loss(own_loss), **options
    )
    gaps = [(found.grads[name] - g).norm() for name, g in right.grads.items()]
    return bool(torch.stack(gaps).norm() < 1e-4)


CASES = [("bert", RareClass), ("llama", Masked)]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_loss_of_one_s_own_in_forward_is_computed_as_it_is(
    family: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = batch(family, rows=4)
    classes = build(family).config.num_labels
    inputs["labels"] = (
        torch.full((4,), classes - 1) if family == "bert" else inputs["labels"].fill_(7)
    )
    inputs["labels"][0] = 1
    model = kind(build(family).config).eval()
    assert has_library_loss(build(family))
    assert not has_library_loss(model)
    assert is_right(model, inputs)
    monkeypatch.setattr("hf_dp.training.choice.has_library_loss", lambda model: True)  # planted
    assert not is_right(kind(model.config).eval(), inputs)


def test_a_loss_function_that_is_put_there_later_is_noticed() -> None:
    model, inputs, engine = build("llama"), batch("llama", rows=4), engine_named("auto")
    assert is_right(model, inputs, engine)
    before = state_of_loss(model)
    model.loss_function = lambda logits, labels, **_: logits[..., 0].square().mean()
    assert state_of_loss(model) != before
    assert not has_library_loss(model)
    assert is_right(model, inputs, engine)


FUSED = """
import functools, types
def add_fused_lm_head(model):
    original_forward = model.forward
    @functools.wraps(type(model).forward)
    def _fused_forward(self, *args, fused_lm_head=False, **kwargs):
        return original_forward(*args, **kwargs)
    model.forward = types.MethodType(_fused_forward, model)
"""


@pytest.mark.parametrize("name", ["trl.trainer.utils", "mine"])
def test_behind_the_head_that_trl_adds_the_forward_that_it_stands_before_counts(name: str) -> None:
    code: dict[str, Any] = {"__name__": name}
    exec(FUSED, code)
    model, own = build("llama"), Masked(build("llama").config)
    given = build("llama")
    given.forward = lambda labels=None, **inputs: LlamaForCausalLM.forward(given, **inputs)
    before = state_of_loss(model)
    for one in (model, own, given):
        code["add_fused_lm_head"](one)
    assert has_library_loss(model) == (state_of_loss(model) == before) == (name != "mine")
    assert not has_library_loss(own)
    assert not has_library_loss(given)


def test_settings_that_change_a_loss_ask_for_another_choice() -> None:
    model = build("bert")
    before = state_of_loss(model)
    model.config.problem_type = "multi_label_classification"
    assert state_of_loss(model) != before
    assert clipped_sum.state_of_loss is state_of_loss


@pytest.mark.parametrize(
    "family",
    ["gpt2", "llama", "mixtral", "t5", "bart", "bert", "deberta-v2", "xlnet", "vit", "wav2vec2"],
)
def test_losses_of_the_library_are_trusted(family: str) -> None:
    assert has_library_loss(build(family))
