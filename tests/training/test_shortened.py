"""Models too large to be copied are tried with few of their layers, each kind of them among these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from test_long_padding import COLUMNS, LOSS, SMALL
from torch import nn

from hf_dp.training import padding
from hf_dp.training.made_up import made_up_rows
from hf_dp.training.shortened import shortened

MIXED = ["full_attention"] * 3 + ["sliding_attention"] * 9
LAYERS = {**SMALL, "num_hidden_layers": 12, "num_key_value_heads": 1, "head_dim": 8}


def made(name: str, **options: Any) -> nn.Module:
    model: type[tf.PreTrainedModel] = getattr(tf, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(model.config_class(**{**LAYERS, **options}))


def depths(model: nn.Module) -> list[int]:
    return [len(module) for module in model.modules() if isinstance(module, nn.ModuleList)]


@pytest.mark.parametrize(
    ("name", "options", "few"),
    [
        ("LlamaForCausalLM", {}, 1),
        ("Gemma2ForCausalLM", {}, 2),
        ("Gemma3ForCausalLM", {"sliding_window": 8}, 6),
        (
            "Qwen2ForCausalLM",
            {"layer_types": MIXED, "use_sliding_window": True, "sliding_window": 8},
            4,
        ),
        ("BertForMaskedLM", {}, 1),
    ],
)
def test_each_kind_of_layer_is_among_them(name: str, options: dict[str, Any], few: int) -> None:
    model = made(name, **options)
    with shortened(model):
        assert depths(model) == [few]
        model(**COLUMNS)
    assert depths(model) == [12]


def test_a_layer_of_other_settings_is_a_kind_of_its_own() -> None:
    model = made("LlamaForCausalLM")
    model.model.layers[7].self_attn.scaling = 2.0
    with shortened(model):
        assert depths(model) == [8]


def matters(model: nn.Module) -> bool:
    return padding.padding_matters(LOSS, model, made_up_rows(model, COLUMNS), 0)


class ReadsAll(tf.BertForMaskedLM):
    """Somebody's own."""


def test_large_models_in_half_precision_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("LlamaForCausalLM").to(torch.bfloat16)
    adapted = get_peft_model(
        made("LlamaForCausalLM").to(torch.bfloat16), LoraConfig(target_modules=["q_proj"])
    )
    limit = sum(p.numel() for p in model.parameters()) // 2
    monkeypatch.setattr(padding, "_MOST_PARAMETERS", limit)
    for one in (model, adapted):
        before = {name: p.clone() for name, p in one.named_parameters()}
        assert not matters(one)
        assert padding.padded_up_to(LOSS, one, COLUMNS, 0) is None
        assert depths(one)[0] == 12
        assert all(torch.equal(p, before[name]) for name, p in one.named_parameters())
    monkeypatch.setattr(padding, "_MOST_PARAMETERS", 10)
    assert matters(model), "even one layer is too large"


def test_padding_that_matters_is_found_in_few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mask all of it is read."""
    columns = {name: value for name, value in COLUMNS.items() if name != "attention_mask"}
    model = made("BertForMaskedLM").to(torch.bfloat16)
    monkeypatch.setattr(
        padding, "_MOST_PARAMETERS", sum(p.numel() for p in model.parameters()) // 2
    )
    rows = made_up_rows(model, columns)
    assert padding.padding_matters(LOSS, model, rows, 0)


def test_somebodys_own_model_is_not_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ReadsAll(tf.BertConfig(**SMALL)).to(torch.bfloat16)
    monkeypatch.setattr(padding, "_MOST_PARAMETERS", 10)
    monkeypatch.setattr(padding, "shortened", lambda _: pytest.fail("shortened"))
    assert matters(model)
