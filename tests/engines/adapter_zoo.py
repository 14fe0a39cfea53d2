"""The families with adapters: LoRA, DoRA, IA3, learned prompts and prefixes."""

from __future__ import annotations

from typing import Any

import torch
from family_zoo import FAMILIES, build, stir
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from torch import nn

# family -> layers that LoRA adapts
LORA = {
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value", "dense"],
    "phi3": ["qkv_proj", "down_proj"],
    "t5": ["q", "v", "wo"],
    "bert": ["query", "dense"],
    "electra": ["query", "dense"],
    "roberta": ["query", "value"],
    "albert": ["query", "ffn"],
    "distilbert": ["q_lin", "lin1"],
    "deberta-v2": ["query_proj", "dense"],
    "modernbert": ["Wqkv", "Wo"],
    "mpnet": ["q", "dense"],
    "xlnet": ["layer_1", "layer_2"],
    "phi": ["q_proj", "fc1"],
    "falcon": ["query_key_value", "dense_h_to_4h"],
    "bloom": ["query_key_value", "dense"],
    "mamba": ["in_proj", "x_proj"],
    "vit": ["q_proj", "fc1"],
    "beit": ["q_proj", "fc1"],
    "dinov2": ["query", "fc1"],
    "swin": ["q_proj", "fc1"],
    "convnext": ["pwconv1", "pwconv2"],
}
_USUAL = ["q_proj", "v_proj", "k_proj"]


def adapted(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    """The model with LoRA, B not at its initial zero; `more` as for ``LoraConfig``."""
    config = LoraConfig(
        r=2, target_modules=LORA.get(family, _USUAL), fan_in_fan_out=family == "gpt2", **more
    )
    model = get_peft_model(build(family, dtype), config)
    stir(model)
    return model.to(dtype).eval()


def with_ia3(family: str, targets: list[str], feedforward: list[str]) -> nn.Module:
    """The model with IA3's vectors."""
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward)
    model = get_peft_model(build(family), config)
    stir(model)
    return model.eval()


def with_prompt(family: str, kind: str) -> nn.Module:
    """The model with learned prompts or prefixes."""
    task = {"lm": TaskType.CAUSAL_LM, "cls": TaskType.SEQ_CLS, "seq2seq": TaskType.SEQ_2_SEQ_LM}
    cls = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}[kind]
    config = cls(task_type=task[FAMILIES[family][1]], num_virtual_tokens=3)
    model = get_peft_model(build(family), config)
    stir(model)
    return model.eval()
