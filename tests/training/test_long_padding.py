"""Padding that matters to longer texts alone: those share it with nobody."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_runs import trainer_for
from torch import Tensor, nn
from torch.nn import functional as F
from user_runs import Recorded, clipped, close

from hf_dp import clipped_sum
from hf_dp.training import padding
from hf_dp.training.choice import choose
from hf_dp.training.losses import vectorised_loss
from hf_dp.training.made_up import made_up_rows
from hf_dp.training.padding import padded_up_to, padding_matters
from hf_dp.training.tasks import Task

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
KEYS = {"num_key_value_heads": 1, "head_dim": 8, "keep_window_size": 8}
COLUMNS = {name: torch.ones(1, 5).long() for name in ("input_ids", "attention_mask", "labels")}
LOSS = vectorised_loss(Task.CAUSAL_LM)
C = 0.01


def of(name: str, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: type[tf.PreTrainedModel] = getattr(tf, name)
        made = model(model.config_class(**{**SMALL, "max_position_embeddings": 300, **options}))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
        return made


def doge(**options: Any) -> nn.Module:
    """Keeps the largest of so many keys, and whether any is left out follows padding."""
    return of("DogeForCausalLM", **{**KEYS, **options})


class InBlocks(tf.LlamaForCausalLM):
    """Sees after 100 tokens how far it was padded; no configuration says so."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        found = super().forward(input_ids=input_ids, **options)
        return scaled(found, input_ids)


def scaled(found: Any, ids: Tensor) -> Any:
    found.logits = found.logits * (1 + max(0, ids.shape[1] - 100))
    return found


class Translator(tf.T5ForConditionalGeneration):
    """Likewise."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        return scaled(super().forward(input_ids=input_ids, **options), input_ids)


def in_blocks() -> nn.Module:
    return InBlocks(tf.LlamaConfig(**SMALL, max_position_embeddings=300))


def upto(model: nn.Module) -> int | None:
    return padded_up_to(LOSS, model.train(), COLUMNS, 0)


def test_windows_that_show_padding_are_found() -> None:
    assert upto(doge()) == 8
    assert upto(in_blocks()) == 0
    for cls, expected in ((Translator, 0), (tf.T5ForConditionalGeneration, None)):
        sizes = {
            "vocab_size": 50,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 1,
            "num_heads": 2,
        }
        model = cls(tf.T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0))
        loss = vectorised_loss(Task.SEQ2SEQ_LM)
        assert padded_up_to(loss, model.train(), COLUMNS, 0) == expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LlamaForCausalLM", {}),
        ("MistralForCausalLM", {"sliding_window": 16, "num_key_value_heads": 1}),
        ("Gemma2ForCausalLM", {"sliding_window": 8, "num_key_value_heads": 1, "head_dim": 8}),
        ("GPTNeoXForCausalLM", {}),
    ],
)
def test_windows_that_do_not_are_not(name: str, options: dict[str, Any]) -> None:
    assert upto(of(name, **options)) is None


@pytest.mark.parametrize("keys", [8, 40, 2048])
def test_as_many_keys_as_are_chosen_is_the_end(keys: int) -> None:
    """Whatever a trial shows: products of it may be the true number."""
    model = doge(keep_window_size=keys)
    assert upto(model) == (keys if keys < 298 else None), "no text is longer than the positions"


def test_what_the_model_has_no_positions_for_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(padding, "_is_alike", lambda *given: tried.append(given[3]) or True)
    assert upto(of("LlamaForCausalLM", max_position_embeddings=64)) is None
    assert tried == []
    for positions in (102, 300):
        assert upto(of("LlamaForCausalLM", max_position_embeddings=positions)) is None
    assert [lengths[0] for lengths in tried] == [100, 139]
    assert all(sum(n > 65 for n in lengths) >= 5 for lengths in tried)


def test_memory_that_runs_out_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def out(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError

    assert padded_up_to(out, of("LlamaForCausalLM"), COLUMNS, 0) == 0


def texts(lengths: list[int]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(3, 50, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)} for ids in made]


def pad(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.stack([F.pad(torch.tensor(r[name]), (0, width - len(r[name])), value=fill) for r in rows])
        for name, fill in fills.items()
    }  # fmt: skip


def loop(model: nn.Module, rows: list[dict[str, Any]]) -> Tensor:
    model.train()
    total = torch.zeros(())
    for row in rows:
        grads = torch.autograd.grad(model(**pad([row])).loss, list(model.parameters()))
        total = total + clipped(torch.cat([grad.flatten() for grad in grads]), C)
    return total


LENGTHS = [3, 5, 8, 8, 9, 9, 14, 20, 30]


def test_a_step_on_them_is_a_loop(
    tmp_path: Path, recorded: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    rows = texts(LENGTHS)
    caplog.set_level(logging.INFO)
    trainer = trainer_for(
        tmp_path,
        model=doge(),
        train_dataset=rows,
        data_collator=pad,
        host={"max_steps": 1, "per_device_train_batch_size": 16},
        dp={"clipping_norm": C, "expected_batch_size": len(rows), "private_loss": False},
    )
    trainer.train()
    assert close(recorded.sums[0], loop(doge(), rows), 1e-4)
    widths = sorted(tuple(b["input_ids"].shape) for b in recorded.batches[0])
    if not shows_padding_anyway():
        assert widths == [(1, 14), (1, 20), (1, 30), (2, 9), (4, 8)]
        assert "texts of more than 8 tokens" in caplog.text


def shows_padding_anyway() -> bool:
    """Doge of transformers 5.17 does, in texts of any length."""
    return padding_matters(LOSS, doge(), made_up_rows(doge(), COLUMNS), 0)


def test_a_loop_of_ones_own_takes_them_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    for lengths, alone in (([3, 8, 5], False), ([12, 12], False), ([3, 12], True)):
        caplog.clear()
        rows = texts(lengths)
        summed = clipped_sum(doge().train(), pad(rows), clipping_norm=C)
        found = torch.cat([grad.flatten() for grad in summed.grads.values()])
        assert close(found, loop(doge(), rows), 1e-4)
        assert ("one at a time" in caplog.text) == (alone or shows_padding_anyway())


def test_a_model_whose_blocks_no_configuration_names_has_each_text_alone() -> None:
    choice = choose(in_blocks(), COLUMNS, lambda m, x: m(**x).loss, given=LOSS, trusted=False)
    assert choice.alone
