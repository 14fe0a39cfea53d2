"""What the book-keeping engine does not cover is refused, by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_zoo import (
    Batch,
    assert_same_sum,
    naive,
)
from torch import Tensor, nn
from torch.nn import functional as F
from toy_nets import C, Net, book_kept, check, data, squares

from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine, engine_named
from hf_dp.engines.base import ExampleLoss
from hf_dp.errors import ConfigurationError, UncoveredParameterError
from hf_dp.layers import DEFAULT_LAYER_RULES
from hf_dp.layers.factors import Factor, Mat, Vec
from hf_dp.layers.linear import linear


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
        (narrow, r"parameter 'second\.bias' gave gradients of shape \(1,\): expected \(6,\)"),
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
