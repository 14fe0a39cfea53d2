"""A trainer and a configuration explain how a model would be clipped, on made-up examples alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PromptTuningConfig, get_peft_model
from tiny_runs import tiny_bert, trainer_for, weights

from hf_dp.engines.base import trainable_parameters
from hf_dp.errors import ConfigurationError
from hf_dp.ledger import LEDGER_NAME
from hf_dp.training import explaining
from hf_dp.training.explaining import explain_configuration

CONFIGURATIONS: dict[str, Any] = {
    "bert": lambda: tf.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        architectures=["BertForQuestionAnswering"],
    ),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=60, n_embd=16, n_layer=1, n_head=2, architectures=["GPT2LMHeadModel"]
    ),
    "t5": lambda: tf.T5Config(
        vocab_size=60,
        d_model=16,
        d_ff=32,
        d_kv=8,
        num_layers=1,
        num_heads=2,
        architectures=["T5ForConditionalGeneration"],
    ),
    "vit": lambda: tf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
        architectures=["ViTForImageClassification"],
    ),
    "whisper": lambda: tf.WhisperConfig(
        vocab_size=60,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_target_positions=16,  # shorter than what is asked for
        pad_token_id=0,
        decoder_start_token_id=1,
        architectures=["WhisperForConditionalGeneration"],
    ),
    "deberta": lambda: tf.DebertaV2Config(  # torch's counter of operations cannot follow it
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        relative_attention=True,
        position_buckets=4,
        pos_att_type=["p2c", "c2p"],
        architectures=["DebertaV2ForMaskedLM"],
    ),
    "headless": lambda: tf.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        architectures=["BertModel"],
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_is_enough(tmp_path: Path, name: str) -> None:
    config = CONFIGURATIONS[name]()
    config.save_pretrained(tmp_path)
    report = explain_configuration(str(tmp_path), length=20)
    model = getattr(tf, config.architectures[0])(config)
    assert sum(row.count for row in report.rows) == len(trainable_parameters(model))
    assert report.length == (None if name in ("vit", "whisper") else 20)
    assert report.engine == "book_keeping"


def test_another_head_may_be_asked_for(tmp_path: Path) -> None:
    CONFIGURATIONS["bert"]().save_pretrained(tmp_path)
    report = explain_configuration(str(tmp_path), head="AutoModelForMaskedLM", length=5)
    assert any("cls.predictions" in row.parameters for row in report.rows)
    with pytest.raises(ConfigurationError, match=r"^explain\.head='NoSuchHead'"):
        explain_configuration(str(tmp_path), head="NoSuchHead")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^explain\.model="):
        explain_configuration(str(tmp_path / "nothing"))


def test_a_model_that_takes_no_made_up_examples_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CONFIGURATIONS["bert"]().save_pretrained(tmp_path)
    monkeypatch.setattr(explaining, "made_up_rows", lambda *_: {}["a private value"])
    with pytest.raises(ConfigurationError, match=r"^explain_engine='BertFor") as caught:
        explain_configuration(str(tmp_path))
    assert "private value" not in str(caught.value)


def test_lengths_beyond_the_positions_are_cut(tmp_path: Path) -> None:
    report = trainer_for(tmp_path).explain_engine(length=1000)
    assert report.length == 14  # of 16 positions


def test_the_positions_of_a_prompt_are_taken(tmp_path: Path) -> None:
    prompt = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    model = get_peft_model(tiny_bert(), prompt)
    report = trainer_for(tmp_path, model=model).explain_engine()
    assert report.length == 11  # of 16 positions


def test_a_trainer_explains_itself_and_spends_nothing(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    before, state = weights(trainer.model), torch.random.get_rng_state()
    report = trainer.explain_engine(length=12)
    assert torch.equal(weights(trainer.model), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not (tmp_path / LEDGER_NAME).exists()
    assert sum(row.count for row in report.rows) == len(list(tiny_bert().parameters()))
    trainer.train()


def test_a_trainer_whose_loss_is_foreign_says_sequential(tmp_path: Path) -> None:
    class Scaled(type(trainer_for(tmp_path / "x"))):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            return 2 * super().compute_loss(*args, **options)

    assert trainer_for(tmp_path, cls=Scaled).explain_engine(length=6).engine == "sequential"
