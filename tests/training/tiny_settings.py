"""Settings of tiny models, shared by everything that builds one: text, translation, images, sounds."""

from __future__ import annotations

from typing import Any

VOCAB, PAD, CLASSES, WIDTH, LENGTH = 61, 1, 3, 16, 9

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
TEXT = {**SMALL, "num_labels": CLASSES}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
MOE = {**GROUPED, "num_experts_per_tok": 2}
BRIEF = {key: value for key, value in TEXT.items() if key != "intermediate_size"}
TRANSLATION: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": PAD,
    "eos_token_id": 2,
    "decoder_start_token_id": PAD,
}
IMAGE: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 2,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_labels": CLASSES,
}
SOUND: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_kernel": (4, 3),
    "conv_stride": (3, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "classifier_proj_size": 8,
    "num_labels": CLASSES,
    "mask_time_prob": 0.5,  # in training; drawn by numpy
    "mask_time_length": 2,
    "mask_time_min_masks": 1,
}
