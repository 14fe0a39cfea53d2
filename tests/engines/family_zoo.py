"""Tiny models of many families, with random weights: text, images and audio. No downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from engine_zoo import Batch
from tiny_settings import (
    BRIEF,
    CLASSES,
    GROUPED,
    IMAGE,
    LENGTH,
    MOE,
    PAD,
    SOUND,
    T5,
    TEXT,
    TRANSLATION,
    VOCAB,
    WIDTH,
)
from torch import nn

ROWS = 4

Builder = Callable[[], nn.Module]


def _make(model: str, config: str, **settings: Any) -> Builder:
    return lambda: getattr(tf, model)(getattr(tf, config)(**settings))


# family -> (builder, kind of batch); the first 18 are those that other libraries were tried on
FAMILIES: dict[str, tuple[Builder, str]] = {
    "gpt2": (
        _make(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCAB,
            n_embd=WIDTH,
            n_layer=2,
            n_head=2,
            n_positions=40,
            pad_token_id=PAD,
            bos_token_id=0,
            eos_token_id=2,
        ),
        "lm",
    ),
    "opt": (
        _make("OPTForCausalLM", "OPTConfig", **BRIEF, ffn_dim=24, word_embed_proj_dim=WIDTH),
        "lm",
    ),
    "gpt_neox": (_make("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT), "lm"),
    "llama": (_make("LlamaForCausalLM", "LlamaConfig", **GROUPED), "lm"),
    "mistral": (_make("MistralForCausalLM", "MistralConfig", **GROUPED), "lm"),
    "qwen2": (_make("Qwen2ForCausalLM", "Qwen2Config", **TEXT, num_key_value_heads=1), "lm"),
    "qwen3": (_make("Qwen3ForCausalLM", "Qwen3Config", **GROUPED), "lm"),
    "phi3": (_make("Phi3ForCausalLM", "Phi3Config", **TEXT, num_key_value_heads=1), "lm"),
    "gemma2": (_make("Gemma2ForCausalLM", "Gemma2Config", **GROUPED), "lm"),
    "gemma3": (_make("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED), "lm"),
    "mixtral": (_make("MixtralForCausalLM", "MixtralConfig", **MOE, num_local_experts=4), "lm"),
    "t5": (_make("T5ForConditionalGeneration", "T5Config", **T5), "seq2seq"),
    "bart": (_make("BartForConditionalGeneration", "BartConfig", **TRANSLATION), "seq2seq"),
    "bert": (_make("BertForSequenceClassification", "BertConfig", **TEXT), "cls"),
    "distilbert": (
        _make(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=VOCAB,
            dim=WIDTH,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
            max_position_embeddings=40,
            pad_token_id=PAD,
            num_labels=CLASSES,
        ),
        "cls",
    ),
    "roberta": (
        _make("RobertaForSequenceClassification", "RobertaConfig", **TEXT, type_vocab_size=1),
        "cls",
    ),
    "deberta-v2": (
        _make(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            **TEXT,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=4,
            norm_rel_ebd="layer_norm",
        ),
        "cls",
    ),
    "modernbert": (
        _make(
            "ModernBertForSequenceClassification",
            "ModernBertConfig",
            **TEXT,
            cls_token_id=0,
            sep_token_id=2,
            local_attention=4,
        ),
        "cls",
    ),
    "albert": (
        _make("AlbertForSequenceClassification", "AlbertConfig", **TEXT, embedding_size=8),
        "cls",
    ),
    "electra": (
        _make("ElectraForSequenceClassification", "ElectraConfig", **TEXT, embedding_size=8),
        "cls",
    ),
    "mpnet": (_make("MPNetForSequenceClassification", "MPNetConfig", **TEXT), "cls"),
    "xlnet": (
        _make(
            "XLNetForSequenceClassification",
            "XLNetConfig",
            vocab_size=VOCAB,
            d_model=WIDTH,
            n_layer=2,
            n_head=2,
            d_inner=24,
            num_labels=CLASSES,
            pad_token_id=PAD,
        ),
        "cls",
    ),
    "phi": (_make("PhiForCausalLM", "PhiConfig", **TEXT), "lm"),
    "gpt_neo": (
        _make(
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=40,
        ),
        "lm",
    ),
    "falcon": (_make("FalconForCausalLM", "FalconConfig", **BRIEF), "lm"),
    "bloom": (
        _make(
            "BloomForCausalLM",
            "BloomConfig",
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            n_layer=2,
            n_head=2,
        ),
        "lm",
    ),
    "qwen3-moe": (
        _make(
            "Qwen3MoeForCausalLM", "Qwen3MoeConfig", **MOE, num_experts=4, moe_intermediate_size=8
        ),
        "lm",
    ),
    "gpt-oss": (_make("GptOssForCausalLM", "GptOssConfig", **MOE, num_local_experts=4), "lm"),
    "mamba": (
        _make(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            state_size=4,
            time_step_rank=4,
            pad_token_id=PAD,
        ),
        "lm",
    ),
    "m2m": (_make("M2M100ForConditionalGeneration", "M2M100Config", **TRANSLATION), "seq2seq"),
    "pegasus": (
        _make("PegasusForConditionalGeneration", "PegasusConfig", **TRANSLATION),
        "seq2seq",
    ),
    "vit": (_make("ViTForImageClassification", "ViTConfig", **IMAGE), "image"),
    "beit": (
        _make(
            "BeitForImageClassification",
            "BeitConfig",
            **IMAGE,
            use_relative_position_bias=True,
            layer_scale_init_value=0.5,
        ),
        "image",
    ),
    "dinov2": (_make("Dinov2ForImageClassification", "Dinov2Config", **IMAGE), "image"),
    "swin": (
        _make(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=8,
            patch_size=1,
            embed_dim=8,
            depths=[2, 1],
            num_heads=[2, 2],
            window_size=4,
            num_labels=CLASSES,
            drop_path_rate=0.0,
        ),
        "image",
    ),
    "convnext": (
        _make(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            patch_size=2,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_stages=2,
            num_labels=CLASSES,
            image_size=8,
            layer_scale_init_value=0.5,
        ),
        "image",
    ),
    "wav2vec2": (_make("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **SOUND), "sound"),
    "hubert": (_make("HubertForSequenceClassification", "HubertConfig", **SOUND), "sound"),
    "whisper": (
        _make(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **{k: v for k, v in TRANSLATION.items() if k != "max_position_embeddings"},
            num_mel_bins=4,
            max_source_positions=8,
            max_target_positions=12,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        "mel",
    ),
}


def build(family: str, dtype: torch.dtype = torch.float32, *, training: bool = False) -> nn.Module:
    """A tiny model whose weights are large enough for gradients to differ."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False  # as training does
    if dtype is torch.float64:  # the grouped product of experts has no such kernel
        model.config._experts_implementation = "eager"
    stir(model)
    return model.to(dtype).train(training)


def stir(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:
                parameter.normal_(std=0.2)
            elif parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def freeze_partly(model: nn.Module) -> nn.Module:
    """Every third parameter frozen."""
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    return model


def batch(family: str, *, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Batch:
    """Padded rows of different lengths, images, or sounds, with labels."""
    kind = FAMILIES[family][1]
    generator = torch.Generator().manual_seed(1)
    classes = torch.arange(rows) % CLASSES
    if kind == "image":
        pixels = torch.randn(rows, 3, 8, 8, generator=generator)
        return {"pixel_values": pixels.to(dtype), "labels": classes}
    if kind == "sound":
        return {
            "input_values": torch.randn(rows, 60, generator=generator).to(dtype),
            "labels": classes,
        }
    if kind == "mel":
        mel = torch.randn(rows, 4, 16, generator=generator).to(dtype)
        return {"input_features": mel, "labels": _words(rows, 6, generator)}
    lengths = torch.tensor([LENGTH - 2 * (i % 4) for i in range(rows)])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = _words(rows, LENGTH, generator).where(mask == 1, torch.tensor(PAD))
    text = {"input_ids": ids, "attention_mask": mask}
    if kind == "cls":
        return {**text, "labels": classes}
    if kind == "seq2seq":
        return {**text, "labels": _words(rows, 6, generator)}
    return {**text, "labels": ids.where(mask == 1, torch.tensor(-100))}


def _words(rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=generator)
