"""Faults that were found in other libraries, each as a test of ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_zoo import (
    Batch,
    assert_same_sum,
    batch,
    build,
    difference,
    length,
    naive,
    own_losses,
)
from torch import Tensor, nn
from toy_nets import C, Net, book_kept, data, squares

from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine, SequentialEngine, engine_named, settle
from hf_dp.errors import ConfigurationError
from hf_dp.sums import ClippedSum


def test_each_example_is_clipped_for_itself() -> None:
    """Not the batch's mean: example by example, and by the norm that was asked for."""
    model, inputs = build("bert-cls"), batch("bert-cls")
    for clipping_norm in (0.01, 0.1, 1.0):
        for i in (0, 1, 2, 4):
            one = {key: value[i : i + 1] for key, value in inputs.items()}
            found = BookKeepingEngine().clipped_sum(
                model, one, example_loss=own_losses, clipping=FlatClipping(clipping_norm)
            )
            assert length(found.grads) == pytest.approx(clipping_norm, rel=1e-5)


def long_and_short() -> tuple[nn.Module, Batch]:
    """31 sequences of 3 tokens and one of 30."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (32, 30), generator=generator)
    mask = torch.ones(32, 30, dtype=torch.long)
    mask[:31, 3:] = 0
    labels = ids.where(mask == 1, torch.tensor(-100))
    return build("gpt2-lm"), {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("engine", ["book_keeping", "two_pass", "sequential"])
def test_a_long_example_does_not_rescale_the_short_ones(engine: str) -> None:
    model, inputs = long_and_short()
    bound = 1.01 * float(naive(model, inputs, 1.0).norms.max())  # nobody is clipped
    rest = {key: value[:31] for key, value in inputs.items()}

    def moved(sums: Any) -> float:
        return length(difference(sums(inputs).grads, sums(rest).grads))

    def by_engine(inputs: Batch) -> ClippedSum:
        return engine_named(engine).clipped_sum(
            model, inputs, example_loss=own_losses, clipping=FlatClipping(bound)
        )

    change = moved(by_engine)
    assert change <= bound * (1 + 1e-6)
    assert change == pytest.approx(moved(lambda i: naive(model, i, bound)), rel=1e-4)


def test_a_loss_over_the_batchs_tokens_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault of the test above, planted: then the long example moves all the others."""
    model, inputs = long_and_short()

    def over_all_tokens(model: nn.Module, inputs: Any) -> Tensor:
        tokens = (inputs["labels"][:, 1:] != -100).sum(1)
        return own_losses(model, inputs) * tokens * len(tokens) / tokens.sum()

    with pytest.raises(ConfigurationError, match="batch mates"):
        book_kept(model, inputs, over_all_tokens)
    monkeypatch.setattr(settle, "check_mates", lambda *_: None)
    bound = 1.01 * float(naive(model, inputs, 1.0).norms.max())
    rest = {key: value[:31] for key, value in inputs.items()}
    whole, others = (
        SequentialEngine().clipped_sum(
            model, i, example_loss=own_losses, clipping=FlatClipping(bound)
        )
        for i in (inputs, rest)
    )
    wrong, wrong_others = (book_kept(model, i, over_all_tokens) for i in (inputs, rest))
    assert length(difference(whole.grads, others.grads)) <= bound * (1 + 1e-6)
    assert (wrong.norms[:31] / wrong_others.norms).max() < 0.9


def test_tied_weights_have_one_norm() -> None:
    """One clipped example has exactly the clipping norm, whatever is tied to what."""
    for name in ("gpt2-lm", "llama-lm-tied", "t5-seq2seq", "bert-mlm"):
        one = {key: value[:1] for key, value in batch(name).items()}
        found = BookKeepingEngine().clipped_sum(
            build(name), one, example_loss=own_losses, clipping=FlatClipping(1e-2)
        )
        assert length(found.grads) == pytest.approx(1e-2, rel=1e-5), name


def test_every_trained_parameter_gets_a_gradient() -> None:
    for name in ("bert-cls", "llama-lm", "qwen3-lm", "t5-seq2seq", "gpt2-lm"):
        model = build(name)
        found = book_kept(model, batch(name), own_losses)
        assert found.grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
        untouched = [n for n, grad in found.grads.items() if not bool(grad.any())]
        assert untouched == [], name


@pytest.mark.parametrize("engine", ["book_keeping", "two_pass", "sequential", "auto"])
def test_nothing_is_left_over_from_the_call_before(engine: str) -> None:
    chosen, model = engine_named(engine), build("gpt2-lm")

    def call(seed: int) -> ClippedSum:
        return chosen.clipped_sum(
            model,
            batch("gpt2-lm", seed=seed),
            example_loss=own_losses,
            clipping=FlatClipping(C),
        )

    first = call(1)
    copy = {name: grad.clone() for name, grad in first.grads.items()}
    call(2)
    again = call(1)
    assert all(torch.equal(again.grads[name], copy[name]) for name in copy)
    assert all(torch.equal(first.grads[name], copy[name]) for name in copy)


def test_a_wild_batch_of_another_shape_is_bounded_too() -> None:
    """Three axes, then four and a hundred times larger: nothing is remembered of the first."""
    engine, model = BookKeepingEngine(), Net()
    small, large = data(), {"x": 100 * data(rows=8)["x"].reshape(4, 2, 3, 6)}
    for inputs in (small, large, small):
        found = book_kept(model, inputs, engine=engine)
        assert_same_sum(found, naive(model, inputs, C, squares), 1e-12)
        rest = {"x": inputs["x"][:-1]}
        change = difference(found.grads, book_kept(model, rest, engine=engine).grads)
        assert length(change) <= C * (1 + 1e-6)
