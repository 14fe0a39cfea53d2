"""In a loop of one's own: how far neighbours made an example be padded, on either side, changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from user_runs import clipped, close

from hf_dp import clipped_sum
from hf_dp.engines import OneExample
from hf_dp.errors import ConfigurationError
from hf_dp.training import clipped_sum as module
from hf_dp.training.alone import alone
from hf_dp.training.unpadded import from_the_first_token, targets_at_the_front, unpadded

C = 1e-2
LENGTHS = (14, 3, 4, 5, 6, 3)
ENCODER = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
TRANSLATOR = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
    "eos_token_id": 2,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
PROPHET = {
    "vocab_size": 40,
    "hidden_size": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_encoder_attention_heads": 2,
    "num_decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BartForConditionalGeneration": ("translates", TRANSLATOR),
    "T5ForConditionalGeneration": ("translates", {**T5, "pad_token_id": 1, "decoder_start_token_id": 1}),
    "ProphetNetForConditionalGeneration": ("translates", PROPHET),
    "BertForQuestionAnswering": ("answers", ENCODER),
    "LayoutLMForTokenClassification": ("boxes", {**ENCODER, "max_2d_position_embeddings": 100}),
    "RobertaForTokenClassification": ("labels", ENCODER),
}  # fmt: skip


def model_of(name: str) -> nn.Module:
    options = MODELS[name][1]
    cls: type[tf.PreTrainedModel] = getattr(tf, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = cls(cls.config_class(**options))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
        return made.eval()


def row_of(kind: str, length: int) -> dict[str, list[Any]]:
    ids = [3 + (7 * length + place) % 36 for place in range(length)]
    row: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * length}
    if kind == "translates":
        return {**row, "labels": [3 + (5 * length + n) % 36 for n in range(1 + length // 2)]}
    if kind == "answers":
        return {**row, "start_positions": length // 2, "end_positions": length - 1}
    if kind == "boxes":
        row["bbox"] = [[n, n, n + 2, n + 2] for n in ids]
    return {**row, "labels": [n % 2 for n in ids]}


def padded(rows: list[dict[str, Any]], token: int, *, left: bool, targets_left: bool) -> Any:
    """As a loop of one's own pads them, answers counted from where its tokens begin."""
    fills = {"input_ids": token, "attention_mask": 0, "labels": -100, "bbox": [0] * 4}
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name.endswith("positions"):
            width = max(len(row["input_ids"]) for row in rows)
            moved = [left * (width - len(row["input_ids"])) for row in rows]
            batch[name] = torch.tensor(values) + torch.tensor(moved)
            continue
        width = max(map(len, values))
        ahead = targets_left if name == "labels" else left
        filled = [[fills[name]] * (width - len(value)) for value in values]
        batch[name] = torch.tensor(
            [f + v if ahead else v + f for f, v in zip(filled, values, strict=True)]
        )
    return batch


def summed(model: nn.Module, batch: Any, engine: str = "auto") -> Tensor:
    found = clipped_sum(model, batch, clipping_norm=C, engine=engine)
    return torch.cat([grad.flatten() for grad in found.grads.values()])


SIDES = [(True, True), (False, False), (False, True), (True, False)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("left", "targets_left"), SIDES)
@pytest.mark.parametrize("engine", ["auto", "sequential"])
def test_it_is_a_loop_over_examples(name: str, left: bool, targets_left: bool, engine: str) -> None:
    kind, options = MODELS[name]
    if kind != "translates" and left != targets_left:
        pytest.skip("labels are of tokens")
    model, rows = model_of(name), [row_of(kind, length) for length in LENGTHS]
    sides = {"left": left, "targets_left": targets_left}
    expected = torch.zeros(())
    for row in rows:
        loss = model(**padded([row], 1, **sides)).loss
        grads = torch.autograd.grad(
            loss, list(model.parameters()), allow_unused=True, materialize_grads=True
        )
        expected = expected + clipped(torch.cat([grad.flatten() for grad in grads]), C)
    found = summed(model, padded(rows, options["pad_token_id"], **sides), engine)
    assert close(found, expected, 1e-4)


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "BertForQuestionAnswering"])
def test_what_cuts_less_would_not_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: padding stays, and one long example moves the sum by several shares."""
    monkeypatch.setattr(module, "unpadded", alone)
    kind, model = MODELS[name][0], model_of(name)
    rows = [row_of(kind, length) for length in LENGTHS]
    batches = (padded(some, 1, left=True, targets_left=True) for some in (rows, rows[1:]))
    one, other = (summed(model, batch) for batch in batches)
    assert (one - other).norm() > 1.5 * C


def test_a_long_neighbour_drops_no_example() -> None:
    """LED in float64: padding beyond its window leaves losses as they are, and makes gradients nan."""
    sizes = {n: v for n, v in TRANSLATOR.items() if n != "max_position_embeddings"}
    limits = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.LEDForConditionalGeneration(tf.LEDConfig(**sizes, **limits, attention_window=4))
    model = model.double().eval()
    rows = [row_of("translates", length) for length in LENGTHS]
    for engine in ("auto", "book_keeping", "two_pass"):
        batches = (padded(some, 1, left=False, targets_left=False) for some in (rows, rows[1:]))
        one, other = (summed(model, batch, engine) for batch in batches)
        assert one.norm() > C
        assert (one - other).norm() <= C * (1 + 1e-6)


@pytest.mark.parametrize("engine", ["two_pass", "book_keeping"])
def test_engines_that_take_a_batch_at_once_take_targets_from_the_left(engine: str) -> None:
    kind, options = MODELS["T5ForConditionalGeneration"]
    rows = [row_of(kind, length) for length in LENGTHS]
    model = model_of("T5ForConditionalGeneration")
    sides = {name: name == "left" for name in ("right", "left")}
    right, left = (
        summed(model, padded(rows, options["pad_token_id"], left=False, targets_left=on), engine)
        for on in sides.values()
    )
    assert close(left, right, 1e-4)


def test_a_column_of_ones_own_that_is_as_wide_is_refused() -> None:
    batch = padded([row_of("labels", n) for n in (5, 3)], 1, left=True, targets_left=True)
    batch["rewards"] = torch.ones(2, 5)
    model = model_of("RobertaForTokenClassification")
    with pytest.raises(ConfigurationError, match=r"clipped_sum.batch='rewards'"):
        unpadded(model, batch, 1)
    assert unpadded(model, {n: v[1:] for n, v in batch.items()}, 0)["rewards"].shape == (1, 5)


def test_a_mask_of_other_places_than_the_first_cuts_nothing() -> None:
    """Whisper's counts frames, the last axis of its features."""
    features, mask = torch.randn(2, 4, 12), torch.ones(2, 12).long()
    mask[1, 6:] = 0
    batch = {"input_features": features, "attention_mask": mask, "labels": torch.ones(2, 3).long()}
    model = model_of("BartForConditionalGeneration")
    found = unpadded(model, batch, 1)
    assert found["input_features"].shape == (1, 4, 12)
    assert found["attention_mask"].shape == (1, 12)


@pytest.mark.parametrize("engine", ["auto", "two_pass", "sequential"])
def test_targets_of_which_nothing_is_learned_stop_nobody(engine: str) -> None:
    batch = padded([row_of("translates", n) for n in (8, 4)], 1, left=False, targets_left=False)
    model = model_of("BartForConditionalGeneration")
    expected = summed(model, {name: value[:1] for name, value in batch.items()}, engine)
    batch["labels"][1] = -100
    assert close(summed(model, batch, engine), expected, 1e-4)


def test_a_prompt_for_a_decoder_is_not_taken_for_padding() -> None:
    model = model_of("BartForConditionalGeneration")  # begins with 2, pads with 1
    labels = torch.tensor([[-100, -100, 7, 8], [-100, -100, 9, 10], [-100, 5, 6, -100]])
    given = torch.tensor([[2, 4, 5, 7], [1, 1, 2, 9], [2, 4, 5, 1]])
    found = targets_at_the_front(model, {"labels": labels, "decoder_input_ids": given})
    assert found["labels"].tolist() == [[-100, -100, 7, 8], [9, 10, -100, -100], [-100, 5, 6, -100]]
    assert found["decoder_input_ids"].tolist() == [[2, 4, 5, 7], [2, 9, 1, 1], [2, 4, 5, 1]]
    t5 = model_of("T5ForConditionalGeneration")  # begins and pads with 1
    given = torch.tensor([[1, 4, 5, 7], [1, 1, 1, 9], [1, 4, 5, 1]])
    found = targets_at_the_front(t5, {"labels": labels, "decoder_input_ids": given})
    assert found["decoder_input_ids"].tolist() == [[1, 4, 5, 7], [1, 9, 1, 1], [1, 4, 5, 1]]
    marked = {"labels": labels, "decoder_attention_mask": torch.ones(3, 4)}
    assert targets_at_the_front(model, marked) is marked


def test_a_batch_that_is_one_example_may_be_padded_on_the_left() -> None:
    one = OneExample(
        input_ids=torch.tensor([[1, 5, 6]]),
        attention_mask=torch.tensor([[0, 1, 1]]),
        labels=torch.tensor([[-100, 1, 0]]),
    )
    assert summed(model_of("RobertaForTokenClassification"), one).norm() > 0


@pytest.mark.parametrize("given", ["shared", "each row's"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "RobertaForTokenClassification"])
def test_positions_that_count_padding_do_not(name: str, given: str) -> None:
    gpt2 = tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, pad_token_id=1)
    model = tf.GPT2LMHeadModel(gpt2).eval() if name.startswith("GPT2") else model_of(name)
    rows = [row_of("labels", length) for length in LENGTHS]
    sums = []
    for some in (rows, rows[1:]):
        batch = padded(some, 1, left=True, targets_left=True)
        positions = torch.arange(batch["labels"].shape[1])[None]
        if given != "shared":
            positions = positions.repeat(len(some), 1)
        sums.append(summed(model, {**batch, "position_ids": positions}))
    assert (sums[0] - sums[1]).norm() <= C * (1 + 1e-4)


def test_positions_begin_at_the_first_token_or_stay_as_they_are() -> None:
    batch = padded([row_of("labels", n) for n in (5, 3)], 1, left=True, targets_left=True)

    def found(positions: Tensor) -> list[list[int]]:
        return from_the_first_token({**batch, "position_ids": positions})["position_ids"].tolist()

    counted = [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    assert found(torch.arange(5)[None]) == counted
    assert found(torch.arange(5).repeat(2, 1)) == counted
    for own in ([1, 1, 0, 1, 2], [0, 0, 7, 8, 9], [5, 5, 0, 1, 2]):
        assert found(torch.tensor([[0, 1, 2, 3, 4], own]))[1] == own


@pytest.mark.parametrize("name", ["BertForQuestionAnswering", "ProphetNetForConditionalGeneration"])
def test_an_example_alone_loses_its_padding_too(name: str) -> None:
    """Padded to a fixed length: else a second example would take it away from the first."""
    kind, options = MODELS[name]
    rows = [row_of(kind, 5), row_of(kind, 6), row_of(kind, 16)]
    batch = padded(rows, options["pad_token_id"], left=True, targets_left=True)
    two, one = ({n: v[:count] for n, v in batch.items()} for count in (2, 1))
    model = model_of(name)
    assert (summed(model, two) - summed(model, one)).norm() <= C * (1 + 1e-4)
