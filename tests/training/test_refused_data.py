"""Models and data with which no guarantee would hold are refused by name, before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_runs import Sentences, collate, refused, tiny_bert, trainer_for
from torch import nn

from hf_dp.engines import BookKeepingEngine
from hf_dp.errors import ConfigurationError, PrivacyError
from hf_dp.ledger import LEDGER_NAME, read_ledger


def with_batch_norm() -> nn.Module:
    model = tiny_bert()
    model.dropout = nn.Sequential(nn.BatchNorm1d(16))
    return model


def with_router_loss() -> nn.Module:
    model = tiny_bert()
    model.config.output_router_logits = True
    return model


def of_pairs(name: str) -> nn.Module:
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2} | {
        "intermediate_size": 8,
        "vocab_size": 50,
        "projection_dim": 4,
    }
    parts = {"text_config": text, "vision_config": {**text, "image_size": 4, "patch_size": 2}}
    model: type[tf.PreTrainedModel] = getattr(tf, name)
    return model(model.config_class(**parts, projection_dim=4, num_labels=3))


def contrastive() -> nn.Module:
    return of_pairs("CLIPModel")


@pytest.mark.parametrize("name", ["SiglipModel", "AltCLIPModel", "Owlv2Model", "ChineseCLIPModel"])
def test_models_that_compare_pairs_are_refused(tmp_path: Path, name: str) -> None:
    refused(tmp_path, f"model='{name}'", lambda: trainer_for(tmp_path, model=of_pairs(name)))


@pytest.mark.parametrize("name", ["CLIPForImageClassification", "SiglipForImageClassification"])
def test_a_head_on_features_of_a_contrastive_model_trains(tmp_path: Path, name: str) -> None:
    rows = [{"pixel_values": torch.rand(3, 4, 4), "labels": n % 3} for n in range(40)]
    options = {"train_dataset": rows, "data_collator": tf.default_data_collator}
    trainer = trainer_for(tmp_path, model=of_pairs(name), **options)
    trainer.train()
    assert isinstance(trainer.engine.chosen, BookKeepingEngine)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (with_batch_norm, "BatchNorm1d.*GroupNorm"),
        (with_router_loss, "output_router_logits"),
        (contrastive, "model='CLIPModel'"),
    ],
)
def test_models_whose_examples_influence_one_another(
    tmp_path: Path, model: Callable[[], nn.Module], match: str
) -> None:
    refused(tmp_path, match, lambda: trainer_for(tmp_path, model=model()))


def test_a_model_that_trains_nothing(tmp_path: Path) -> None:
    model = tiny_bert().requires_grad_(False)
    refused(tmp_path, "requires_grad", lambda: trainer_for(tmp_path, model=model))


def test_flattening_collators(tmp_path: Path) -> None:
    flattening = tf.DataCollatorWithFlattening()
    refused(
        tmp_path,
        "DataCollatorWithFlattening.*one row per example",
        lambda: trainer_for(tmp_path, data_collator=flattening),
    )

    class PaddingFree:
        padding_free = True

    refused(tmp_path, "PaddingFree", lambda: trainer_for(tmp_path, data_collator=PaddingFree()))


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Any:
        yield from Sentences()


class SizedStream(Stream):
    def __len__(self) -> int:
        return 40


class WithoutLength(torch.utils.data.Dataset[dict[str, Any]]):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return Sentences()[index]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (Stream(), "train_dataset='Stream'.*a dataset with a length"),
        (SizedStream(), "train_dataset='SizedStream'"),
        (WithoutLength(), "train_dataset='WithoutLength'"),
        ([], "train_dataset='empty'"),
    ],
)
def test_data_that_cannot_be_sampled(tmp_path: Path, data: Any, match: str) -> None:
    refused(tmp_path, match, lambda: trainer_for(tmp_path, train_dataset=data))


def test_training_without_data(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, train_dataset=None)
    refused(tmp_path, "train_dataset=None", lambda: trainer)


def test_evaluating_on_the_training_data(tmp_path: Path) -> None:
    data = Sentences()
    for evaluated in (data, {"held out": Sentences(), "all": data}):
        options: dict[str, Any] = {"train_dataset": data, "eval_dataset": evaluated}
        refused(
            tmp_path, "eval_dataset='the training", lambda o=options: trainer_for(tmp_path, **o)
        )
    trainer = trainer_for(tmp_path, train_dataset=data)
    for evaluated in (data, {"a": data}):
        with pytest.raises(ConfigurationError, match="held out"):
            trainer.evaluate(evaluated)
    trainer.eval_dataset = data
    with pytest.raises(ConfigurationError, match="held out"):
        trainer.evaluate()
    refused(tmp_path, "eval_dataset", lambda: trainer)

    asked = trainer_for(
        tmp_path, train_dataset=data, eval_dataset=data, dp={"nonprivate_metrics": True}
    )
    assert asked.evaluate()["eval_loss"] > 0


def test_the_collators_own_name_is_said(tmp_path: Path) -> None:
    class Doubles:
        def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return {name: value.repeat_interleave(2, 0) for name, value in collate(rows).items()}

    trainer = trainer_for(tmp_path, data_collator=Doubles(), dp={"expected_batch_size": 40})
    with pytest.raises(ConfigurationError, match="data_collator='Doubles'"):
        trainer.train()


class Running(nn.Module):
    """Keeps a mean of what passes through, written in place or put there anew."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros(16), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        new = 0.9 * self.mean + 0.1 * x.detach().flatten(0, -2).mean(0)
        if self.in_place:
            self.mean.copy_(new)
        else:
            self.mean = new
        return x


class Instance(nn.Module):
    """Normalises each example alone, but also remembers the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(1, track_running_stats=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x[:, None])[:, 0]


@pytest.mark.parametrize("engine", ["book_keeping", "two_pass", "sequential"])
@pytest.mark.parametrize("layer", [Running(True), Running(False), Instance()], ids=str)
def test_statistics_of_private_examples_are_not_kept(
    tmp_path: Path, layer: nn.Module, engine: str
) -> None:
    """They would enter every later gradient and the saved model, without noise."""
    model = tiny_bert()
    model.dropout = layer
    trainer = trainer_for(tmp_path, model=model, dp={"engine": engine, "expected_batch_size": 40})
    before = model.classifier.weight.detach().clone()
    with pytest.raises(PrivacyError, match=r"model\.dropout\..*statistics of private examples"):
        trainer.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 0
    assert torch.equal(model.classifier.weight, before)


class Table(nn.Module):
    """Puts constants into its buffers in each pass, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constant", torch.ones(16), persistent=False)
        self.register_buffer("grown", torch.arange(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.register_buffer("constant", torch.ones(16), persistent=False)
        self.register_buffer("grown", torch.arange(len(self.grown) + 1), persistent=False)
        return x * self.constant


def test_constants_may_be_put_into_buffers_anew(tmp_path: Path) -> None:
    model = tiny_bert()
    model.dropout = Table()
    trainer_for(tmp_path, model=model).train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 6


def test_batches_from_elsewhere_are_refused(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    with pytest.raises(PrivacyError, match="train"):
        trainer.training_step(trainer.model, collate([Sentences()[0]]))
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(  # type: ignore[method-assign]
        Sentences(), batch_size=4, collate_fn=collate
    )
    with pytest.raises(PrivacyError, match="LogicalBatch"):
        trainer.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 0


def test_data_that_changes_after_train_began_is_refused(tmp_path: Path) -> None:
    """A model_init that swaps the data would draw from another population than the ledger's."""
    trainer = trainer_for(tmp_path, model_init=lambda: tiny_bert())

    def swap() -> Any:
        trainer.train_dataset = Sentences(20)
        return tiny_bert()

    trainer.model_init = swap
    with pytest.raises(PrivacyError, match="with which train"):
        trainer.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 0
