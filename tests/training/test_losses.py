"""The fast losses against the stock Trainer, one row at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as tf
from loss_zoo import MODELS, PAD, VOCAB, batch, build, build_lora, looped, trainer_for
from torch import Tensor, nn

from hf_dp.errors import ConfigurationError
from hf_dp.training.losses import (
    Task,
    VectorisedLoss,
    default_loss_ceiling,
    definition_loss,
    recognise_task,
    vectorised_loss,
)

TASKS = {
    "class": Task.SEQUENCE_CLASSIFICATION,
    "several": Task.SEQUENCE_CLASSIFICATION,
    "number": Task.SEQUENCE_CLASSIFICATION,
    "token": Task.TOKEN_CLASSIFICATION,
    "span": Task.QUESTION_ANSWERING,
    "target": Task.SEQ2SEQ_LM,
}
SMOOTHED = ("bert-cls", "gpt2-cls", "bert-token", "roberta-mlm", "gpt2-lm", "llama-lm", "opt-lm")
LORA = (
    "bert-cls",
    "distilbert-qa",
    "roberta-mlm",
    "gpt2-lm",
    "qwen3-lm",
    "llama-cls",
    "t5-seq2seq",
)


class Returns(nn.Module):
    """Gives the same output whatever it is given."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, **inputs: Tensor) -> Any:
        self.seen = set(inputs)
        return self.output


def fast_losses(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Tensor:
    task = recognise_task(model, inputs)
    assert task is not None
    with torch.no_grad():
        return vectorised_loss(task, **options)(model, inputs)


def task_of(name: str) -> Task:
    words = Task.MASKED_LM if name.endswith("mlm") else Task.CAUSAL_LM
    return TASKS.get(MODELS[name][1], words)


@pytest.mark.parametrize("name", MODELS)
def test_vectorised_loss_is_compute_loss_on_each_row(name: str) -> None:
    model, inputs = build(name), batch(name)
    expected = looped(trainer_for(model), inputs, trim=MODELS[name][1] == "span")
    assert expected.std() > 1e-2, "rows that look alike would prove nothing"
    torch.testing.assert_close(fast_losses(model, inputs), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama-lm", "qwen3-lm", "opt-lm", "llama-cls", "roberta-token"])
def test_left_padding_changes_nothing_where_positions_do_not_count_it(name: str) -> None:
    model, inputs = build(name), batch(name, padding="left")
    expected = looped(trainer_for(model), inputs, trim=True)
    torch.testing.assert_close(fast_losses(model, inputs), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["bert-cls", "bert-qa", "bert-token", "t5-seq2seq"])
def test_float64_stays_float64(name: str) -> None:
    model = build(name, torch.float64)
    inputs = batch(name)
    losses = fast_losses(model, inputs)
    assert losses.dtype is torch.float64
    expected = looped(trainer_for(model), inputs, trim=name == "bert-qa")
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)


def test_causal_float64_equals_a_hand_calculation() -> None:
    model, inputs = build("gpt2-lm", torch.float64), batch("gpt2-lm")
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    log_p = logits.log_softmax(-1)
    for i, loss in enumerate(fast_losses(model, inputs)):
        own = [
            -log_p[i, t, label] for t, label in enumerate(inputs["labels"][i, 1:]) if label != -100
        ]
        mean = torch.stack(own).mean() if own else torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(loss, mean, rtol=1e-12, atol=1e-12)


def test_half_precision_logits_give_a_float32_loss() -> None:
    model = build("llama-lm", torch.bfloat16)
    losses = fast_losses(model, batch("llama-lm"))
    assert losses.dtype is torch.float32
    assert losses.isfinite().all()


@pytest.mark.parametrize("name", SMOOTHED)
def test_label_smoothing_is_the_trainers_on_each_row(name: str) -> None:
    model, inputs = build(name), batch(name)
    expected = looped(trainer_for(model, smoothing=0.2), inputs)
    found = fast_losses(model, inputs, label_smoothing=0.2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (found - fast_losses(model, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["t5-seq2seq", "bart-seq2seq"])
def test_seq2seq_label_smoothing_is_the_trainers(name: str) -> None:
    model, inputs = build(name), batch(name)
    # As DataCollatorForSeq2Seq does: the stock smoother takes the labels away from the model.
    inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    expected = looped(trainer_for(model, smoothing=0.1), inputs)
    found = fast_losses(model, inputs, label_smoothing=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# peft asks transformers for a property under the name it had before 5.23.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", LORA)
def test_peft_models_are_seen_through(name: str) -> None:
    model, inputs = build_lora(name), batch(name)
    assert recognise_task(model, inputs) is task_of(name)
    expected = looped(trainer_for(model), inputs, trim=MODELS[name][1] == "span")
    torch.testing.assert_close(fast_losses(model, inputs), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in MODELS if MODELS[n][1] not in ("number", "several")])
def test_an_example_with_nothing_to_predict_has_no_loss_and_no_gradient(name: str) -> None:
    model, inputs = build(name), batch(name)
    for label in ("labels", "start_positions", "end_positions"):
        if label in inputs:
            inputs[label] = torch.full_like(inputs[label], 99 if "pos" in label else -100)
    losses = vectorised_loss(task_of(name))(model, inputs)
    assert losses.tolist() == [0.0] * len(losses)
    losses.sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_has_no_gradient_in_another_row(name: str) -> None:
    model, inputs = build(name), batch(name)
    seen: list[Tensor] = []

    def record(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings >= VOCAB:
            module.register_forward_hook(record)
    losses = vectorised_loss(task_of(name))(model, inputs)
    for i in (0, 1, 4):
        gradients = torch.autograd.grad(losses[i], seen, retain_graph=True)
        for j in range(len(losses)):
            assert bool(any(g[j].any() for g in gradients)) == (i == j)


@pytest.mark.parametrize("name", ["gpt2-lm", "bert-mlm", "bert-token", "bert-qa", "llama-lm"])
def test_dropping_a_long_example_does_not_move_the_others(name: str) -> None:
    """The leak of a mean over the batch's tokens: one example of 31 beside 31 of length 3."""
    model = build(name)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (32, 31), generator=generator)
    mask = torch.zeros(32, 31, dtype=torch.long)
    mask[:, :3] = 1
    mask[7] = 1
    inputs = {"input_ids": ids.where(mask == 1, PAD), "attention_mask": mask}
    if name == "bert-qa":
        inputs |= {"start_positions": ids[:, 0] % 3, "end_positions": ids[:, 1] % 3}
    else:
        labels = ids % 3 if name == "bert-token" else ids
        inputs["labels"] = labels.where(mask == 1, -100)
    others = [i for i in range(32) if i != 7]
    without = {k: v[others, :3] if v.dim() == 2 else v[others] for k, v in inputs.items()}
    before, after = fast_losses(model, inputs)[others], fast_losses(model, without)
    torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2-lm", "llama-lm", "bert-token"])
def test_labels_of_padding_are_not_an_examples_own(name: str) -> None:
    """As in ``labels = input_ids.clone()``: how much padding is learnt depends on the neighbours."""
    model, inputs = build(name), batch(name)
    inputs["labels"] = inputs["input_ids"] % 3 if name == "bert-token" else inputs["input_ids"]
    expected = looped(trainer_for(model), inputs, trim=True)
    torch.testing.assert_close(fast_losses(model, inputs), expected, rtol=1e-6, atol=1e-6)
    assert (looped(trainer_for(model), inputs) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("start", "end"), [(0, 9), (9, 0), (-1, 1)])
def test_an_answer_is_ignored_if_either_end_is_outside(start: int, end: int) -> None:
    model, inputs = build("bert-qa"), batch("bert-qa")
    inputs["start_positions"] = torch.full((5,), start)
    inputs["end_positions"] = torch.full((5,), end)
    losses = fast_losses(model, inputs)
    assert bool((losses == 0).all()) == (9 in (start, end))
    definition = definition_loss(trainer_for(model).compute_loss)(model, inputs)
    torch.testing.assert_close(losses, definition.detach(), rtol=1e-6, atol=1e-6)


def test_nan_in_one_row_stays_in_that_row() -> None:
    model, inputs = build("bert-token"), batch("bert-token")
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    inputs["inputs_embeds"][2, 0] = math.nan
    losses = vectorised_loss(Task.TOKEN_CLASSIFICATION)(model, inputs)
    assert losses.isnan().tolist() == [False, False, True, False, False]


def test_nan_logits_at_ignored_positions_do_not_reach_the_gradient() -> None:
    logits = torch.randn(2, 3, 4)
    logits[:, 1] = math.nan
    logits.requires_grad_()
    given = {"labels": torch.tensor([[0, -100, 2], [1, -100, -100]])}
    losses = VectorisedLoss(Task.TOKEN_CLASSIFICATION)(Returns(logits), given)
    losses.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_num_items_in_batch_never_reaches_the_model() -> None:
    model = Returns(torch.zeros(5, 3))
    VectorisedLoss(Task.SEQUENCE_CLASSIFICATION)(
        model, batch("bert-cls") | {"num_items_in_batch": 9}
    )
    assert model.seen == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("name", ["gpt2-lm", "llama-cls", "t5-seq2seq", "bart-seq2seq"])
def test_no_cache_is_filled(name: str) -> None:
    model, inputs = build(name), batch(name)
    model.config.use_cache = True
    outputs: list[Any] = []
    model.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    fast_losses(model, inputs)
    assert outputs[0].get("past_key_values") is None


@pytest.mark.parametrize("name", MODELS)
def test_the_task_is_recognised(name: str) -> None:
    assert recognise_task(build(name), batch(name)) is task_of(name)


def test_without_labels_there_is_no_task() -> None:
    assert recognise_task(build("gpt2-lm"), {"input_ids": torch.ones(1, 2)}) is None
    assert recognise_task(nn.Linear(2, 2), {"labels": torch.ones(1)}) is None


def test_missing_labels_are_named() -> None:
    with pytest.raises(ConfigurationError, match="a tensor called labels"):
        vectorised_loss(Task.CAUSAL_LM)(build("gpt2-lm"), {"input_ids": torch.ones(1, 2).long()})


@pytest.mark.parametrize("task", [Task.CAUSAL_LM, Task.SEQUENCE_CLASSIFICATION])
def test_shapes_that_do_not_fit_the_task_are_refused(task: Task) -> None:
    model, inputs = build("bert-token"), batch("bert-cls")
    with pytest.raises(ConfigurationError, match="read off its own row"):
        VectorisedLoss(task)(model, inputs | {"labels": inputs["labels"].repeat(1, 1).T})


def test_paired_and_span_shapes_are_checked() -> None:
    model = build("bert-cls")
    with pytest.raises(ConfigurationError, match="as many labels"):
        fast_losses(model, batch("bert-cls") | {"labels": torch.zeros(5, 2)})
    outputs = {"start_logits": torch.zeros(2, 3), "end_logits": torch.zeros(2, 4)}
    ends = {"start_positions": torch.zeros(2).long(), "end_positions": torch.zeros(2).long()}
    with pytest.raises(ConfigurationError, match="start and end logits"):
        VectorisedLoss(Task.QUESTION_ANSWERING)(Returns(outputs), ends)


def test_an_output_without_logits_is_named() -> None:
    for output in ({"hidden": torch.zeros(1)}, (), "text"):
        with pytest.raises(ConfigurationError, match="an output with logits"):
            vectorised_loss(Task.CAUSAL_LM)(Returns(output), {"labels": torch.ones(1, 1)})


@pytest.mark.parametrize("smoothing", [-0.1, 1.5, math.nan])
def test_smoothing_must_be_a_share(smoothing: float) -> None:
    with pytest.raises(ConfigurationError, match="label_smoothing_factor"):
        vectorised_loss(Task.CAUSAL_LM, label_smoothing=smoothing)


def test_the_ceiling_comes_from_the_configuration() -> None:
    def ceiling(name: str) -> float:
        return default_loss_ceiling(build(name), task_of(name))

    assert ceiling("bert-cls") == ceiling("bert-token") == 2 * math.log(3)
    assert ceiling("gpt2-lm") == ceiling("t5-seq2seq") == 1.5 * math.log(VOCAB)
    assert ceiling("bert-qa") == 1.5 * math.log(40)
    assert ceiling("bert-regression") == ceiling("bert-regressions") == 10.0
    assert default_loss_ceiling(build("bert-cls"), None) == 10.0
    assert default_loss_ceiling(nn.Linear(2, 2), Task.CAUSAL_LM) == 10.0
    config = tf.BertConfig(num_labels=8, problem_type="multi_label_classification")
    several = nn.Module()
    several.config = config
    assert default_loss_ceiling(several, Task.SEQUENCE_CLASSIFICATION) == 2 * math.log(2)
