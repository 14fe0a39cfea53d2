"""Kinds of models and data that people fine-tune: text tables, causal and seq2seq models, adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_runs import Sentences, host_arguments, tiny_bert, train_lines, trainer_for
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from hf_dp import DPArguments, DPSeq2SeqTrainer, DPTrainer
from hf_dp.coins import FixedCoins
from hf_dp.engines import AutomaticEngine, BookKeepingEngine
from hf_dp.errors import ConfigurationError
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.training.losses import definition_loss

WORDS = ("good", "bad", "film", "the", "a", "was", "not", "very", "plot", "cast")
SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def tokenizer() -> tf.PreTrainedTokenizerFast:
    specials = ("[PAD]", "[UNK]", "[EOS]", "[MASK]")
    vocabulary = {word: index for index, word in enumerate((*specials, *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[EOS]",
        mask_token="[MASK]",
    )


@pytest.fixture(scope="module")
def table(tokenizer: tf.PreTrainedTokenizerFast) -> Dataset:
    """Forty sentences of one to eight words, with their text, which no model takes."""
    generator = torch.Generator().manual_seed(1)
    texts = [
        " ".join(
            WORDS[int(i)] for i in torch.randint(0, len(WORDS), (1 + n % 8,), generator=generator)
        )
        for n in range(40)
    ]
    rows = Dataset.from_dict({"text": texts, "label": [n % 2 for n in range(40)]})
    return rows.map(lambda row: tokenizer(row["text"]), batched=True)


@pytest.fixture(autouse=True)
def same_weights_each_time() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


SMALL = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}


def tiny_gpt2() -> nn.Module:
    config = tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **SMALL)
    return tf.GPT2LMHeadModel(config)


def tiny_t5() -> nn.Module:
    config = tf.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, **SMALL
    )
    return tf.T5ForConditionalGeneration(config)


def test_a_table_of_text_with_a_tokenizer(
    tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast, table: Dataset
) -> None:
    trainer = DPTrainer(
        tiny_bert(),
        host_arguments(tmp_path, **SAVING),
        train_dataset=table.select(range(4, len(table))),
        eval_dataset=table.select(range(4)),
        processing_class=tokenizer,
        dp_args=DPArguments(noise_multiplier=1.0),
    )
    trainer.train()
    assert isinstance(trainer.engine, AutomaticEngine)
    assert isinstance(trainer.engine.chosen, BookKeepingEngine)
    assert "eval_loss" in trainer.evaluate()
    assert (tmp_path / "checkpoint-6" / "tokenizer.json").exists()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 6


def test_empty_draws_of_a_table(
    tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast, table: Dataset
) -> None:
    trainer = DPTrainer(
        tiny_bert(),
        host_arguments(tmp_path, max_steps=12, remove_unused_columns=True),
        train_dataset=table,
        processing_class=tokenizer,
        dp_args=DPArguments(noise_multiplier=1.0, expected_batch_size=0.5),
    )
    trainer.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 12


@pytest.mark.parametrize("masked", [False, True])
def test_language_models_with_the_stock_collator(
    tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast, table: Dataset, masked: bool
) -> None:
    config = tf.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **SMALL
    )
    trainer = DPTrainer(
        tf.BertForMaskedLM(config) if masked else tiny_gpt2(),
        host_arguments(tmp_path),
        data_collator=tf.DataCollatorForLanguageModeling(
            tokenizer, mlm=masked, mlm_probability=0.5 if masked else None
        ),
        train_dataset=table,
        dp_args=DPArguments(noise_multiplier=1.0, nonprivate_metrics=True, expected_batch_size=40),
    )
    trainer.train()
    assert isinstance(trainer.engine, AutomaticEngine), "no loss was taken one example at a time"
    assert isinstance(trainer.engine.chosen, BookKeepingEngine)
    exact = [line["nonprivate/loss"] for line in train_lines(trainer)]
    assert all(2 < loss < 5 for loss in exact), "a mean over tokens is near log(50)"


def test_seq2seq_training_and_generation(
    tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast, table: Dataset
) -> None:
    rows = table.map(lambda row: {"labels": row["input_ids"][::-1]}).remove_columns("label")
    held_out, kept = rows.select(range(6)), rows.select(range(6, len(rows)))
    seen: list[Any] = []

    def metrics(prediction: tf.EvalPrediction) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"generated": float((prediction.predictions != 0).sum(1).max())}

    model = tiny_t5()
    args = tf.Seq2SeqTrainingArguments(
        str(tmp_path),
        predict_with_generate=True,
        generation_max_length=5,
        **{
            **vars_of(host_arguments(tmp_path)),
            **SAVING,
            "eval_strategy": "steps",
            "eval_steps": 3,
        },
    )
    trainer = DPSeq2SeqTrainer(
        model=model,
        args=args,
        data_collator=tf.DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=kept,
        eval_dataset=held_out,
        processing_class=tokenizer,
        compute_metrics=metrics,
        dp_args=DPArguments(noise_multiplier=1.0),
    )
    trainer.train()
    evaluated = trainer.evaluate(max_length=4, num_beams=2)
    assert evaluated["eval_generated"] <= 4
    assert len(seen) == 3
    predicted = trainer.predict(held_out)
    assert len(predicted.predictions) == 6
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 6


def vars_of(args: tf.TrainingArguments) -> dict[str, Any]:
    """The arguments that `host_arguments` sets, for another class of them."""
    names = (
        "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "logging_steps",
        "report_to", "disable_tqdm", "use_cpu", "optim", "learning_rate", "lr_scheduler_type",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names}


def lora(seed: int = 0) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["query", "value"], lora_dropout=0.0
    )
    return get_peft_model(tiny_bert(), config)


def test_lora_trains_saves_and_resumes_its_adapter_alone(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, host=SAVING, model=lora())
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert isinstance(trainer.engine.chosen, BookKeepingEngine)
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, frozen[name])

    saved = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", LEDGER_NAME} <= saved
    assert "model.safetensors" not in saved

    resumed = trainer_for(tmp_path, host=SAVING, model=lora(seed=5))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 6
    ours = dict(trainer.model.named_parameters())
    theirs = dict(resumed.model.named_parameters())
    assert all(torch.equal(ours[n], theirs[n]) for n in ours if "lora" in n or "classifier" in n)


def test_lora_on_fixed_coins_equals_one_example_at_a_time(tmp_path: Path) -> None:
    results = []
    for engine in ("book_keeping", "two_pass", "sequential"):
        trainer = trainer_for(
            tmp_path / engine,
            model=lora(),
            dp={"engine": engine, "clipping_norm": 0.3},
            coins=FixedCoins(torch.Generator().manual_seed(2)),
        )
        trainer.train()
        results.append(
            torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
        )
    for result in results[:-1]:
        torch.testing.assert_close(result, results[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", [["q_proj"], ["k_proj"], ["q_proj", "k_proj"]])
@pytest.mark.parametrize("width", [16, 128])
def test_lora_of_queries_and_keys_alone(tmp_path: Path, targets: list[str], width: int) -> None:
    """In a text of two tokens nothing but rounding reaches them."""
    texts = [row["input_ids"] for row in Sentences().rows]
    rows = [{"input_ids": t, "labels": t, "attention_mask": [1] * len(t)} for t in texts]
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=50,
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    trainer = trainer_for(
        tmp_path,
        model=get_peft_model(model, LoraConfig(r=2, target_modules=targets)),
        train_dataset=rows,
        data_collator=pad_labels,
    )
    trainer.train()
    assert isinstance(trainer.engine.chosen, BookKeepingEngine)


def test_lora_of_fused_experts_leaves_parameters_where_they_are(tmp_path: Path) -> None:
    """PEFT takes these out of the model on each call and puts back what it was given in their places."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    config = tf.MixtralConfig(vocab_size=50, pad_token_id=0, **sizes, **heads)
    names = ["gate_up_proj", "down_proj"]
    targets = LoraConfig(
        r=2, target_parameters=[f"experts.{name}" for name in names], task_type="SEQ_CLS"
    )
    model = get_peft_model(tf.MixtralForSequenceClassification(config), targets)
    [experts] = [m for m in model.modules() if type(m).__name__ == "MixtralExperts"]
    before = {name: getattr(experts, name).clone() for name in names}
    trainer = trainer_for(tmp_path, model=model)
    trainer.train()
    assert isinstance(trainer.engine.chosen, BookKeepingEngine)
    assert sorted(experts._parameters) == sorted(names)
    assert all(torch.equal(getattr(experts, name), before[name]) for name in names)


class Overflowing:
    """Cuts each text into pieces of two tokens, as return_overflowing_tokens does in a collator."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        pieces = [
            [*row["input_ids"], 0][start : start + 2]
            for row in rows
            for start in range(0, len(row["input_ids"]), 2)
        ]
        ids = torch.tensor(pieces)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


class Joining:
    """Puts all examples into one row and calls itself by no name that would give it away."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.tensor([[token for row in rows for token in row["input_ids"]]])
        labels = torch.tensor([rows[0]["labels"]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_a_collator_that_would_join_examples_has_none_to_join(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, data_collator=Joining())
    kinds = [m for batch in trainer.get_train_dataloader() for m in batch.micro_batches]
    assert sum(len(m["labels"]) for m in kinds) > len(kinds) > 0
    assert max(m["input_ids"].shape[1] for m in kinds) <= 20


@pytest.mark.parametrize("columns", [True, False])
def test_a_collator_whose_rows_are_not_examples_is_refused(tmp_path: Path, columns: bool) -> None:
    trainer = trainer_for(
        tmp_path,
        data_collator=Overflowing(),
        train_dataset=Sentences(),
        host={"remove_unused_columns": columns, "per_device_train_batch_size": 8},
        dp={"expected_batch_size": 40},
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(ConfigurationError, match=r"Overflowing.*one row for each"):
        trainer.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_an_example_is_worth_its_own_mean_whatever_its_neighbours(tmp_path: Path) -> None:
    """The loss in use on a causal model equals compute_loss on each example alone."""
    trainer = trainer_for(
        tmp_path,
        model=tiny_gpt2(),
        train_dataset=[
            {"input_ids": [5] * n, "labels": [7] * n, "attention_mask": [1] * n}
            for n in range(2, 22)
        ],
        data_collator=pad_labels,
        dp={"expected_batch_size": 20},
    )
    trainer.train()
    batch = pad_labels([trainer.train_dataset[i] for i in (0, 19)])
    model = trainer.model.eval()
    expected = definition_loss(trainer.compute_loss)(model, batch)
    torch.testing.assert_close(trainer._loss_of_each(model, batch), expected)


def pad_labels(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in fill.items()
    }
