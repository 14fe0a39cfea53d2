"""The classifier of the demo: a pretrained sentence encoder, its mean-pooled output, a linear head.

Mean pooling is how this encoder was trained; a head on its first token starts far behind, and under
privacy there are too few steps to make up for it.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledForSequenceClassification(BertPreTrainedModel):
    """BERT whose final states are averaged over the real tokens and classified by one linear layer."""

    # The folder holds an encoder with a pooler, which is dropped, and no head: nothing to report.
    _keys_to_ignore_on_load_unexpected = (r"^(bert\.)?pooler\.",)
    _keys_to_ignore_on_load_missing = (r"^classifier\.",)

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is getattr(self, "classifier", None):
            # From zero every answer is even: the first steps, where noise weighs most, need not
            # undo a random head.
            nn.init.zeros_(self.classifier.weight)
            nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits ``(B, labels)``, and the mean cross-entropy where `labels` ``(B,)`` are given.

        Args:
            input_ids: Token numbers, ``(B, T)``.
            attention_mask: 1 at real tokens, ``(B, T)``; all are real by default.
            inputs_embeds: Embedded tokens in place of `input_ids`, ``(B, T, d)``.
            labels: The right classes, ``(B,)``.
        """
        states = self.bert(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds
        ).last_hidden_state
        if attention_mask is None:
            attention_mask = states.new_ones(states.shape[:2])
        real = attention_mask.unsqueeze(-1).to(states.dtype)  # (B, T, 1)
        pooled = (states * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
        logits = self.classifier(pooled)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def load_classifier(encoder: Path) -> MeanPooledForSequenceClassification:
    """The pretrained encoder with a head of zeros and no dropout.

    Without dropout a step's only randomness is its batch and its noise; at two epochs under noise
    there is nothing to regularise.

    Args:
        encoder: The folder that `hf_dp.demo.assets.encoder_folder` returns.
    """
    model: MeanPooledForSequenceClassification = (
        MeanPooledForSequenceClassification.from_pretrained(
            encoder,
            num_labels=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    return model


def with_lora(model: MeanPooledForSequenceClassification) -> PeftModel:
    """The classifier with rank-8 LoRA on its two last layers: 111,362 trainable parameters."""
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=["query", "key", "value", "dense"],
        layers_to_transform=[4, 5],
        layers_pattern="layer",
        modules_to_save=["classifier"],
    )
    with warnings.catch_warnings():
        # peft 0.21 reads a property of the model by its old name; nothing for a user to do
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, config)
