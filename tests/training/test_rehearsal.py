"""The preflight of a DPTrainer: stops what is unsound before any release, and disturbs nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_zoo import batch, build
from loss_zoo import trainer_for as loss_trainer
from tiny_runs import collate, fixed, tiny_bert, trainer_for, weights
from torch import Tensor, nn

from hf_dp.clipping import FlatClipping, LossRelease
from hf_dp.engines import engine_named
from hf_dp.engines.preflight import TOLERANCE, preflight
from hf_dp.errors import ConfigurationError, UncoveredParameterError
from hf_dp.layers import DEFAULT_LAYER_RULES
from hf_dp.layers.factors import Vec
from hf_dp.layers.linear import linear
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.training import mixin, rehearsal, settled
from hf_dp.training.choice import Choice, choose
from hf_dp.training.made_up import MadeUpRows, each_alone

OFF = "preflight was switched off"


def losses_of(model: nn.Module, inputs: Any) -> Tensor:
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")


def mean_of(model: nn.Module, inputs: Any) -> Tensor:
    """Every loss its own, every gradient a share of the batch's: what compares losses sees nothing."""
    losses = losses_of(model, inputs)
    return losses.detach() + (losses - losses.detach()) / len(losses)


class OwnBatchNorm(nn.Module):
    """Known to no list of names; evaluation mode would hide it."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.std(0, unbiased=False) + 1) if self.training else x


def test_a_coupled_loss_stops_training_before_any_release(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, example_loss=mean_of)
    before = weights(trainer.model)
    with pytest.raises(ConfigurationError, match=r"^example_loss='loss': .* batch mates"):
        trainer.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 0
    assert torch.equal(weights(trainer.model), before)


def test_a_coupled_layer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the choice of the loss not see it, and take the examples together."""
    monkeypatch.setattr("hf_dp.training.choice.padding_matters", lambda *_: False)
    model = tiny_bert()
    model.bert.encoder.layer[1].output.dropout = OwnBatchNorm()
    with pytest.raises(ConfigurationError, match=r"layer\.1\.output\.dropout='OwnBatchNorm'"):
        trainer_for(tmp_path, model=model).train()


def test_switched_off_it_sees_nothing_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="batch mates"):  # the engine sees it, too
        trainer_for(tmp_path / "a", example_loss=mean_of, dp={"preflight": False}).train()
    monkeypatch.setattr("hf_dp.engines.settle.check_mates", lambda *_: None)
    trainer = trainer_for(tmp_path, example_loss=mean_of, dp={"preflight": False})
    trainer.train()
    assert OFF in str(trainer.privacy_report())
    checked = trainer_for(tmp_path / "b", example_loss=losses_of)
    checked.train()
    assert OFF not in str(checked.privacy_report())


def test_micro_batches_of_one_may_have_any_loss(tmp_path: Path) -> None:
    host = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 2}
    trainer_for(tmp_path, example_loss=mean_of, host=host).train()


@pytest.mark.parametrize("options", [{}, {"hidden_dropout_prob": 0.1}], ids=str)
def test_a_run_is_the_same_with_and_without(tmp_path: Path, options: dict[str, Any]) -> None:
    results = []
    for asked in (True, False):
        model = tiny_bert()
        for module in model.modules():
            if isinstance(module, nn.Dropout) and options:
                module.p = 0.1
        trainer = trainer_for(
            tmp_path / str(asked),
            model=model,
            coins=fixed(),
            dp={"preflight": asked, "engine": "sequential"},
        )
        trainer.train()
        results.append(weights(trainer.model))
    assert torch.equal(*results)


def test_it_flies_once_a_run_with_the_engine_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flown: list[Any] = []
    real = rehearsal.preflight

    def noted(*args: Any, **parts: Any) -> None:
        flown.append(parts["engine"])
        assert parts["width"] == 3
        real(*args, **parts)

    monkeypatch.setattr(rehearsal, "preflight", noted)
    trainer = trainer_for(tmp_path, host={"max_steps": 3, "per_device_train_batch_size": 3})
    trainer.train()
    assert flown == [trainer.engine]
    trainer.train()
    assert flown == [trainer.engine] * 2


def test_only_made_up_examples_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def noted(model: Any, alone: Any, together: Any, **parts: Any) -> None:
        seen.append(together)

    monkeypatch.setattr(rehearsal, "preflight", noted)
    for index in (0, 1):
        data = [{"input_ids": [8 + index, 9], "labels": index}] * 40
        trainer_for(tmp_path / str(index), train_dataset=data, host={"max_steps": 1}).train()
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in collate(data))


def test_what_cannot_be_tried_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def needs_real_words(model: nn.Module, inputs: Any) -> Tensor:
        if len(inputs["labels"]) == 4:
            raise ValueError("a private value")
        return losses_of(model, inputs)

    refused = MadeUpRows(collate([{"input_ids": [8], "labels": 0}] * 4), {})
    for name, rows in (("none", None), ("refused", refused)):
        choice = Choice(needs_real_words, False, False, "given", rows)
        monkeypatch.setattr(settled, "choose", lambda *_, choice=choice, **__: choice)
        with caplog.at_level(logging.DEBUG):
            trainer_for(
                tmp_path / name, host={"max_steps": 1, "per_device_train_batch_size": 2}
            ).train()
        assert caplog.text.count("preflight not possible") == 1
        assert "a private value" not in caplog.text
        caplog.clear()


def test_where_each_is_computed_alone_there_is_nothing_to_compare(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(mixin.DPTrainerMixin):
        pass

    class Scaled(trainer_for(tmp_path / "x").__class__):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            return 2 * super().compute_loss(*args, **options)

    with caplog.at_level(logging.INFO):
        trainer_for(tmp_path / "y", cls=Scaled, host={"max_steps": 1}).train()
    assert "nothing to compare" in caplog.text


@pytest.mark.parametrize(
    "name",
    ["bart-seq2seq", "bert-qa", "gpt2-lm", "opt-lm", "qwen3-lm", "roberta-token", "t5-seq2seq"],
)
def test_ordinary_models_pass_with_room_to_spare(name: str) -> None:
    model, inputs = build(name), batch(name)
    columns = {k: v[:1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    trainer = loss_trainer(model)
    choice = choose(
        model,
        columns,
        lambda model, alone: trainer.compute_loss(model, alone),
        given=None,
        trusted=True,
    )
    assert choice.rows is not None
    assert not choice.alone
    model.train()
    preflight(
        model,
        each_alone(choice.rows),
        choice.rows,
        engine=engine_named("auto"),
        example_loss=choice.example_loss,
        clipping=FlatClipping(1.0),
        loss_release=LossRelease(),
        tolerance=TOLERANCE / 10,
    )


def test_a_wrong_layer_rule_stops_training_by_name(tmp_path: Path) -> None:
    def nearly(m: Any, x: Tensor, g: Tensor, n: int) -> Any:
        """What is wrong by more than this, engines refuse by themselves."""
        for parameter, factor in linear(m, x, g, n):
            yield parameter, Vec(factor.dense().values * 0.99)

    rules = {**DEFAULT_LAYER_RULES, nn.Linear: nearly}
    with pytest.raises(UncoveredParameterError, match=r"^engine='auto', parameter .*='Linear'"):
        trainer_for(tmp_path, layer_rules=rules).train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 0
