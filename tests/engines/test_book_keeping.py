"""The one-backward engine: what it covers, what it refuses, and what it leaves as it found it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_zoo import (
    Batch,
    assert_same_sum,
    batch,
    build,
    build_lora,
    difference,
    length,
    naive,
    own_losses,
)
from torch import Tensor, nn
from torch.nn import functional as F

from hf_dp.clipping import FlatClipping, LossRelease
from hf_dp.engines import BookKeepingEngine, SequentialEngine, engine_named
from hf_dp.engines.base import ExampleLoss
from hf_dp.errors import ConfigurationError, UncoveredParameterError
from hf_dp.layers import DEFAULT_LAYER_RULES
from hf_dp.layers.factors import Factor, Mat, Vec
from hf_dp.layers.linear import linear
from hf_dp.sums import ClippedSum

C = 0.5


class Net(nn.Module):
    """Two layers; `forward` of subclasses says what is unusual about it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def squares(model: nn.Module, inputs: Batch) -> Tensor:
    out: Tensor = model(**inputs)
    return out.square().flatten(1).sum(1)


def data(rows: int = 5, positions: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, positions, 6, generator=generator, dtype=torch.float64)
    return {"x": x * torch.logspace(-1, 1, rows, dtype=torch.float64)[:, None, None]}


def book_kept(
    model: nn.Module,
    inputs: Batch,
    loss: ExampleLoss = squares,
    engine: BookKeepingEngine | None = None,
    **options: Any,
) -> ClippedSum:
    return (engine or BookKeepingEngine()).clipped_sum(
        model, inputs, example_loss=loss, clipping=FlatClipping(C), **options
    )


def check(model: nn.Module, inputs: Batch, loss: ExampleLoss = squares) -> None:
    assert_same_sum(book_kept(model, inputs, loss), naive(model, inputs, C, loss), 1e-12)


# ---- unusual but covered -------------------------------------------------------------------------


class CalledOften(Net):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.first(x))
        return self.second(x) + self.first(x[:, :1])  # once more, with fewer positions


class TiedLayers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.second.weight = self.first.weight


class InPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden += x
        hidden = self.second(hidden.relu_())
        hidden.mul_(2.0)
        return hidden


class PartlyWithoutGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = self.first(x)
        return self.second(torch.tanh(self.first(x))) - teacher


class OneTableForAll(Net):
    """Positions, looked up once and broadcast over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(8, 6).double()
        self.norm = nn.LayerNorm(6).double()

    def where(self, x: Tensor) -> Tensor:
        where: Tensor = self.positions(torch.arange(x.shape[1])[None])
        return where

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x)) + self.where(x)))


class OneLinearForAll(OneTableForAll):
    def __init__(self) -> None:
        super().__init__()
        self.positions.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(x + self.first(self.where(x))))


class OneNormForAll(OneLinearForAll):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x) + self.norm(self.where(x))))


class ResidualsShareGradients(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return hidden + self.second(hidden) + hidden.tanh()


class KeywordInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=torch.tanh(self.first(input=x)))


class MeanOverPositions(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).mean(1))  # two axes only


class NotAllUsed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


COVERED = [
    Net,
    CalledOften,
    TiedLayers,
    InPlace,
    PartlyWithoutGradient,
    ResidualsShareGradients,
    KeywordInput,
    MeanOverPositions,
    NotAllUsed,
    OneTableForAll,
    OneLinearForAll,
    OneNormForAll,
]


@pytest.mark.parametrize("kind", COVERED, ids=lambda kind: kind.__name__)
def test_unusual_use_of_covered_layers_equals_the_loop(kind: type[Net]) -> None:
    check(kind(), data())
    check(kind(), data(rows=1))
    check(kind(), data(positions=8))


class OneChainForAll(OneTableForAll):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x) + self.norm(self.where(x))))


class NowForOneNowForAll(OneTableForAll):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x) + self.first(self.where(x))))


@pytest.mark.parametrize(
    ("kind", "named"), [(OneChainForAll, "'norm'"), (NowForOneNowForAll, "'first'")]
)
def test_a_layer_that_serves_all_examples_after_another_such_is_refused(
    kind: type[Net], named: str
) -> None:
    with pytest.raises(UncoveredParameterError, match=named):
        book_kept(kind(), data())


def test_foreign_hooks_stay_outside_the_tapped_module() -> None:
    model = Net()
    model.first.register_forward_hook(lambda module, args, output: 3 * output)
    model.first.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    check(model, data())


def test_a_hook_that_uses_the_weight_is_an_uncovered_use() -> None:
    model = Net()
    model.first.register_forward_hook(lambda module, args, output: output * module.weight.sum())
    with pytest.raises(UncoveredParameterError, match=r"first\.weight"):
        book_kept(model, data())


def checkpointed(model: nn.Module, *, use_reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})
    model.train()  # checkpoints are made in training only


@pytest.mark.parametrize("make", [build, build_lora])
@pytest.mark.parametrize("name", ["bert-cls", "llama-lm", "t5-seq2seq"])
def test_gradient_checkpointing_changes_nothing(name: str, make: Any) -> None:
    inputs = batch(name)
    expected = naive(make(name, torch.float64), inputs, C)
    model = make(name, torch.float64)
    checkpointed(model, use_reentrant=False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    assert_same_sum(book_kept(model, inputs, own_losses), expected, 1e-12)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_not_silently_wrong() -> None:
    model, inputs = build("bert-cls"), batch("bert-cls")
    checkpointed(model, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        book_kept(model, inputs, own_losses)


def test_a_loss_that_ignores_the_model_sums_to_zero() -> None:
    found = book_kept(Net(), data(), lambda model, inputs: inputs["x"].sum((1, 2)))
    assert length(found.grads) == 0
    assert found.norms.tolist() == [0] * 5
    unfinished = book_kept(Net(), data(), lambda model, inputs: inputs["x"].sum((1, 2)) * torch.nan)
    assert not torch.isfinite(unfinished.norms).any()


def test_a_parameter_that_takes_no_part_has_a_sum_of_zero() -> None:
    found = book_kept(NotAllUsed(), data())
    assert float(found.grads["second.weight"].norm()) == 0
    assert float(found.grads["first.weight"].norm()) > 0


def test_what_is_frozen_or_thawed_later_is_noticed() -> None:
    engine, model = BookKeepingEngine(), Net()
    assert len(book_kept(model, data(), engine=engine).grads) == 4
    model.first.requires_grad_(False)
    found = book_kept(model, data(), engine=engine)
    assert_same_sum(found, naive(model, data(), C, squares), 1e-12)
    model.first.requires_grad_(True)
    model.second = nn.Linear(6, 6).double()
    assert_same_sum(
        book_kept(model, data(), engine=engine), naive(model, data(), C, squares), 1e-12
    )


def test_bfloat16_autocast_agrees_with_the_sequential_engine() -> None:
    model, inputs = build("bert-cls"), batch("bert-cls")

    def loss(model: nn.Module, inputs: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return own_losses(model, inputs)

    found = book_kept(model, inputs, loss)
    expected = SequentialEngine().clipped_sum(
        model, inputs, example_loss=loss, clipping=FlatClipping(C)
    )
    torch.testing.assert_close(found.norms, expected.norms, rtol=2e-2, atol=0)
    gap = length(difference(found.grads, expected.grads))
    assert gap <= 5e-2 * length(expected.grads)
    assert all(grad.dtype == torch.float32 for grad in found.grads.values())


def test_a_bfloat16_model_is_summed_in_float32() -> None:
    found = book_kept(build("gpt2-lm", torch.bfloat16), batch("gpt2-lm"), own_losses)
    assert all(grad.dtype == torch.float32 for grad in found.grads.values())
    assert length(found.grads) <= 4 * C


# ---- refused ------------------------------------------------------------------------------------


class Functional(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(x) + F.linear(x, self.first.weight)


class FunctionalToo(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + 1e-3 * self.first.weight.sum()


class OwnParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Attention(Net):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.attention(x, x, x, need_weights=False)[0])
        return out


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(self.first)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (Functional, r"first\.weight"),
        (FunctionalToo, r"first\.weight.*every use to be inside a module with a layer rule"),
        (OwnParameter, r"'gain'.*the model .*OwnParameter.*expected a layer rule"),
        (Attention, r"attention\.in_proj_weight"),
        (Normed, r"first\.parametrizations\.weight\.original0"),
    ],
)
def test_an_uncovered_use_is_refused_by_name(kind: type[Net], named: str) -> None:
    with pytest.raises(UncoveredParameterError, match=named):
        book_kept(kind(), data())


def test_the_weight_that_attention_reads_from_its_child_is_refused_by_name() -> None:
    model = Attention()
    model.attention.in_proj_weight.requires_grad_(False)
    model.attention.in_proj_bias.requires_grad_(False)
    with pytest.raises(UncoveredParameterError, match=r"attention\.out_proj\.weight"):
        book_kept(model, data())
    model.attention.requires_grad_(False)
    check(model, data())


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, inputs: squares(model, inputs).mean(),
        lambda model, inputs: squares(model, inputs).sum(0, keepdim=True),
        lambda model, inputs: squares(model, inputs)[:, None],
        lambda model, inputs: model(**inputs).square().sum(-1),
    ],
    ids=["mean", "sum", "column", "per position"],
)
@pytest.mark.parametrize("engine", ["book_keeping", "auto"])
def test_a_loss_over_several_examples_is_refused(loss: ExampleLoss, engine: str) -> None:
    with pytest.raises(ConfigurationError, match=r"example_loss=.*one loss per example.*\(5,\)"):
        engine_named(engine).clipped_sum(Net(), data(), example_loss=loss, clipping=FlatClipping(C))


def test_a_loss_that_calls_the_model_once_per_example_is_refused() -> None:
    def loop(model: nn.Module, inputs: Batch) -> Tensor:
        rows = range(len(inputs["x"]))
        return torch.cat([squares(model, {"x": inputs["x"][i : i + 1]}) for i in rows])

    class OnlyNorm(nn.Module):  # its rule would take any number of rows
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    for model in (Net(), OnlyNorm()):
        with pytest.raises(UncoveredParameterError, match="in one call for all of them"):
            book_kept(model, data(), loop)
        assert_same_sum(
            book_kept(model, data(rows=1), loop), naive(model, data(rows=1), C, loop), 1e-12
        )


class Gated(nn.Module):
    """Looks like an RMSNorm as long as it gets one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, dtype=torch.float64))
        self.eps = 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = x if gate is None else x * gate
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class UsesGate(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Gated()
        self.gate: tuple[object, ...] = (torch.ones(6, dtype=torch.float64) * 2,)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(x, *self.gate))


def test_further_arguments_to_a_tapped_module_are_refused() -> None:
    model = UsesGate()
    with pytest.raises(
        UncoveredParameterError, match=r"'norm' \(Gated\) was called with 2 arguments"
    ):
        book_kept(model, data())
    with pytest.raises(UncoveredParameterError, match="expected one tensor"):
        book_kept(model, data(rows=1))
    model.gate = (None,)
    check(model, data())


def half(module: nn.Module, x: Tensor, g: Tensor, n: int) -> Iterator[tuple[Any, Factor]]:
    yield next(iter(linear(module, x, g, n)))


def nothing(module: nn.Module, x: Tensor, g: Tensor, n: int) -> Iterator[tuple[Any, Factor]]:
    yield from ()


def narrow(module: nn.Module, x: Tensor, g: Tensor, n: int) -> Iterator[tuple[Any, Factor]]:
    yield module.weight, Mat(g, x)
    yield module.bias, Vec(g.sum((1, 2))[:, None])  # would be copied to every coordinate


def twice(module: nn.Module, x: Tensor, g: Tensor, n: int) -> Iterator[tuple[Any, Factor]]:
    yield module.weight, Mat(g[:, :1], x[:, :1])
    yield module.weight, Mat(g[:, 1:], x[:, 1:])
    yield module.bias, Vec(g.sum(1))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (half, r"Linear \('second'\) answered for 1 of 2 trainable parameters"),
        (nothing, "answered for 0 of 2"),
        (narrow, r"parameter 'first\.bias' gave gradients of shape \(1,\): expected \(6,\)"),
    ],
)
def test_a_rule_that_does_not_answer_in_full_is_refused(rule: Any, message: str) -> None:
    engine = BookKeepingEngine({**DEFAULT_LAYER_RULES, nn.Linear: rule})
    with pytest.raises(UncoveredParameterError, match=message):
        book_kept(Net(), data(), engine=engine)


def test_a_rule_may_answer_in_parts() -> None:
    engine = BookKeepingEngine({**DEFAULT_LAYER_RULES, nn.Linear: twice})
    found = book_kept(Net(), data(), engine=engine)
    assert_same_sum(found, naive(Net(), data(), C, squares), 1e-12)


def test_a_model_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least one parameter with requires_grad=True"):
        book_kept(Net().requires_grad_(False), data())


# ---- left as it was found ---------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> list[int]:
    return [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]


class FailsInTheMiddle(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if torch.is_grad_enabled():
            raise KeyError("in the middle")
        return self.second(hidden)


class FailsInALayer(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[..., :3] if torch.is_grad_enabled() else x)


@pytest.mark.parametrize(
    ("kind", "error"), [(Net, None), (FailsInTheMiddle, KeyError), (FailsInALayer, RuntimeError)]
)
def test_hooks_and_flags_are_put_back(kind: type[Net], error: type[Exception] | None) -> None:
    model = kind()
    model.first.bias.requires_grad_(False)
    model.first.register_forward_hook(lambda *_: None)
    flags, hooks = [p.requires_grad for p in model.parameters()], hooks_of(model)
    if error is None:
        book_kept(model, data())
    else:
        with pytest.raises(error):
            book_kept(model, data())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert hooks_of(model) == hooks


def test_the_method_of_a_relative_bias_is_put_back() -> None:
    model = build("t5-seq2seq")
    book_kept(model, batch("t5-seq2seq"), own_losses)
    assert all("compute_bias" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("engine", ["book_keeping", "sequential"])
def test_no_engine_writes_to_grad(engine: str) -> None:
    model = Net()
    sentinel = torch.full_like(model.first.weight, 7.0)
    model.first.weight.grad = sentinel.clone()
    model.second.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine_named(engine).clipped_sum(model, data(), example_loss=squares, clipping=FlatClipping(C))
    assert torch.equal(model.first.weight.grad, sentinel)
    assert model.first.bias.grad is None
    assert model.second.weight.grad is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_no_ordinary_weight_gradient_is_computed() -> None:
    model, seen = Net(), []
    for parameter in model.parameters():
        parameter.register_hook(seen.append)
    book_kept(model, data())
    assert seen == []


def test_an_empty_batch_is_a_sum_of_zeros() -> None:
    nobody = {"x": torch.zeros(0, 3, 6, dtype=torch.float64)}
    found = book_kept(Net(), nobody, loss_release=LossRelease())
    assert {name: grad.shape for name, grad in found.grads.items()} == {
        name: p.shape for name, p in Net().named_parameters()
    }
    assert length(found.grads) == 0
    assert found.norms.shape == found.losses.shape == (0,)
    assert float(found.loss_sum) == 0  # type: ignore[arg-type]


# ---- faults that other libraries have -----------------------------------------------------------------


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


@pytest.mark.parametrize("engine", ["book_keeping", "sequential"])
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


def test_a_loss_over_the_batchs_tokens_would_be_seen() -> None:
    """The fault of the test above, planted: then the long example moves all the others."""
    model, inputs = long_and_short()

    def over_all_tokens(model: nn.Module, inputs: Any) -> Tensor:
        tokens = (inputs["labels"][:, 1:] != -100).sum(1)
        return own_losses(model, inputs) * tokens * len(tokens) / tokens.sum()

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


@pytest.mark.parametrize("engine", ["book_keeping", "sequential", "auto"])
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
