"""Masks unlike those of the made-up examples: where nothing is attended to, attention goes to padding, too.

What removes one ordinary long text, and so the padding of all the others, must move the sum by no more
than its own share.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import host_arguments
from tiny_settings import SMALL, SOUND, T5, TRANSLATION, VOCAB, WIDTH
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    GPT2Config,
    GPT2LMHeadModel,
    HubertConfig,
    HubertForSequenceClassification,
    MBartConfig,
    MBartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_dp import DPArguments, DPTrainer, clipped_sum
from hf_dp.errors import ConfigurationError
from hf_dp.sums import ClippedSum
from hf_dp.training import clipped_sum as own_loop
from hf_dp.training import joining
from hf_dp.training.batches import LogicalBatchCollator
from hf_dp.training.joining import MASK, TARGET_MASK, Tried, attended, ignores_all, kind_of
from hf_dp.training.tasks import Task
from hf_dp.training.vectorised import vectorised_loss

C = 0.5
FILLS = {"labels": -100}
Rows = list[dict[str, Any]]


def collate(rows: Rows) -> dict[str, Tensor]:
    made = {}
    for name in rows[0]:
        values = [torch.as_tensor(row[name]) for row in rows]
        fill = FILLS.get(name, 0)
        ragged = values[0].dim() > 0
        made[name] = pad_sequence(values, True, fill) if ragged else torch.stack(values)
    return made


def loud(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def t5() -> nn.Module:
    return loud(T5ForConditionalGeneration(T5Config(**T5)))


def answering() -> nn.Module:
    return loud(BertForQuestionAnswering(BertConfig(**SMALL)))


def hubert() -> nn.Module:
    settings = {**SOUND, "mask_time_prob": 0.0, "feat_extract_norm": "layer"}
    return loud(HubertForSequenceClassification(HubertConfig(**settings)))


def text(length: int, place: int = 0, mask: list[int] | None = None) -> dict[str, Any]:
    ids = [5 + (place + i) % 11 for i in range(length)]
    return {"input_ids": ids, MASK: mask or [1] * length}


def translation(length: int, place: int = 0, mask: list[int] | None = None) -> dict[str, Any]:
    return {**text(length, place, mask), "labels": [7 + place % 5, 9, 6]}


def question(length: int, place: int = 0, mask: list[int] | None = None) -> dict[str, Any]:
    return {**text(length, place, mask), "start_positions": 0, "end_positions": 1}


def sound(length: int, place: int = 0, mask: list[int] | None = None) -> dict[str, Any]:
    wave = torch.randn(50 * length, generator=torch.Generator().manual_seed(place))
    ones = len(wave) if mask is None else sum(mask)
    own = (torch.arange(len(wave)) < ones).long()
    return {"input_values": wave, MASK: own, "labels": place % 2}


HIDDEN, LATE, FEW = [0] * 4, [0, 0, 1, 1], [1, 1, 1, 0]
CASES = {
    "T5, nothing attended": (t5, translation, HIDDEN),
    "question answering, nothing attended": (answering, question, HIDDEN),
    "question answering, attended late": (answering, question, LATE),
    "Hubert, three samples attended": (hubert, sound, FEW),
}


def moved(folder: Path, model: nn.Module, rows: Rows, one: dict[str, Any], plain: Rows) -> float:
    """What removing one example moves, as a multiple of C, in the trainer's own micro-batches."""
    trainer = DPTrainer(
        model=model,
        args=host_arguments(folder, per_device_train_batch_size=64),
        dp_args=DPArguments(noise_multiplier=1.0, expected_batch_size=4),
        train_dataset=plain,
        data_collator=collate,
    )
    loader: Any = trainer.get_train_dataloader()
    choice = trainer._choice
    assert choice is not None
    assert not choice.alone

    def summed(of: Rows) -> dict[str, Tensor]:
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for batch in loader.collate_fn(of).micro_batches:
            found = trainer.engine.clipped_sum(
                model, batch, example_loss=choice.example_loss, clipping=own_loop.FlatClipping(C)
            )
            for name, grad in found.grads.items():
                total[name] += grad
        return total

    return apart(summed([*rows, one]), summed(rows)) / C


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return float(torch.stack([(one[name] - other[name]).norm() for name in one]).norm())


@pytest.mark.parametrize("case", CASES)
def test_one_example_moves_no_more_than_its_share_whatever_masks_others_have(
    case: str, tmp_path: Path
) -> None:
    make, row, mask = CASES[case]
    plain = [row(4 + i % 3, i) for i in range(12)]
    odd = [row(4, i, mask) for i in range(8)]
    assert moved(tmp_path, make(), [*plain[:3], *odd], row(18, 99), plain) < 1.001


@pytest.mark.parametrize("case", ["T5, nothing attended", "Hubert, three samples attended"])
def test_the_fault_of_filling_up_any_example_would_be_seen(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tried, "covers", lambda *_: True)
    monkeypatch.setattr(joining, "attended", lambda batch: torch.ones(1, dtype=torch.bool))
    make, row, mask = CASES[case]
    plain = [row(4 + i % 3, i) for i in range(12)]
    odd = [row(4, i, mask) for i in range(8)]
    assert moved(tmp_path, make(), [*plain[:3], *odd], row(18, 99), plain) > 1.05


@pytest.mark.parametrize(
    ("masks", "covered"),
    [
        ({MASK: [[1, 1, 1]]}, True),
        ({MASK: [[1, 1, 0]]}, True),
        ({MASK: [[1.0, 1.0, 0.0]]}, True),
        ({MASK: [[True, True, False]]}, True),
        ({MASK: [[1, 0, 0]]}, False),
        ({MASK: [[0, 0, 0]]}, False),
        ({MASK: [[0, 1, 1]]}, False),
        ({MASK: [[1, 0, 1]]}, False),
        ({MASK: [[2, 2, 2]]}, False),
        ({MASK: [[1, 1, -1]]}, False),
        ({MASK: [[1, 1, 1]], TARGET_MASK: [[1, 0]]}, True),
        ({MASK: [[1, 1, 1]], TARGET_MASK: [[0, 1]]}, False),
        ({MASK: [[1, 1, 1]], TARGET_MASK: [[0, 0]]}, False),
        ({MASK: [[[1, 1], [1, 1]]], "input_ids": [[[5, 5], [5, 5]]]}, True),
        ({MASK: [[[1, 1], [0, 1]]], "input_ids": [[[5, 5], [5, 5]]]}, False),
        ({}, True),
    ],
)
def test_which_masks_are_like_those_that_were_tried(
    masks: dict[str, list[Any]], covered: bool
) -> None:
    columns = {name: torch.tensor(value) for name, value in masks.items()}
    assert Tried(least=2).covers(columns) is covered


def test_examples_that_are_not_filled_up_share_a_batch_with_others_of_their_length() -> None:
    rows = [translation(4, i, LATE) for i in range(3)] + [translation(n, n) for n in (4, 5, 6, 1)]
    collator = LogicalBatchCollator(collate, 8, "input_ids", tried=Tried(least=2))
    shapes = sorted(tuple(b["input_ids"].shape) for b in collator(rows).micro_batches)
    assert shapes == [(1, 1), (3, 4), (3, 6)]


def test_examples_of_which_nothing_is_attended_to_add_nothing() -> None:
    rows = [translation(4, 0, HIDDEN), translation(4, 1)]
    [batch] = LogicalBatchCollator(collate, 8, "input_ids")(rows).micro_batches
    assert torch.equal(batch["input_ids"], collate(rows[1:])["input_ids"])


# ---- targets -------------------------------------------------------------------------------------


def test_targets_of_a_width_of_their_own_are_filled_up_in_translation_only() -> None:
    fills = dict.fromkeys(["input_ids", MASK, "labels"], 0)
    batches = [
        collate([{**text(6), "labels": [5] * 14}]),
        collate([{**text(10), "labels": [5] * 10}]),
    ]
    kinds = {kind_of(batch, fills, Tried(translates=False)) for batch in batches}
    assert len(kinds) == 2
    assert len({kind_of(batch, fills, Tried(translates=True)) for batch in batches}) == 1


class Prompted(nn.Module):
    """Puts four positions before each text."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 30)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return {"logits": self.table(torch.nn.functional.pad(input_ids, (4, 0)))}


def test_labels_as_wide_as_a_prompts_logits_by_chance_are_refused() -> None:
    """One example with more labels than tokens would have moved all the others' labels."""
    rows = [{**text(10, i), "labels": text(10, i)["input_ids"]} for i in range(3)]
    losses = vectorised_loss(Task.CAUSAL_LM)
    assert losses(Prompted(), collate(rows)).shape == (3,)
    malformed = {**text(6), "labels": [5] * 14}
    with pytest.raises(ConfigurationError, match=r"batch\.labels='14 wide'.*the tokens, 10"):
        losses(Prompted(), collate([*rows, malformed]))


@pytest.mark.parametrize(
    ("labels", "nothing"),
    [
        ([-100, -100], True),
        ([], True),
        (torch.tensor([[-100, -100]]), True),
        (torch.zeros(0), True),
        ([-100, 4], False),
        (torch.tensor(-100), False),
        (-100, False),
        ("", False),
        (None, False),
    ],
)
def test_which_targets_are_nothing(labels: Any, nothing: bool) -> None:
    assert ignores_all(labels) is nothing


def mbart() -> nn.Module:
    return loud(MBartForConditionalGeneration(MBartConfig(**TRANSLATION)))


@pytest.mark.parametrize("make", [mbart, t5])
@pytest.mark.parametrize("labels", [[], [-100, -100]])
def test_targets_of_nothing_stop_no_run(make: Any, labels: list[int], tmp_path: Path) -> None:
    rows = [translation(4 + i % 3, i) for i in range(12)]
    nothing = {**text(5), "labels": labels}

    def prepared(of: Rows) -> dict[str, Tensor]:
        batch = collate(of)
        made = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"].long())
        return {**batch, "decoder_input_ids": made}

    model: Any = make()
    collator = LogicalBatchCollator(prepared, 8, "input_ids")
    assert sum(len(b[MASK]) for b in collator([*rows, nothing]).micro_batches) == 12


# ---- training loops of one's own ------------------------------------------------------------------


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=40)
    return loud(GPT2LMHeadModel(config))


def with_empty_texts(lengths: list[int]) -> dict[str, Tensor]:
    """As a tokenizer pads them; labels are the tokens, padding included, as in many a loop."""
    batch = collate([text(n, n) if n else text(1, 0, [0]) for n in lengths])
    return {**batch, "labels": batch["input_ids"].clone()}


@pytest.mark.parametrize("engine", ["auto", "two_pass", "sequential"])
def test_empty_texts_of_a_batch_add_nothing(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def summed(lengths: list[int]) -> ClippedSum:
        return clipped_sum(gpt2(), with_empty_texts(lengths), clipping_norm=C, engine=engine)

    found, expected = summed([0, 6, 0, 4, 12]), summed([6, 4, 12])
    assert apart(found.grads, expected.grads) < 1e-4 * C
    assert found.norms[[0, 2]].tolist() == found.losses[[0, 2]].tolist() == [0, 0]


def test_the_fault_of_counting_empty_texts_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_loop, "attended", lambda batch: torch.ones(1, dtype=torch.bool))
    monkeypatch.setattr(own_loop, "_was_tried", lambda *_: True)
    monkeypatch.setattr("hf_dp.training.vectorised.own_labels", lambda labels, *_, **__: labels)
    sums = [
        clipped_sum(gpt2(), with_empty_texts([*[0] * 8, 4, *more]), clipping_norm=C).grads
        for more in ([], [20])
    ]
    assert apart(*sums) > 1.05 * C


def test_masks_with_holes_go_one_at_a_time_or_are_refused() -> None:
    batch = with_empty_texts([6, 4, 6])
    batch[MASK][0, 2] = 0
    found = clipped_sum(gpt2(), batch, clipping_norm=C)
    expected = clipped_sum(gpt2(), batch, clipping_norm=C, engine="sequential")
    assert apart(found.grads, expected.grads) < 1e-5 * C
    with pytest.raises(ConfigurationError, match="elsewhere than at the end"):
        clipped_sum(gpt2(), batch, clipping_norm=C, engine="book_keeping")


def test_a_targets_mask_that_begins_with_padding_is_refused() -> None:
    batch = collate([translation(4, i) for i in range(3)])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 0]])
    with pytest.raises(ConfigurationError, match="decoder_attention_mask"):
        clipped_sum(t5(), {**batch, TARGET_MASK: mask}, clipping_norm=C)
    mask[1, 0] = 1
    clipped_sum(t5(), {**batch, TARGET_MASK: mask}, clipping_norm=C)


def test_which_examples_are_attended_to() -> None:
    ids = torch.ones(2, 2, 3, dtype=torch.long)
    mask = torch.tensor([[[1, 0, 0], [0, 0, 0]], [[1, 1, 1], [0, 1, 0]]])
    assert attended({"input_ids": ids, MASK: mask}).tolist() == [False, True]
    assert attended({MASK: torch.tensor([[0, 0], [0, 1]])}).tolist() == [False, True]
    assert attended({"input_ids": ids}).tolist() == [True, True]
