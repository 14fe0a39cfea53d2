"""Padding on the left goes to the end of each example, which then is clipped as it is alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers as tf
from test_clipped_sum import distance
from tiny_settings import BRIEF, CLASSES, GROUPED, PAD, SMALL, TEXT, VOCAB, WIDTH
from torch import Tensor, nn

import hf_dp
from hf_dp.errors import ConfigurationError
from hf_dp.training import clipped_sum as module
from hf_dp.training.alone import moved_to_the_front

C, LENGTHS = 0.7, (3, 9, 5, 1, 7)
Batch = dict[str, Tensor]

GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 40,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "opt": ("OPTForCausalLM", "OPTConfig", {**BRIEF, "ffn_dim": 24, "word_embed_proj_dim": WIDTH}),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {**{k: v for k, v in SMALL.items() if "inter" not in k}, "n_layer": 2, "n_head": 2},
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", {**SMALL, "state_size": 4, "time_step_rank": 2}),
    "bert": ("BertForTokenClassification", "BertConfig", TEXT),
    "gpt2 of classes": (
        "GPT2ForSequenceClassification",
        "GPT2Config",
        {**GPT2, "num_labels": CLASSES},
    ),
}


def build(kind: str) -> nn.Module:
    model, config, settings = MODELS[kind]
    torch.manual_seed(0)
    made: nn.Module = getattr(tf, model)(getattr(tf, config)(**settings)).double().eval()
    return made


def examples(kind: str) -> list[Batch]:
    """Each as a batch of one without padding."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in LENGTHS:
        ids = torch.randint(3, VOCAB, (1, length), generator=generator)
        labels = ids if "class" not in kind and kind != "bert" else ids % CLASSES
        labels = labels[:, 0] if "class" in kind else labels
        found.append({"input_ids": ids, "attention_mask": ids.ne(PAD).long(), "labels": labels})
    return found


def padded(rows: list[Batch], *, both_sides: bool = False) -> Batch:
    """As one batch, with padding on the left."""
    blank = {"input_ids": PAD, "attention_mask": 0, "labels": -100, "position_ids": 0}
    width = max(LENGTHS) + 2 * both_sides
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if values[0].dim() > 1:
            values = [
                nn.functional.pad(
                    v, (width - len(v[0]) - both_sides, 1 * both_sides), value=blank[name]
                )
                for v in values
            ]
        batch[name] = torch.cat(values)
    return batch


def loop(model: nn.Module, rows: list[Batch]) -> tuple[dict[str, Tensor], Tensor]:
    trained = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    norms = []
    for row in rows:
        outputs = model(**row)
        loss, empty = outputs.loss, False
        if outputs.logits.shape[-1] == VOCAB:  # that loss is taken in float32
            own, targets = outputs.logits[0, :-1], row["labels"][0, 1:]
            loss = nn.functional.cross_entropy(own, targets)
            empty = len(targets) == 0
        grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        found = [
            torch.zeros_like(p) if g is None or empty else g
            for p, g in zip(trained.values(), grads, strict=True)
        ]
        norm = torch.stack([g.norm() for g in found]).norm()
        for name, grad in zip(trained, found, strict=True):
            total[name] += grad * min(1.0, C / max(float(norm), 1e-30))
        norms.append(norm)
    return total, torch.stack(norms)


@pytest.mark.parametrize("kind", MODELS)
def test_left_padded_examples_are_clipped_together_as_alone(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, rows = build(kind), examples(kind)
    expected, norms = loop(model, rows)
    with caplog.at_level(logging.WARNING):
        for engine in ("auto", "book_keeping", "two_pass"):
            for both_sides in (False, True) if engine == "two_pass" else (False,):
                batch = padded(rows, both_sides=both_sides)
                found = hf_dp.clipped_sum(model, batch, clipping_norm=C, engine=engine)
                assert distance(found.grads, expected) < 1e-12
                torch.testing.assert_close(found.norms, norms, rtol=1e-12, atol=1e-12)
    assert "one example at a time" not in caplog.text


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_unless_it_is_moved_padding_moves_the_example(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: what is padded on the left is taken as it is."""
    model, rows = build(kind), examples(kind)
    monkeypatch.setattr(module, "_begins_with_padding", lambda batch: False)
    monkeypatch.setattr(module, "_was_tried", lambda *_: True)
    found = hf_dp.clipped_sum(model, padded(rows), clipping_norm=C, engine="book_keeping")
    assert distance(found.grads, loop(model, rows)[0]) > 1e-3


@pytest.mark.parametrize("shared", [False, True])
def test_positions_go_with_their_tokens(shared: bool) -> None:
    """Those that all share count padding as well, which is no example's own: they begin at its tokens."""
    model, rows = build("gpt2"), examples("gpt2")
    for row in rows:
        row["position_ids"] = torch.arange(row["input_ids"].shape[1])[None]
    batch = padded(rows)
    if shared:
        batch["position_ids"] = torch.arange(max(LENGTHS))[None]
    found = hf_dp.clipped_sum(model, batch, clipping_norm=C, engine="book_keeping")
    assert distance(found.grads, loop(model, rows)[0]) < 1e-12


def test_examples_keep_what_lies_between_their_tokens() -> None:
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]])
    batch = {"input_ids": torch.arange(16).view(4, 4), "attention_mask": mask, "note": "kept"}
    moved = moved_to_the_front(nn.Linear(1, 1), batch)
    assert moved is not None
    assert moved["attention_mask"].tolist() == [[1, 0, 1, 0], [0] * 4, [1, 1, 0, 0], [1, 0, 0, 0]]
    assert moved["input_ids"].tolist() == [
        [1, 2, 3, 0],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [15, 12, 13, 14],
    ]
    assert moved["note"] == "kept"


@pytest.mark.parametrize(
    "column",
    [
        {"start_positions": torch.ones(5, dtype=torch.long)},  # counts the padding
        {"scores": torch.ones(5, 9)},  # as wide as the mask, and nobody knows of what
    ],
)
def test_padding_that_belongs_to_the_example_stays(column: Batch) -> None:
    batch = padded(examples("bert")) | column
    assert moved_to_the_front(build("bert"), batch) is None


def test_a_named_engine_refuses_what_cannot_be_moved() -> None:
    torch.manual_seed(0)
    model = tf.BertForQuestionAnswering(tf.BertConfig(**SMALL)).eval()
    batch = padded(examples("bert"))
    labels = batch.pop("labels").clamp_min(0)
    batch |= {"start_positions": labels[:, -1], "end_positions": labels[:, -1]}
    with pytest.raises(ConfigurationError, match="padding on the right"):
        hf_dp.clipped_sum(model, batch, clipping_norm=C, engine="two_pass")
    alone = hf_dp.clipped_sum(model, batch, clipping_norm=C, engine="sequential")
    found = hf_dp.clipped_sum(model, batch, clipping_norm=C)
    assert distance(found.grads, dict(alone.grads)) < 1e-6
