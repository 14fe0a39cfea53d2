"""Ways around the clipped sum that a model, a dataset, a hook or an option could take."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_runs import Sentences, collate, fixed, refused, tiny_bert, trainer_for
from torch import Tensor, nn

from hf_dp.errors import ConfigurationError, LedgerMismatchError, PrivacyError
from hf_dp.ledger import LEDGER_NAME, read_ledger

ENGINES = ["book_keeping", "two_pass", "sequential"]


class Transformed(Sentences):
    """Overlapping windows made on reading: several rows of one long example, as `datasets` allows."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        self.asked.append(len(indices))
        return [self.rows[i] for i in indices for _ in range(6 if i == 3 else 1)]


def test_an_example_is_one_row_whatever_a_transform_of_many_makes_of_it(tmp_path: Path) -> None:
    dataset = Transformed()
    trainer = trainer_for(tmp_path, train_dataset=dataset, dp={"expected_batch_size": 40})
    trainer.train()
    assert dataset.asked == []
    batch = next(iter(trainer.get_train_dataloader()))
    assert sum(len(micro["labels"]) for micro in batch.micro_batches) == len(dataset)


def with_max_norm() -> nn.Module:
    model = tiny_bert()
    model.bert.embeddings.word_embeddings.max_norm = 1.0
    return model


def wrapped_dynamic_rope() -> nn.Module:
    config = tf.LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )
    wrapper = nn.Module()
    wrapper.inner = tf.LlamaForCausalLM(config)
    return wrapper


def nested_dynamic_rope() -> nn.Module:
    model = tiny_bert()
    model.config.text_config = wrapped_dynamic_rope().inner.config
    return model


def competing_experts() -> nn.Module:
    model = tiny_bert()
    config = tf.NllbMoeConfig(d_model=8, num_experts=2)
    model.router = tf.models.nllb_moe.modeling_nllb_moe.NllbMoeTop2Router(config)
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (with_max_norm, r"word_embeddings\.max_norm=1\.0: expected None"),
        (wrapped_dynamic_rope, r"model\.inner.*rope_parameters=\['dynamic'\]"),
        (nested_dynamic_rope, r"rope_parameters=\['dynamic'\]"),
        (competing_experts, "NllbMoeTop2Router"),
    ],
)
def test_models_that_let_examples_through(tmp_path: Path, make: Any, match: str) -> None:
    refused(tmp_path, match, lambda: trainer_for(tmp_path, model=make()))


class Codebook(nn.Module):
    """Counts tokens in a parameter that no optimizer touches."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = nn.Parameter(torch.zeros(50), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            self.counts.add_(hidden.detach().sum())
        return hidden


@pytest.mark.parametrize("engine", ENGINES)
def test_a_frozen_parameter_that_the_forward_pass_changes(tmp_path: Path, engine: str) -> None:
    model = tiny_bert()
    model.dropout = Codebook()
    dp = {"engine": engine, "preflight": False}
    trainer = trainer_for(tmp_path, model=model, coins=fixed(), dp=dp)
    with pytest.raises(PrivacyError, match=r"model\.dropout\.counts: expected a tensor that"):
        trainer.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_hooks_that_would_see_single_gradients(tmp_path: Path, engine: str) -> None:
    class Watch(tf.TrainerCallback):
        """As wandb.watch does when training begins."""

        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
            for parameter in model.parameters():
                parameter.register_hook(self.seen.append)

    watch = Watch()
    trainer = trainer_for(tmp_path, dp={"engine": engine}, callbacks=[watch])
    with pytest.raises(ConfigurationError, match="no gradient hooks on trainable parameters"):
        trainer.train()
    assert watch.seen == []


class Seeded:
    seed = 3

    def __call__(self, rows: list[Any]) -> Any:
        return collate(rows)


class Wrapping:
    def __init__(self) -> None:
        self.inner_collator = Seeded()

    def __call__(self, rows: list[Any]) -> Any:
        return self.inner_collator(rows)


def applied(rows: list[Any], inner: Any) -> Any:
    return inner(rows)


@pytest.mark.parametrize(
    "collator", [Wrapping(), functools.partial(applied, inner=Seeded()), Seeded().__call__]
)
def test_a_seeded_collator_inside_another(tmp_path: Path, collator: Any) -> None:
    refused(
        tmp_path, r"data_collator\.seed=3", lambda: trainer_for(tmp_path, data_collator=collator)
    )


def test_an_empty_text_is_an_example_like_any_other(tmp_path: Path) -> None:
    """Its row is all padding, which is not padding on the left; a run must not stop where it is drawn."""
    dataset = Sentences()
    dataset.rows[0] = {"input_ids": [], "labels": 1}
    trainer = trainer_for(tmp_path, train_dataset=dataset, dp={"expected_batch_size": 40})
    trainer.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == trainer.state.global_step


def test_gradients_that_somebody_else_left_are_not_applied(tmp_path: Path) -> None:
    model = tiny_bert()

    class Foreign(tf.TrainerCallback):
        """Its own exact gradient, on a parameter that it then freezes."""

        def on_step_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
            model.classifier.bias.grad = torch.full_like(model.classifier.bias, 9.0)
            model.classifier.bias.requires_grad_(False)

    before = model.classifier.bias.detach().clone()
    trainer_for(tmp_path, model=model, callbacks=[Foreign()]).train()
    assert torch.equal(model.classifier.bias, before)


def cut_back(path: Path, releases: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for line in lines:
        kept.append(line)
        path.write_bytes(b"".join(kept))
        if read_ledger(path).num_releases == releases:
            return


@pytest.mark.parametrize("again", ["same trainer", "new trainer"])
def test_a_checkpoints_fuller_copy_counts_without_a_resume_too(tmp_path: Path, again: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(tmp_path, host=saving)
    trainer.train()
    cut_back(tmp_path / LEDGER_NAME, 2)
    if again == "new trainer":
        trainer = trainer_for(tmp_path, host=saving, dp={"ledger": "continue"})
    trainer.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 12


def test_another_runs_copies_are_not_merged(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer_for(tmp_path / "a", host=saving).train()
    trainer_for(tmp_path / "b").train()
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    with pytest.raises(LedgerMismatchError, match="earlier run"):
        trainer_for(tmp_path / "b", dp={"ledger": "continue"}).train()
