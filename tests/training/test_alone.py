"""The definition of an example's loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as tf
from loss_zoo import LENGTH, MODELS, batch, build, looped, trainer_for
from torch import Tensor, nn

from hf_dp.errors import ConfigurationError
from hf_dp.training.alone import alone, definition_loss, nothing_to_predict


def number(_model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return inputs["x"].sum()


@pytest.mark.parametrize("name", MODELS)
def test_the_definition_is_compute_loss_on_each_row(name: str) -> None:
    model, inputs = build(name), batch(name)
    trainer = trainer_for(model)
    with torch.no_grad():
        found = definition_loss(trainer.compute_loss)(model, inputs)
    expected = looped(trainer, inputs, trim=MODELS[name][1] == "span")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2-lm", "bert-cls", "bert-token", "distilbert-mlm"])
def test_an_examples_loss_does_not_know_its_neighbours_length(name: str) -> None:
    """Absolute positions count left padding, of which the longest neighbour decides."""
    model, inputs = build(name), batch(name, padding="left")
    trainer = trainer_for(model)
    loss = definition_loss(trainer.compute_loss)
    short = {k: v[1:2, 2:] if v.shape == (5, LENGTH) else v[1:2] for k, v in inputs.items()}
    with torch.no_grad():
        with_neighbours, without = loss(model, inputs)[1], loss(model, short)[0]
        padded = definition_loss(trainer.compute_loss, trim_padding=False)(model, inputs)[1]
    torch.testing.assert_close(with_neighbours, without, rtol=1e-6, atol=1e-6)
    assert abs(padded - without) > 1e-3, "the leak that trimming closes"


def test_a_span_loss_does_not_know_its_neighbours_length() -> None:
    model, inputs = build("bert-qa"), batch("bert-qa")
    trainer = trainer_for(model)
    with torch.no_grad():
        own = definition_loss(trainer.compute_loss)(model, inputs)[1]
        padded = definition_loss(trainer.compute_loss, trim_padding=False)(model, inputs)[1]
    assert abs(own - padded) > 1e-3


def test_the_batch_is_left_as_it_was() -> None:
    model, inputs = build("bert-token"), batch("bert-token")
    before = {key: value.clone() for key, value in inputs.items()}

    def greedy(model: nn.Module, one: dict[str, Any]) -> Tensor:
        loss = trainer_for(model, smoothing=0.1).compute_loss(model, one)
        one["input_ids"].zero_()
        return loss

    definition_loss(greedy)(model, inputs)
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[key], before[key]) for key in before)


def test_only_the_mean_of_no_tokens_becomes_zero() -> None:
    model, inputs = build("bert-token"), batch("bert-token")
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    inputs["inputs_embeds"][1, 0] = math.nan
    losses = definition_loss(trainer_for(model).compute_loss)(model, inputs)
    assert losses.isnan().tolist() == [False, True, False, False, False]
    assert losses[3] == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["gpt2-lm", "bert-cls", "bert-qa", "roberta-mlm"])
def test_nothing_to_predict_gives_a_zero_gradient(name: str, smoothing: float) -> None:
    model, inputs = build(name), batch(name)
    target = next(label for label in ("labels", "end_positions") if label in inputs)
    inputs[target] = torch.full_like(inputs[target], 99 if target != "labels" else -100)
    trainer = trainer_for(model, smoothing=smoothing)
    losses = definition_loss(trainer.compute_loss)(model, inputs)
    assert losses.tolist() == [0.0] * 5
    losses.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_the_zero_hides_the_nan_of_a_users_division_from_backward() -> None:
    def masked_mean(model: nn.Module, one: dict[str, Any]) -> Tensor:
        kept = (one["labels"] != -100).float()
        return (model(one["x"])[:, 0] * kept).sum() / kept.sum()

    model = nn.Linear(3, 1)
    inputs = {"x": torch.ones(2, 3), "labels": torch.tensor([-100, 1])}
    definition_loss(masked_mean)(model, inputs).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[1.0, 1.0, 1.0]]


def test_without_trainable_parameters_zero_is_a_constant() -> None:
    model = build("bert-cls").requires_grad_(False)
    inputs = batch("bert-cls") | {"labels": torch.full((5,), -100)}
    losses = definition_loss(trainer_for(model).compute_loss)(model, inputs)
    assert losses.tolist() == [0.0] * 5


def test_a_label_that_a_causal_model_never_predicts_is_nothing_to_predict() -> None:
    one = {"labels": torch.tensor([[5, -100, -100]])}
    assert nothing_to_predict(build("gpt2-lm"), one)
    assert not nothing_to_predict(build("bert-mlm"), one)
    assert not nothing_to_predict(build("bert-mlm"), {})


def test_a_finite_loss_on_ignored_labels_is_kept() -> None:
    inputs = {"x": torch.ones(2, 3), "labels": torch.full((2,), -100)}
    assert definition_loss(number)(nn.Linear(1, 1), inputs).tolist() == [3.0, 3.0]


def test_num_items_in_batch_is_never_passed() -> None:
    seen: list[set[str]] = []

    def spy(_model: nn.Module, one: dict[str, Any]) -> Tensor:
        seen.append(set(one))
        return one["x"].sum()

    definition_loss(spy)(nn.Linear(1, 1), {"x": torch.ones(2, 3), "num_items_in_batch": 7})
    assert seen == [{"x"}, {"x"}]


def test_precision_is_float32_or_wider() -> None:
    model = nn.Linear(1, 1)
    for given, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert definition_loss(number)(model, {"x": torch.ones(2, 1, dtype=given)}).dtype is kept


def test_an_empty_batch_has_no_losses() -> None:
    assert definition_loss(number)(nn.Linear(1, 1), {"x": torch.ones(0, 3)}).shape == (0,)


@pytest.mark.parametrize("answer", [1.0, torch.ones(2), None])
def test_a_loss_that_is_not_one_number_is_refused(answer: Any) -> None:
    with pytest.raises(ConfigurationError, match="a tensor holding one number"):
        definition_loss(lambda _model, _one: answer)(nn.Linear(1, 1), {"x": torch.ones(2, 1)})


def test_padding_is_cut_on_both_sides_and_labels_with_it() -> None:
    inputs = {
        "input_ids": torch.arange(8).reshape(2, 4),
        "attention_mask": torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0]]),
        "labels": torch.arange(8).reshape(2, 4),
    }
    model = build("gpt2-lm")
    assert alone(model, inputs, 0)["labels"].tolist() == [[1, 2]]
    assert alone(model, inputs, 1)["input_ids"].tolist() == [[4, 5, 6]]


def test_what_is_not_understood_is_not_cut() -> None:
    mask = torch.tensor([[0, 1, 1, 0]])
    ids = torch.ones(1, 4, dtype=torch.long)
    one = {"input_ids": ids, "attention_mask": mask}
    bert, t5 = build("bert-cls"), build("t5-seq2seq")

    def width(model: nn.Module, inputs: dict[str, Any]) -> int:
        return alone(model, inputs, 0)["input_ids"].shape[1]

    assert width(bert, one) == 2
    assert width(bert, one | {"mystery": ids}) == 4
    assert width(bert, one | {"attention_mask": mask * 0}) == 4
    assert width(bert, one | {"attention_mask": mask[:, None, None]}) == 4
    assert width(t5, one | {"labels": ids}) == 4
    several = alone(bert, one | {"labels": torch.zeros(1, 4)}, 0)
    assert several["labels"].shape == (1, 4)
    assert several["input_ids"].shape == (1, 2)
    span = {"start_positions": torch.zeros(1), "end_positions": torch.zeros(1)}
    assert width(bert, one | span) == 3


def test_the_trainers_own_compute_loss_needs_no_num_items() -> None:
    assert tf.Trainer.compute_loss.__defaults__ == (False, None)
