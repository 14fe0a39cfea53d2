"""The models and batches that the benchmarks of one step run on: real architectures, two layers deep.

Two layers are enough: every layer of a deep model does the same, and a step takes well under a second.
Dropout is off, which is the harder comparison: it costs plain training as much as private training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_dp.training.tasks import Task
from hf_dp.training.vectorised import VectorisedLoss, vectorised_loss

VOCABULARY = 8192
LAYERS = 2
_LORA_TARGETS = {
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Case:
    """One model on one batch.

    Attributes:
        kind: "bert", "gpt2" or "llama".
        width: Hidden size.
        positions: Tokens per example, T.
        examples: Examples in the micro-batch, B.
        tied: Whether the head is the embedding's transpose; a classifier has no such head.
        lora_rank: 0 for full fine-tuning.
        layers: Depth.
    """

    kind: str
    width: int
    positions: int
    examples: int
    tied: bool = False
    lora_rank: int = 0
    layers: int = LAYERS

    @property
    def name(self) -> str:
        """What tables call it."""
        tied = "" if self.kind == "bert" else " tied" if self.tied else " untied"
        lora = f" LoRA r={self.lora_rank}" if self.lora_rank else ""
        return f"{self.kind}{tied} d={self.width} T={self.positions} B={self.examples}{lora}"

    def model(self) -> nn.Module:
        """Fresh, with fixed random weights, in training mode."""
        torch.manual_seed(0)
        model: nn.Module = _MODELS[self.kind](self)
        if self.lora_rank:
            options = LoraConfig(
                r=self.lora_rank,
                lora_dropout=0.0,
                target_modules=_LORA_TARGETS[self.kind],
                fan_in_fan_out=self.kind == "gpt2",
            )
            model = get_peft_model(model, options)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zero at first, and then the gradient of A is zero
                    nn.init.normal_(parameter, std=0.02)
        return model.train()

    def batch(self) -> dict[str, Tensor]:
        """Random tokens without padding, and labels."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(
            5, VOCABULARY, (self.examples, self.positions), generator=generator
        )  # as many repetitions as in a text would only make the embedding's part cheaper
        labels = ids[:, 0] % 2 if self.kind == "bert" else ids
        # positions row by row, since peers cannot attribute one row to all examples
        where = torch.arange(self.positions).expand(self.examples, -1).contiguous()
        return {"input_ids": ids, "position_ids": where, "labels": labels}


def library_losses(inputs: Mapping[str, Any]) -> VectorisedLoss:
    """`example_losses` as `DPTrainer` computes them; a loss from elsewhere is proved on every batch."""
    classifies = inputs["labels"].dim() == 1
    return vectorised_loss(Task.SEQUENCE_CLASSIFICATION if classifies else Task.CAUSAL_LM)


def example_losses(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Mean cross-entropy over each example's own targets, ``(B,)``; the same for every variant."""
    labels = inputs["labels"]
    logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
    if labels.dim() == 1:
        return nn.functional.cross_entropy(logits, labels, reduction="none")
    rows, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    each = nn.functional.cross_entropy(rows, targets, reduction="none")
    return each.view(len(labels), -1).mean(1)


def _bert(case: Case) -> nn.Module:
    config = tf.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=max(1, case.width // 64),
        intermediate_size=4 * case.width,
        max_position_embeddings=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: nn.Module = tf.BertForSequenceClassification(config)
    return model


def _gpt2(case: Case) -> nn.Module:
    config = tf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=case.width,
        n_layer=case.layers,
        n_head=max(1, case.width // 64),
        n_positions=512,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=case.tied,
        use_cache=False,
    )
    model: nn.Module = tf.GPT2LMHeadModel(config)
    return model


def _llama(case: Case) -> nn.Module:
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=max(1, case.width // 64),
        num_key_value_heads=max(1, case.width // 64),
        intermediate_size=case.width * 8 // 3 // 64 * 64 or 3 * case.width,
        max_position_embeddings=512,
        tie_word_embeddings=case.tied,
        use_cache=False,
    )
    model: nn.Module = tf.LlamaForCausalLM(config)
    return model


_MODELS: Mapping[str, Callable[[Case], nn.Module]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
}

# 1024 to 2048 tokens per step: enough for the matrix products to run at their usual speed
FULL = (
    Case("bert", 512, 64, 16),
    Case("bert", 512, 128, 8),
    Case("bert", 512, 256, 4),
    Case("bert", 512, 512, 4),
    Case("bert", 768, 128, 8),
    Case("bert", 768, 512, 4),
    Case("gpt2", 512, 64, 16),
    Case("gpt2", 512, 128, 8),
    Case("gpt2", 512, 512, 4),
    Case("gpt2", 768, 256, 4),
    Case("gpt2", 512, 128, 8, tied=True),
    Case("gpt2", 768, 256, 4, tied=True),
    Case("llama", 512, 128, 8),
    Case("llama", 512, 256, 8),
    Case("llama", 768, 512, 4),
    Case("llama", 512, 256, 8, tied=True),
    Case("llama", 768, 128, 8, tied=True),
)
LORA = (
    Case("bert", 512, 128, 8, lora_rank=8),
    Case("bert", 768, 512, 4, lora_rank=8),
    Case("gpt2", 512, 128, 8, lora_rank=8),
    Case("gpt2", 768, 256, 4, tied=True, lora_rank=8),
    Case("llama", 512, 256, 8, lora_rank=8),
    Case("llama", 768, 128, 8, lora_rank=8),
)
