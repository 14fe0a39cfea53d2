"""Tiny models with random weights, one per head, and batches for them. No downloads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from tiny_settings import CLASSES, LENGTH, PAD, SMALL, T5, TRANSLATION, VOCAB, WIDTH
from torch import Tensor, nn

BATCH = 5


def _bert(cls: type, **more: Any) -> nn.Module:
    return cls(tf.BertConfig(**SMALL, num_labels=more.pop("num_labels", CLASSES), **more))


def _roberta(cls: type, **more: Any) -> nn.Module:
    more.setdefault("num_labels", CLASSES)
    return cls(tf.RobertaConfig(**SMALL, type_vocab_size=1, **more))


def _distilbert(cls: type, **more: Any) -> nn.Module:
    more.setdefault("num_labels", CLASSES)
    config = tf.DistilBertConfig(
        vocab_size=VOCAB,
        dim=WIDTH,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=40,
        pad_token_id=PAD,
        **more,
    )
    return cls(config)


def _gpt2(cls: type, **more: Any) -> nn.Module:
    config = tf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        n_positions=40,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=2,
        num_labels=CLASSES,
        **more,
    )
    return cls(config)


def _llama_like(config: type, cls: type) -> nn.Module:
    return cls(config(**SMALL, num_key_value_heads=1, head_dim=8, num_labels=CLASSES))


def _opt() -> nn.Module:
    small = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
    return tf.OPTForCausalLM(tf.OPTConfig(**small, ffn_dim=24, word_embed_proj_dim=WIDTH))


def _t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(tf.T5Config(**T5))


def _bart(cls: type, config: type = tf.BartConfig) -> nn.Module:
    return cls(config(**TRANSLATION, num_labels=CLASSES))


# name -> (builder, kind of labels)
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bert-cls": (lambda: _bert(tf.BertForSequenceClassification), "class"),
    "bert-multi-label": (lambda: _bert(tf.BertForSequenceClassification), "several"),
    "bert-regression": (lambda: _bert(tf.BertForSequenceClassification, num_labels=1), "number"),
    "bert-regressions": (
        lambda: _bert(tf.BertForSequenceClassification, problem_type="regression"),
        "several",
    ),
    "bert-token": (lambda: _bert(tf.BertForTokenClassification), "token"),
    "bert-qa": (lambda: _bert(tf.BertForQuestionAnswering, num_labels=2), "span"),
    "bert-mlm": (lambda: _bert(tf.BertForMaskedLM), "word"),
    "bert-tuple": (lambda: _bert(tf.BertForTokenClassification, return_dict=False), "token"),
    "distilbert-cls": (lambda: _distilbert(tf.DistilBertForSequenceClassification), "class"),
    "distilbert-token": (lambda: _distilbert(tf.DistilBertForTokenClassification), "token"),
    "distilbert-qa": (lambda: _distilbert(tf.DistilBertForQuestionAnswering, num_labels=2), "span"),
    "distilbert-mlm": (lambda: _distilbert(tf.DistilBertForMaskedLM), "word"),
    "roberta-cls": (lambda: _roberta(tf.RobertaForSequenceClassification), "class"),
    "roberta-token": (lambda: _roberta(tf.RobertaForTokenClassification), "token"),
    "roberta-qa": (lambda: _roberta(tf.RobertaForQuestionAnswering, num_labels=2), "span"),
    "roberta-mlm": (lambda: _roberta(tf.RobertaForMaskedLM), "word"),
    "gpt2-lm": (lambda: _gpt2(tf.GPT2LMHeadModel), "word"),
    "gpt2-cls": (lambda: _gpt2(tf.GPT2ForSequenceClassification), "class"),
    "llama-lm": (lambda: _llama_like(tf.LlamaConfig, tf.LlamaForCausalLM), "word"),
    "llama-cls": (lambda: _llama_like(tf.LlamaConfig, tf.LlamaForSequenceClassification), "class"),
    "qwen3-lm": (lambda: _llama_like(tf.Qwen3Config, tf.Qwen3ForCausalLM), "word"),
    "opt-lm": (_opt, "word"),
    "t5-seq2seq": (_t5, "target"),
    "bart-seq2seq": (lambda: _bart(tf.BartForConditionalGeneration), "target"),
    "m2m-seq2seq": (lambda: _bart(tf.M2M100ForConditionalGeneration, tf.M2M100Config), "target"),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The model in evaluation mode, its weights large enough that losses differ between rows."""
    torch.manual_seed(seed)
    model = MODELS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def build_lora(name: str) -> nn.Module:
    """The model with LoRA on every linear layer, B not at its initial zero."""
    from peft import LoraConfig, TaskType, get_peft_model

    kinds = {"class": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}
    kinds |= {"target": "SEQ_2_SEQ_LM", "word": "CAUSAL_LM"}
    kind = None if name.endswith("mlm") else TaskType[kinds[MODELS[name][1]]]
    config = LoraConfig(
        r=2,
        target_modules="all-linear",
        task_type=kind,
        exclude_modules=["qa_outputs"] if name.endswith("qa") else None,  # trained in full
        fan_in_fan_out=name.startswith("gpt2"),
    )
    model = get_peft_model(build(name), config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.3)
    return model.eval()


def batch(name: str, *, padding: str = "right", seed: int = 1, rows: int = BATCH) -> dict[str, Any]:
    """Rows of different lengths; labels sparse, and all ignored in row 3."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [LENGTH - (2 * i) % (LENGTH - 2) for i in range(rows)]
    ids = torch.randint(3, VOCAB, (rows, LENGTH), generator=generator)
    mask = torch.zeros(rows, LENGTH, dtype=torch.long)
    for i, length in enumerate(lengths):
        mask[i, slice(0, length) if padding == "right" else slice(LENGTH - length, None)] = 1
    ids = ids.where(mask == 1, torch.tensor(PAD))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    return inputs | _labels(name, mask, torch.tensor(lengths), generator)


def _labels(name: str, mask: Tensor, lengths: Tensor, generator: torch.Generator) -> dict[str, Any]:
    kind, (rows, length) = MODELS[name][1], mask.shape
    if kind == "number":
        return {"labels": torch.randn(rows, generator=generator)}
    if kind == "several":
        return {"labels": torch.rand(rows, CLASSES, generator=generator).round()}
    if kind == "span":
        start = torch.arange(rows) % 3
        return {"start_positions": start, "end_positions": (start + 1).where(start < 2, length)}
    if kind == "class":
        labels = torch.randint(0, CLASSES, (rows,), generator=generator)
        labels[3] = -100
        return {"labels": labels}
    (low, high), width = ((0, CLASSES) if kind == "token" else (3, VOCAB)), length
    if kind == "target":
        width = 6
        mask = (torch.arange(width) < (lengths[:, None] - 2)).long()
    labels = torch.randint(low, high, (rows, width), generator=generator)
    keep = (torch.rand(rows, width, generator=generator) < 0.7) & (mask == 1)
    labels = labels.where(keep, torch.tensor(-100))
    labels[3] = -100
    return {"labels": labels}


def trainer_for(model: nn.Module, *, smoothing: float = 0.0, **more: Any) -> tf.Trainer:
    """A stock Trainer on the CPU that writes nowhere."""
    args = tf.TrainingArguments(
        tempfile.gettempdir(),
        use_cpu=True,
        report_to=[],
        label_smoothing_factor=smoothing,
        label_names=["labels"],
    )
    cls = more.pop("cls", tf.Trainer)
    return cls(model=model, args=args, **more)


def looped(trainer: tf.Trainer, inputs: dict[str, Any], *, trim: bool = False) -> Tensor:
    """The definition written out again: one row, one call, NaN of an empty mean to zero."""
    losses = []
    for i in range(len(inputs["input_ids"])):
        one = {key: value[i : i + 1].clone() for key, value in inputs.items()}
        if trim:
            kept = one["attention_mask"][0] == 1
            width = len(kept)
            one = {k: v[:, kept] if v.shape[1:] == (width,) else v for k, v in one.items()}
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, one))
    return torch.stack(losses).nan_to_num(nan=0.0)
