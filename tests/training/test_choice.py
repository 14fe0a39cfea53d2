"""A fast loss is used only where it gives the definition's numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as tf
from loss_zoo import CLASSES, LENGTH, MODELS, VOCAB, batch, build, build_lora, looped, trainer_for
from torch import Tensor, nn
from torch.nn import functional as F

from hf_dp.training import vectorised
from hf_dp.training.losses import choose_example_loss


class Own(nn.Module):
    """A user's model: embeds, then classifies each token or their mean."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embedding = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, 1 if kind == "number" else VOCAB if kind == "next" else CLASSES)
        self.dropout = nn.Dropout(0.5)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Any:
        hidden = self.dropout(self.embedding(input_ids))
        pooled = self.kind in ("class", "number", "several", "coupled", "needs-labels")
        if pooled:
            mask = attention_mask[..., None]
            hidden = (hidden * mask).sum(1) / mask.sum(1)
        logits = self.head(hidden)
        if self.kind == "coupled":
            logits = logits - logits.mean(0)
        if self.kind == "needs-labels" and labels is None:
            raise ValueError("no labels")
        output = {"logits": logits}
        return output if labels is None else {"loss": self.loss(logits, labels), **output}

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.kind == "number":
            return F.mse_loss(logits[:, 0], labels)
        if self.kind == "several":
            return F.binary_cross_entropy_with_logits(logits, labels)
        if self.kind == "next":
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


class Overridden(tf.Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, **options: Any) -> Any:
        return 1.01 * super().compute_loss(model, inputs, **options)


OWN_BATCHES = {
    "class": "bert-cls",
    "number": "bert-regression",
    "several": "bert-multi-label",
    "token": "bert-token",
    "next": "gpt2-lm",
}


def chosen(model: nn.Module, inputs: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    trainer = trainer_for(model, **options)
    smoothing = options.get("smoothing", 0.0)
    return choose_example_loss(model, inputs, trainer.compute_loss, smoothing), trainer


@pytest.mark.parametrize("name", MODELS)
def test_transformers_models_get_their_fast_loss(name: str) -> None:
    model, inputs = build(name), batch(name)
    found, trainer = chosen(model, inputs)
    assert found is not None
    loss, line = found
    assert isinstance(loss, vectorised.VectorisedLoss)
    assert line.endswith("checked against compute_loss")
    expected = looped(trainer, inputs, trim=MODELS[name][1] == "span")
    torch.testing.assert_close(loss(model, inputs), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", OWN_BATCHES)
def test_a_users_own_model_is_recognised_by_its_numbers(kind: str) -> None:
    model, inputs = Own(kind), batch(OWN_BATCHES[kind])
    found, trainer = chosen(model, inputs)
    assert found is not None
    model.eval()
    torch.testing.assert_close(
        found[0](model, inputs), looped(trainer, inputs), rtol=1e-6, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["bert-cls", "gpt2-lm", "t5-seq2seq"])
def test_peft_models_get_their_fast_loss(name: str) -> None:
    found, _ = chosen(build_lora(name), batch(name))
    assert found is not None


@pytest.mark.parametrize("kind", ["coupled", "needs-labels"])
def test_a_model_that_mixes_rows_or_needs_labels_is_not_matched(kind: str) -> None:
    assert chosen(Own(kind), batch("bert-cls"))[0] is None


@pytest.mark.parametrize("name", ["bert-cls", "gpt2-lm", "t5-seq2seq", "bert-qa"])
def test_an_overridden_compute_loss_is_not_matched(name: str) -> None:
    assert chosen(build(name), batch(name), cls=Overridden)[0] is None


def test_a_compute_loss_func_is_matched_only_if_it_is_the_same() -> None:
    def same(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels)

    def other(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.multi_margin_loss(outputs["logits"], labels.clamp(min=0))

    model, inputs = build("bert-cls"), batch("bert-cls")
    assert chosen(model, inputs, compute_loss_func=same)[0] is not None
    assert chosen(model, inputs, compute_loss_func=other)[0] is None


@pytest.mark.parametrize("name", ["bert-cls", "gpt2-lm", "bert-token"])
def test_label_smoothing_must_be_the_trainers(name: str) -> None:
    model, inputs = build(name), batch(name)
    assert chosen(model, inputs, smoothing=0.1)[0] is not None
    trainer = trainer_for(model, smoothing=0.1)
    assert choose_example_loss(model, inputs, trainer.compute_loss, 0.2) is None
    assert choose_example_loss(model, inputs, trainer.compute_loss) is None


def test_seq2seq_smoothing_without_decoder_inputs_is_not_guessed() -> None:
    """The stock Trainer then shows BART's decoder the encoder's input: no fast loss of ours."""
    inputs = batch("bart-seq2seq")
    inputs["labels"] = F.pad(inputs["labels"], (0, LENGTH - 6), value=-100)
    assert chosen(build("bart-seq2seq"), inputs, smoothing=0.1)[0] is None


@pytest.mark.parametrize("name", ["gpt2-lm", "bert-cls", "distilbert-token"])
def test_left_padding_of_absolute_positions_is_not_matched(name: str) -> None:
    assert chosen(build(name), batch(name, padding="left"))[0] is None


@pytest.mark.parametrize("name", ["llama-lm", "qwen3-lm", "opt-lm", "roberta-mlm", "t5-seq2seq"])
def test_left_padding_that_a_model_does_not_see_is_matched(name: str) -> None:
    assert chosen(build(name), batch(name, padding="left"))[0] is not None


def test_a_classifier_without_padding_token_goes_row_by_row() -> None:
    model, inputs = build("gpt2-cls"), batch("gpt2-cls")
    model.config.pad_token_id = None
    assert chosen(model, inputs)[0] is None


@pytest.mark.parametrize("name", ["bert-cls", "gpt2-lm", "llama-lm", "t5-seq2seq"])
def test_half_precision_is_matched_and_still_told_apart(name: str) -> None:
    model, inputs = build(name, torch.bfloat16), batch(name)
    assert chosen(model, inputs)[0] is not None
    assert chosen(model, inputs, cls=Overridden)[0] is None or name != "gpt2-lm"
    if name != "t5-seq2seq":
        assert chosen(model, inputs, smoothing=0.5)[0] is not None


def test_where_two_losses_cannot_be_told_apart_neither_is_taken() -> None:
    """In half precision a uniform guess has the same loss with and without the shift."""
    model, inputs = Own("next"), batch("gpt2-lm")
    nn.init.normal_(model.head.weight, std=1e-3)
    nn.init.zeros_(model.head.bias)
    assert chosen(model, inputs)[0] is not None
    assert chosen(model.bfloat16(), inputs)[0] is None


def test_every_training_flag_comes_back() -> None:
    model, inputs = build("bert-cls").train(), batch("bert-cls")
    model.bert.encoder.layer[0].eval()
    trainer = trainer_for(model)
    before = [module.training for module in model.modules()]
    assert choose_example_loss(model, inputs, trainer.compute_loss) is not None
    assert [module.training for module in model.modules()] == before

    def broken(_model: nn.Module, _one: Any) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        choose_example_loss(model, inputs, broken)
    assert [module.training for module in model.modules()] == before
    assert len(set(before)) == 2


def test_dropout_does_not_disturb_the_comparison() -> None:
    model = Own("class").train()
    trainer = trainer_for(model)
    state = torch.get_rng_state()
    assert choose_example_loss(model, batch("bert-cls"), trainer.compute_loss) is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_where_every_label_is_ignored_only_the_unchanged_is_taken_by_name() -> None:
    model, inputs = build("gpt2-lm"), batch("gpt2-lm")
    inputs["labels"] = inputs["labels"].fill_(-100)
    found, trainer = chosen(model, inputs)
    assert found is not None
    assert "by its name" in found[1]
    assert chosen(model, inputs, cls=Overridden)[0] is None
    assert chosen(model, inputs, compute_loss_func=lambda *_a, **_o: torch.zeros(()))[0] is None
    assert choose_example_loss(model, inputs, lambda m, i: trainer.compute_loss(m, i)) is None
    model.loss_function = lambda *_args, **_options: torch.tensor(math.nan)
    assert chosen(model, inputs)[0] is None


def test_a_users_own_class_is_not_taken_by_its_name() -> None:
    class OwnForTokenClassification(Own):
        pass

    inputs = batch("bert-token")
    inputs["labels"].fill_(-100)
    assert chosen(build("bert-token"), inputs)[0] is not None
    assert chosen(OwnForTokenClassification("token"), inputs)[0] is None


def test_one_broken_row_does_not_spoil_the_comparison() -> None:
    model, inputs = build("bert-token"), batch("bert-token")
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    inputs["inputs_embeds"][0, 0] = math.nan
    assert chosen(model, inputs)[0] is not None


def test_rows_with_nothing_to_predict_are_not_what_is_compared() -> None:
    """Of twelve rows only one has labels: an altered loss must still be noticed."""
    model, inputs = build("gpt2-lm"), batch("gpt2-lm", rows=12)
    for telling in range(12):
        inputs["labels"].fill_(-100)
        inputs["labels"][telling, 1] = 7
        found, _ = chosen(model, inputs)
        assert found is not None
        assert found[1].endswith("checked against compute_loss")


def test_forgetting_the_shift_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectorised, "own_labels", lambda labels, _mask, *, shifted: labels)
    assert chosen(build("gpt2-lm"), batch("gpt2-lm"))[0] is None


def test_dividing_by_the_batchs_tokens_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = vectorised.token_losses

    def wrong(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        own = (labels != -100).sum(1)
        sums = right(logits, labels, label_smoothing=label_smoothing) * own
        return sums * len(labels) / own.sum()

    monkeypatch.setattr(vectorised, "token_losses", wrong)
    assert chosen(build("gpt2-lm"), batch("gpt2-lm"))[0] is None
