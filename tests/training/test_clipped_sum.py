"""The public clipped sum equals a plain loop over the examples, for people with their own training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_runs import Sentences, collate, tiny_bert
from torch import Tensor, nn
from torch.nn import functional as F

import hf_dp
from hf_dp.engines import engine_named
from hf_dp.errors import ConfigurationError

ROWS = [Sentences()[index] for index in range(7)]


def loop(
    model: nn.Module, inputs: dict[str, Tensor], clipping_norm: float
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Sum, norms and losses, one example at a time, with the model's own loss."""
    model = copy.deepcopy(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    norms, losses = [], []
    for index, used in enumerate(inputs["attention_mask"].sum(1).tolist()):
        row = {
            name: value[index : index + 1, :used] if value.dim() > 1 else value[index : index + 1]
            for name, value in inputs.items()
        }
        loss = model(**row).loss
        grads = torch.autograd.grad(loss, list(trained.values()))
        norm = torch.sqrt(sum(grad.double().square().sum() for grad in grads))
        for name, grad in zip(trained, grads, strict=True):
            total[name] += grad * min(1.0, clipping_norm / float(norm))
        norms.append(norm)
        losses.append(loss.detach())
    return total, torch.stack(norms), torch.stack(losses)


def distance(found: Any, expected: dict[str, Tensor]) -> float:
    assert set(found) == set(expected)
    gap = torch.cat([(found[n] - g).flatten() for n, g in expected.items()]).norm()
    return float(gap / torch.cat([g.flatten() for g in expected.values()]).norm())


@pytest.mark.parametrize("engine", ["auto", "book_keeping", "two_pass", "sequential"])
@pytest.mark.parametrize("double", [False, True])
def test_it_equals_a_loop_over_the_examples(engine: str, double: bool) -> None:
    model, inputs = tiny_bert(), collate(ROWS)
    model = model.double() if double else model
    expected, norms, losses = loop(model, inputs, 0.81)
    assert 0 < int((norms > 0.81).sum()) < len(ROWS), "some are clipped and some are not"
    result = hf_dp.clipped_sum(model, inputs, clipping_norm=0.81, engine=engine)
    assert distance(result.grads, expected) < (1e-12 if double else 1e-5)
    torch.testing.assert_close(result.norms.double(), norms.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.losses.double(), losses.double(), rtol=1e-5, atol=1e-6)
    assert distance(result.grads, loop(model, inputs, 0.81 * 0.99)[0]) > 1e-4, "the loop sees 1%"


@pytest.mark.parametrize("engine", ["auto", "book_keeping", "two_pass", "sequential"])
def test_examples_are_clipped_in_the_l1_norm_if_asked(engine: str) -> None:
    model, inputs = tiny_bert().double(), collate(ROWS)
    found = [
        hf_dp.clipped_sum(
            model,
            {name: value[i : i + 1] for name, value in inputs.items()},
            clipping_norm=4.0,
            clipping_norm_type="l1",
            engine=engine,
        )
        for i in range(len(ROWS))
    ]
    for one in found:
        size = sum(float(grad.abs().sum()) for grad in one.grads.values())
        assert size == pytest.approx(min(4.0, float(one.norms)), rel=1e-12 if size < 4 else 1e-9)
    assert any(float(one.norms) > 4 for one in found)


@pytest.mark.parametrize("engine", ["auto", "sequential"])
def test_padding_on_the_left_changes_nothing(engine: str) -> None:
    """Where positions are absolute it moves an example's own; its neighbours decide how far."""
    inputs, kept = collate(ROWS), engine_named(engine)
    left = {name: value.clone() for name, value in inputs.items()}
    for row, used in enumerate(inputs["attention_mask"].sum(1).tolist()):
        for name, value in left.items():
            if value.dim() > 1:
                value[row] = inputs[name][row].roll(-used)
    assert int(left["attention_mask"][:, 0].sum()) < len(ROWS)
    model = tiny_bert().eval()
    found, expected = (
        hf_dp.clipped_sum(model, batch, clipping_norm=0.5, engine=kept) for batch in (left, inputs)
    )
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-5, atol=1e-6)
    assert distance(found.grads, dict(expected.grads)) < 1e-5


def test_there_is_no_third_norm_to_clip_in() -> None:
    with pytest.raises(ConfigurationError, match=r"clipped_sum\.clipping_norm_type='max'.*l1"):
        hf_dp.clipped_sum(
            tiny_bert(),
            collate(ROWS),
            clipping_norm=1.0,
            clipping_norm_type="max",  # type: ignore[arg-type]
        )


def test_an_engine_that_is_kept_looks_the_model_over_once() -> None:
    model, inputs, engine = tiny_bert(), collate(ROWS), engine_named("auto")
    passes: list[int] = []
    model.bert.register_forward_pre_hook(lambda *_: passes.append(1))
    expected = loop(tiny_bert(), inputs, 0.81)[0]
    counts = []
    for _ in range(3):
        passes.clear()
        result = hf_dp.clipped_sum(model, inputs, clipping_norm=0.81, engine=engine)
        assert distance(result.grads, expected) < 1e-5
        counts.append(len(passes))
    assert counts[0] > 1
    assert counts[1:] == [3, 3]  # the hook is foreign: two rows are run alone, too


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = tiny_bert().train(), collate(ROWS)
    given = {name: value.clone() for name, value in inputs.items()}
    model.bert.encoder.layer[0].eval()
    before = copy.deepcopy(model)
    model.bert.pooler.requires_grad_(False)
    hf_dp.clipped_sum(model, inputs, clipping_norm=1.0)
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.grad is None
        assert p.requires_grad == ("pooler" not in name)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert all(torch.equal(inputs[name], given[name]) for name in given)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_only_what_is_trainable_is_summed() -> None:
    model = tiny_bert()
    model.bert.requires_grad_(False)
    result = hf_dp.clipped_sum(model, collate(ROWS), clipping_norm=1.0)
    assert set(result.grads) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("engine", ["auto", "book_keeping", "two_pass", "sequential"])
def test_a_loss_of_ones_own(engine: str) -> None:
    def loss(model: nn.Module, inputs: Any) -> Tensor:
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits
        return 5 * F.cross_entropy(logits, inputs["labels"], reduction="none")

    model, inputs = tiny_bert(), collate(ROWS)
    plain, norms, _ = loop(model, inputs, 1e6)
    result = hf_dp.clipped_sum(model, inputs, clipping_norm=1e6, engine=engine, example_loss=loss)
    assert distance(result.grads, {name: 5 * grad for name, grad in plain.items()}) < 1e-5
    torch.testing.assert_close(result.norms.double(), 5 * norms, rtol=1e-5, atol=1e-6)


def test_an_empty_batch_sums_to_zero() -> None:
    inputs = {name: value[:0] for name, value in collate(ROWS).items()}
    result = hf_dp.clipped_sum(
        tiny_bert(), inputs, clipping_norm=1.0, example_loss=lambda *_: torch.zeros(0)
    )
    assert not any(grad.any() for grad in result.grads.values())
    assert result.norms.shape == result.losses.shape == (0,)


class Outlier(nn.Module):
    """A loss by itself, of no task, from a plain module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor]:
        return (F.huber_loss(self.layer(x)[:, 0], target),)


def test_a_loss_without_a_fast_form_is_taken_one_by_one_aloud(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model = Outlier()
    inputs = {"x": torch.randn(4, 3), "target": torch.randn(4) * 5}
    expected = torch.zeros(1, 3)
    for x, target in zip(inputs["x"], inputs["target"], strict=True):
        grads = torch.autograd.grad(model(x[None], target[None])[0], list(model.parameters()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        expected += grads[0] * min(1.0, 0.5 / float(norm))
    result = hf_dp.clipped_sum(model, inputs, clipping_norm=0.5)
    torch.testing.assert_close(result.grads["layer.weight"], expected)
    assert "one at a time" in caplog.text


def test_a_causal_model_counts_its_own_tokens_only() -> None:
    torch.manual_seed(0)
    config = tf.GPT2Config(
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        vocab_size=50,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = tf.GPT2LMHeadModel(config).eval()
    inputs = collate(ROWS)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected, norms, _ = loop(model, inputs, 2.0)
    result = hf_dp.clipped_sum(model, inputs, clipping_norm=2.0)
    assert distance(result.grads, expected) < 1e-5
    torch.testing.assert_close(result.norms.double(), norms.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf"), "1"])
def test_a_norm_out_of_range_is_refused(norm: Any) -> None:
    with pytest.raises(ConfigurationError, match="clipping_norm"):
        hf_dp.clipped_sum(tiny_bert(), collate(ROWS), clipping_norm=norm)


def test_an_unknown_engine_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'sequential'"):
        hf_dp.clipped_sum(tiny_bert(), collate(ROWS), clipping_norm=1.0, engine="sequentail")


def mean_of_all(model: nn.Module, inputs: Any) -> Tensor:
    return model(**inputs).loss


@pytest.mark.parametrize("engine", ["auto", "book_keeping"])
def test_a_loss_over_the_whole_batch_is_refused(engine: str) -> None:
    with pytest.raises(ConfigurationError, match="one loss per example"):
        hf_dp.clipped_sum(
            tiny_bert(), collate(ROWS), clipping_norm=1.0, engine=engine, example_loss=mean_of_all
        )


class Odd(nn.Module):
    """No formula fits it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.cos()


@pytest.mark.parametrize("engine", ["auto", "book_keeping", "two_pass"])
def test_a_layer_of_ones_own_needs_no_rule(engine: str) -> None:
    model, inputs = tiny_bert(), collate(ROWS)
    model.dropout = Odd()
    result = hf_dp.clipped_sum(model, inputs, clipping_norm=1.0, engine=engine)
    assert distance(result.grads, loop(model, inputs, 1.0)[0]) < 1e-5


class OddLoss(nn.Module):
    """Uses its parameter where no module is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * self.layer.weight.sum()).sum(1)


def test_what_only_the_whole_model_could_answer_for() -> None:
    torch.manual_seed(0)
    model, inputs = OddLoss(), {"x": torch.randn(4, 3)}

    def of_each(model: nn.Module, inputs: Any) -> Tensor:
        losses: Tensor = model(inputs["x"])
        return losses

    sums = [
        hf_dp.clipped_sum(model, inputs, clipping_norm=1.0, engine=engine, example_loss=of_each)
        for engine in ("auto", "sequential")
    ]
    assert distance(sums[0].grads, sums[1].grads) < 1e-5


@pytest.mark.parametrize("engine", ["auto", "book_keeping", "two_pass", "sequential"])
def test_a_model_that_trains_nothing_is_refused(engine: str) -> None:
    model = tiny_bert().requires_grad_(False)
    with pytest.raises(ConfigurationError, match="requires_grad"):
        hf_dp.clipped_sum(model, collate(ROWS), clipping_norm=1.0, engine=engine)
