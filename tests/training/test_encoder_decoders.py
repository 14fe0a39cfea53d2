"""Classifiers with a decoder, which read the class from the last token, and encoders of other things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import host_arguments
from tiny_settings import IMAGE, PAD, SMALL, SOUND, T5, TRANSLATION, VOCAB
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    SpeechEncoderDecoderModel,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from hf_dp import DPArguments, DPTrainer, clipped_sum
from hf_dp.training.batches import Draw, LogicalBatchCollator
from hf_dp.training.joining import Tried
from hf_dp.training.made_up import made_up_rows
from hf_dp.training.packing import UserCollator, apart
from hf_dp.training.tasks import Task, closing_token, recognise_task

EOS = 2
Rows = list[dict[str, Any]]


def bart() -> nn.Module:
    torch.manual_seed(0)
    return BartForSequenceClassification(BartConfig(**TRANSLATION, num_labels=3))


def t5() -> nn.Module:
    torch.manual_seed(0)
    return T5ForSequenceClassification(T5Config(**T5, num_labels=3))


def decoder() -> Any:
    return BertLMHeadModel(BertConfig(**SMALL, is_decoder=True, add_cross_attention=True))


def started(model: Any) -> nn.Module:
    model.config.decoder_start_token_id, model.config.pad_token_id = EOS, PAD
    return model  # type: ignore[no-any-return]


def of_images() -> nn.Module:
    torch.manual_seed(0)
    encoder = ViTModel(ViTConfig(**IMAGE), add_pooling_layer=False)
    return started(VisionEncoderDecoderModel(encoder=encoder, decoder=decoder()))


def of_sounds() -> nn.Module:
    torch.manual_seed(0)
    encoder = Wav2Vec2Model(
        Wav2Vec2Config(**{**SOUND, "mask_time_prob": 0.0, "feat_extract_norm": "layer"})
    )
    return started(SpeechEncoderDecoderModel(encoder=encoder, decoder=decoder()))


def texts(size: int = 24) -> Rows:
    return [{"input_ids": [5 + i % 7] * (1 + i % 4) + [EOS], "labels": i % 3} for i in range(size)]


def collate(rows: Rows) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([r["input_ids"] + [PAD] * (width - len(r["input_ids"])) for r in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def chosen(folder: Path, model: nn.Module, rows: Rows, collator: Any) -> Any:
    trainer = DPTrainer(
        model=model,
        args=host_arguments(folder, max_steps=2),
        dp_args=DPArguments(noise_multiplier=1.0),
        train_dataset=rows,
        data_collator=collator,
    )
    trainer.train()
    assert trainer._choice is not None
    return trainer._choice


@pytest.mark.slow
@pytest.mark.parametrize("make", [bart, t5])
def test_classifiers_take_several_examples_at_a_time(tmp_path: Path, make: Any) -> None:
    """One in three has two closing tokens, with which the others cannot be taken together."""
    rows = texts()
    for row in rows[::3]:
        row["input_ids"] = [EOS, *row["input_ids"]]
    choice = chosen(tmp_path, make(), rows, collate)
    assert not choice.alone
    assert choice.description == "sequence classification; checked against compute_loss"


@pytest.mark.parametrize("make", [bart, t5])
def test_made_up_texts_end_with_their_only_closing_token(make: Any) -> None:
    rows = made_up_rows(make(), collate(texts(1)))
    for ids, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True):
        own = ids[mask != 0].tolist()
        assert own.index(EOS) == len(own) - 1
        assert EOS not in ids[mask == 0]


def test_other_models_have_no_closing_token() -> None:
    assert closing_token(bart()) == EOS
    assert closing_token(BertForSequenceClassification(BertConfig(**SMALL))) is None
    assert closing_token(T5ForConditionalGeneration(T5Config(**T5))) is None
    assert closing_token(nn.Linear(1, 1)) is None


def test_examples_with_more_closing_tokens_than_others_are_apart_from_them() -> None:
    rows = [{"input_ids": ids, "labels": 0} for ids in ([5, EOS], [5, 6, EOS], [EOS, EOS])]
    found = LogicalBatchCollator(collate, 4, "input_ids", tried=Tried(closing=EOS))(
        rows
    ).micro_batches
    counts = [(batch["input_ids"] == EOS).sum(1).tolist() for batch in found]
    assert sorted(counts) == [[1, 1], [2]]
    draw = Draw(rows)
    draw.sizes = (1, 2)
    packs = UserCollator(collate, 4, "input_ids", tried=Tried(closing=EOS))(draw).micro_batches
    assert sorted(len(apart(pack) or []) for pack in packs) == [0, 2]


@pytest.mark.parametrize("make", [of_images, of_sounds])
def test_they_are_known_to_translate(make: Any) -> None:
    assert recognise_task(make(), {"labels": torch.zeros(1, 2)}) is Task.SEQ2SEQ_LM


@pytest.mark.slow
def test_captions_are_learned_several_at_a_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = [
        {"pixel_values": torch.randn(3, 8, 8), "labels": torch.randint(3, VOCAB, (5,))}
        for _ in range(24)
    ]
    choice = chosen(tmp_path, of_images(), rows, None)
    assert not choice.alone
    assert choice.description == "seq2seq lm; checked against compute_loss"


@pytest.mark.slow
def test_transcripts_get_their_fast_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = [
        {
            "input_values": torch.randn(200),
            "attention_mask": torch.ones(200).long(),
            "labels": torch.randint(3, VOCAB, (5,)),
        }
        for _ in range(24)
    ]
    choice = chosen(tmp_path, of_sounds(), rows, None)
    assert choice.description == "seq2seq lm; checked against compute_loss"


@pytest.mark.slow
@pytest.mark.parametrize("make", [bart, t5])
def test_the_sum_of_a_draw_is_that_of_each_text_alone(tmp_path: Path, make: Any) -> None:
    """Closing tokens in the middle, twice at the end, or at the start; the oracle is the model's own loss."""
    rows = texts(12)
    for place, ids in ((1, [5, EOS, 7, EOS]), (4, [5, EOS, EOS]), (7, [EOS]), (8, [EOS, 6, EOS])):
        rows[place]["input_ids"] = ids
    model = make().eval()
    trainer = DPTrainer(
        model=model,
        args=host_arguments(tmp_path, max_steps=2),
        dp_args=DPArguments(noise_multiplier=1.0),
        train_dataset=texts(),
        data_collator=collate,
    )
    loader: Any = trainer.get_train_dataloader()
    choice = trainer._choice
    assert choice is not None
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    batches = loader.collate_fn(rows).micro_batches
    assert len(batches) < len(rows)
    for batch in batches:
        summed = clipped_sum(
            model,
            batch,
            clipping_norm=0.1,
            example_loss=choice.example_loss,
            engine=trainer.engine,
        )
        for name, grad in summed.grads.items():
            total[name] += grad
    for row in rows:
        model.zero_grad()
        model(**collate([row])).loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        for name, grad in grads.items():
            total[name] -= grad * (0.1 / norm).clamp(max=1.0)
    gap = torch.stack([left.norm() for left in total.values()]).norm()
    assert float(gap) < 1e-4 * 0.1 * len(rows)
