"""Padding that a mask marks is tried on every column that is as wide, sound and spectrograms too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_runs import Sentences, collate, trainer_for
from tiny_settings import SOUND
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from hf_dp import clipped_sum
from hf_dp.training import positions
from hf_dp.training.choice import Choice, announce, choose
from hf_dp.training.made_up import LENGTHS, each_alone, made_up_rows
from hf_dp.training.padding import padding_matters

SAMPLES, MELS = 200, 6
STILL = {**SOUND, "mask_time_prob": 0.0, "hidden_dropout": 0.0, "layerdrop": 0.0}


def sound(**more: Any) -> dict[str, Tensor]:
    return {
        "input_values": torch.zeros(1, SAMPLES),
        "attention_mask": torch.ones(1, SAMPLES, dtype=torch.long),
        "labels": torch.zeros(1, dtype=torch.long),
        **more,
    }


def own_loss(model: nn.Module, inputs: dict[str, Any]) -> Any:
    return model(**inputs)["loss"]


def chosen(model: nn.Module, columns: dict[str, Tensor]) -> Choice:
    return choose(model, columns, own_loss, given=None, trusted=True)


def wav2vec2(norm: str, family: str = "Wav2Vec2", **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(
        **{**STILL, **more}, feat_extract_norm=norm, initializer_range=0.3
    )
    return getattr(tf, f"{family}ForSequenceClassification")(config)


@pytest.mark.parametrize("family", ["Wav2Vec2", "Hubert"])
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_sound_whose_padding_is_read_is_taken_one_example_at_a_time(norm: str, family: str) -> None:
    """Group norm's statistics are taken over the padding, mask or not."""
    assert chosen(wav2vec2(norm, family), sound()).alone is (norm == "group")


def test_spec_augment_is_named_and_the_switch_is_right(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = wav2vec2("layer", mask_time_prob=0.3, mask_time_length=2)
    choice = chosen(model, sound())
    announce(choice, model)
    assert choice.alone
    assert "model.config.apply_spec_augment = False switches it off" in caplog.text
    model.config.apply_spec_augment = False
    assert not chosen(model, sound()).alone
    caplog.clear()
    announce(choice, model)
    assert "SpecAugment" not in caplog.text


def test_the_fault_of_trying_no_padding_but_that_of_text_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    axes = positions._axes

    def by_name(*args: Any, **_: Any) -> tuple[int, ...]:
        return axes(*args, by_name=True)

    monkeypatch.setattr(positions, "_axes", by_name)
    assert not chosen(wav2vec2("group"), sound()).alone


@pytest.mark.parametrize(("kernel", "stride"), [(4, 3), (10, 5), (400, 320)])
def test_examples_are_as_long_as_the_model_asks(kernel: int, stride: int) -> None:
    model = wav2vec2("layer", conv_kernel=(kernel, 2), conv_stride=(stride, 2))
    rows = chosen(model, sound()).rows
    assert rows is not None
    assert min(rows.spans["input_values"].lengths) > kernel
    assert rows["attention_mask"].sum(1).tolist() == list(rows.spans["input_values"].lengths)


def test_a_sum_of_sounds_that_were_padded_is_the_sum_of_those_that_were_not() -> None:
    model, lengths = wav2vec2("group").eval(), (170, 100, 60)
    torch.manual_seed(1)
    sounds = [torch.randn(1, length) for length in lengths]
    labels = torch.tensor([0, 1, 2])
    batch = {
        "input_values": torch.cat([F.pad(one, (0, 170 - one.shape[1])) for one in sounds]),
        "attention_mask": (torch.arange(170) < torch.tensor(lengths)[:, None]).long(),
        "labels": labels,
    }
    found = clipped_sum(model, batch, clipping_norm=0.5)
    for index, one in enumerate(sounds):
        own = sound(input_values=one, attention_mask=torch.ones_like(one).long())
        own["labels"] = labels[index : index + 1]
        expected = clipped_sum(model, own, clipping_norm=0.5)
        torch.testing.assert_close(found.norms[index : index + 1], expected.norms)


@pytest.mark.parametrize("fixed", [True, False])
def test_columns_that_were_tried_without_padding_get_none(fixed: bool, tmp_path: Path) -> None:
    """A list of features that is as long as the first text: the collator would fill up others."""
    data = Sentences()
    width = len(data.rows[0]["input_ids"])
    for row in data.rows:
        row["features"] = [1.0] * len(row["input_ids"])

    def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        features = [torch.tensor(row["features"]) for row in rows]
        return {**collate(rows), "features": pad_sequence(features, batch_first=True)}

    def given(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        own = inputs["features"] * inputs["attention_mask"] if not fixed else inputs["features"]
        weights = torch.ones(width if fixed else own.shape[1])
        logits = model(**read).logits + (own @ weights)[:, None] * torch.tensor([0.0, 0.1])
        return F.cross_entropy(logits, inputs["labels"], reduction="none")

    trainer = trainer_for(
        tmp_path,
        train_dataset=data,
        data_collator=collated,
        example_loss=given,
        host={"remove_unused_columns": False},
    )
    loader = trainer.get_train_dataloader()
    assert not trainer._choice.alone
    tokens = {"input_ids", "attention_mask"}
    assert set(loader.collate_fn.fills) == (tokens if fixed else tokens | {"features"})


class Mel(nn.Module):
    """A convolution along time over ``(B, M, T)``; its mean forgets the mask, or does not."""

    def __init__(self, *, forgets: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(MELS, 8, 3, padding=1)
        self.head = nn.Linear(8, 2)
        self.forgets = forgets

    def forward(self, input_features: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        own = attention_mask[:, None].to(input_features)
        hidden = self.conv(input_features * own).relu()
        own = torch.ones_like(own) if self.forgets else own
        logits = self.head((hidden * own).sum(2) / own.sum(2))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def mel_losses(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    logits = model(**inputs)["logits"]
    return F.cross_entropy(logits, inputs["labels"], reduction="none")


@pytest.mark.parametrize("width", [50, MELS])
@pytest.mark.parametrize("forgets", [True, False])
def test_positions_may_be_on_any_axis(forgets: bool, width: int) -> None:
    """Where there are as many bands as moments, nobody knows which are which."""
    columns = {
        "input_features": torch.zeros(1, MELS, width),
        "attention_mask": torch.ones(1, width),
        "labels": torch.zeros(1, dtype=torch.long),
    }
    choice = choose(Mel(forgets=forgets), columns, own_loss, given=mel_losses, trusted=True)
    assert choice.alone is (forgets or width == MELS)
    if choice.rows is not None:
        assert choice.rows.spans["input_features"].axes == (2,)


class Fixed(nn.Module):
    """Takes sound of one length only, and a mask that it does not read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(SAMPLES, 2)

    def forward(self, input_values: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        logits = self.head(input_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_columns_that_cannot_be_cut_are_not_said_to_have_positions() -> None:
    rows = choose(Fixed(), sound(), own_loss, given=mel_losses, trusted=True).rows
    assert rows is not None
    assert set(rows.spans) == {"attention_mask"}


def test_a_model_that_takes_no_made_up_sound_is_not_tried() -> None:
    class Never(Fixed):
        def forward(self, input_values: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
            raise ValueError("a real sound, please")

    choice = choose(Never(), sound(), own_loss, given=mel_losses, trusted=True)
    assert choice.rows is None
    assert choice.alone


@pytest.mark.parametrize("finite_from", [0, 300, 10**9])
def test_losses_that_are_infinite_prove_nothing(finite_from: int) -> None:
    """As CTC's where a sound is shorter than its words: longer ones are made up, if they help."""

    def given(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        long = inputs["attention_mask"].sum(1) >= finite_from
        own = inputs["input_values"] * inputs["attention_mask"]
        losses = own.sum(1) * sum(p.sum() for p in model.parameters())
        return losses.where(long, torch.inf)

    choice = choose(nn.Linear(2, 2), sound(), own_loss, given=given, trusted=False)
    assert choice.alone is (finite_from > 10**6)
    assert choice.rows is not None
    if not choice.alone:
        assert min(choice.rows.spans["input_values"].lengths) >= finite_from


@pytest.mark.parametrize("width", [4, 6])
def test_nothing_but_positions_is_cut(width: int) -> None:
    """Seven classes or features are no tokens, although the longest made-up example has as many."""
    most = max(LENGTHS)
    columns = {
        "input_ids": torch.ones(1, width, dtype=torch.long),
        "attention_mask": torch.ones(1, width, dtype=torch.long),
        "features": torch.zeros(1, most),
        "labels": torch.zeros(1, most),
    }
    rows = made_up_rows(nn.Embedding(9, 2), columns)
    for one, length in zip(each_alone(rows), LENGTHS, strict=True):
        assert one["input_ids"].shape == one["attention_mask"].shape == (1, length)
        assert one["features"].shape == one["labels"].shape == (1, most)


def test_masks_of_pairs_of_positions_are_made_and_cut_on_both_axes() -> None:
    columns = {
        "input_ids": torch.ones(1, 5, dtype=torch.long),
        "attention_mask": torch.ones(1, 1, 5, 5),
    }
    rows = made_up_rows(nn.Embedding(9, 2), columns)
    most = max(LENGTHS)
    assert rows["attention_mask"].shape == (len(LENGTHS), 1, most, most)
    assert rows["attention_mask"][:, 0, 0].sum(1).tolist() == list(LENGTHS)
    assert each_alone(rows)[2]["attention_mask"].shape == (1, 1, LENGTHS[2], LENGTHS[2])


def test_padding_is_tried_with_numbers_that_a_mask_must_hide() -> None:
    rows = made_up_rows(nn.Linear(2, 2), sound())
    hidden = rows["input_values"][rows["attention_mask"] == 0]
    assert bool((hidden != 0).all())

    def reads_all(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        return inputs["input_values"].sum(1) * next(model.parameters()).sum()

    assert padding_matters(reads_all, nn.Linear(2, 2), rows)
