"""Every ordinary model gets its fast loss from made-up examples alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from loss_zoo import MODELS, batch, build, build_lora, trainer_for
from tiny_settings import T5, TRANSLATION
from user_runs import tokenizer

from hf_dp.training.choice import Choice, choose
from hf_dp.training.made_up import LENGTHS, made_up_rows


def _choice(name: str, model: torch.nn.Module, smoothing: float = 0.0) -> Choice:
    trainer = trainer_for(model, smoothing=smoothing)
    columns = {
        key: value[:1] if isinstance(value, torch.Tensor) else value
        for key, value in batch(name).items()
    }
    return choose(
        model,
        columns,
        lambda model, alone: trainer.compute_loss(model, alone),
        given=None,
        trusted=True,
        label_smoothing=smoothing,
        padding_id=getattr(model.config, "pad_token_id", None),
    )


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_of_transformers_gets_its_vectorised_loss(name: str) -> None:
    choice = _choice(name, build(name))
    assert not choice.is_definition
    assert not choice.alone


def test_an_adapter_changes_nothing() -> None:
    choice = _choice("bert-cls", build_lora("bert-cls"))
    assert not choice.is_definition
    assert not choice.alone


def test_made_up_rows_hold_nothing_of_the_real_example() -> None:
    name = "gpt2-lm"
    model, real = build(name), batch(name)
    columns = {key: value[:1] for key, value in real.items()}
    other = {key: value.flip(-1) if value.dim() > 1 else value for key, value in columns.items()}
    made, again = made_up_rows(model, columns), made_up_rows(model, other)
    assert made.keys() == columns.keys()
    assert all(torch.equal(made[key], again[key]) for key in made)
    assert made["attention_mask"].sum(1).tolist() == list(LENGTHS)


TRANSLATORS: dict[str, Callable[[], Any]] = {
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**TRANSLATION)),
    "mbart": lambda: tf.MBartForConditionalGeneration(tf.MBartConfig(**TRANSLATION)),
    "pegasus": lambda: tf.PegasusForConditionalGeneration(tf.PegasusConfig(**TRANSLATION)),
    "marian": lambda: tf.MarianMTModel(
        tf.MarianConfig(**{**TRANSLATION, "decoder_vocab_size": TRANSLATION["vocab_size"]})
    ),
    "m2m": lambda: tf.M2M100ForConditionalGeneration(tf.M2M100Config(**TRANSLATION)),
}


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("knows_model", [True, False])
@pytest.mark.parametrize("name", sorted(TRANSLATORS))
def test_a_translator_is_vectorised_whatever_its_collator_adds(
    name: str, knows_model: bool, multiple: int | None
) -> None:
    """`DataCollatorForSeq2Seq` makes the decoder's inputs of the labels, if it knows the model."""
    torch.manual_seed(0)
    model = TRANSLATORS[name]().eval()
    collate = tf.DataCollatorForSeq2Seq(
        tokenizer(), model=model if knows_model else None, pad_to_multiple_of=multiple
    )
    item = {"input_ids": [5, 6, 7, 8], "attention_mask": [1] * 4, "labels": [5, 6, 2]}
    columns = dict(collate([item]))
    made = knows_model and hasattr(model, "prepare_decoder_input_ids_from_labels")
    assert ("decoder_input_ids" in columns) is made
    for smoothing in (0.0, 0.1) if made else (0.0,):  # which takes the labels away from the model
        trainer = trainer_for(model, smoothing=smoothing)
        choice = choose(
            model,
            columns,
            lambda model, alone, host=trainer: host.compute_loss(model, alone),
            given=None,
            trusted=True,
            label_smoothing=smoothing,
            padding_id=model.config.pad_token_id,
        )
        assert not choice.is_definition
        assert not choice.alone
        assert choice.rows is not None
        assert choice.rows["labels"].shape[1] == max(LENGTHS)
        if made:
            assert choice.rows["decoder_input_ids"].shape == choice.rows["labels"].shape
