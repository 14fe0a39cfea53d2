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


class Nested(Net):
    """The use that no module below can answer for is in a child."""

    def __init__(self, child: type[Net]) -> None:
        super().__init__()
        self.child = child()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(self.child(x)))


class InContainers(Net):
    """Parameters in a list and a dict, which are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.some = nn.ParameterList([torch.ones(6).double()])
        self.more = nn.ParameterDict({"a": nn.ParameterDict({"b": torch.ones(6).double()})})

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.some[0]) * self.more["a"]["b"]


class TiedToOutside(Net):
    """Tied weights, of which one use is in a module and one is not."""

    def __init__(self) -> None:
        super().__init__()
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(x, self.first.weight)


class Depthwise(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 3, groups=6, padding=1).double()
        self.stem = nn.Conv1d(6, 6, 2, stride=2, padding=1).double()
        self.norm = nn.GroupNorm(3, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.conv(self.stem(x.mT)))
        return super().forward(hidden.mT)


class Frames(Net):
    """A convolution over frames that are folded into the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1).double()

    def forward(self, x: Tensor) -> Tensor:
        rows, frames, width = x.shape
        out = self.conv(x.reshape(rows * frames, 2, width // 2))
        return super().forward(torch.tanh(out).reshape(rows, frames, width))


class DataDependent(Net):
    """Branches on what it holds, as routers of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 6, 6).double())

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in (x[..., 0] > 0).long().unique().tolist():
            here = (x[..., 0] > 0) == bool(expert)
            out[here] = x[here] @ self.experts[expert]
        return super().forward(out)


GENERIC = [
    Functional,
    FunctionalToo,
    OwnParameter,
    Attention,
    Normed,
    InContainers,
    TiedToOutside,
    Depthwise,
    Frames,
    DataDependent,
]


@pytest.mark.parametrize("kind", GENERIC, ids=lambda kind: kind.__name__)
def test_what_no_formula_covers_is_exact_by_the_generic_rule(kind: type[Net]) -> None:
    for model in (kind(), Nested(kind)):
        for rows in (1, 3, 5):
            check(model, data(rows=rows))


def test_a_parameter_climbs_no_further_than_it_must() -> None:
    engine, model = BookKeepingEngine(), Nested(Attention)
    book_kept(model, data(), engine=engine)
    generic = [p for p in engine.recorder.coverage(model).points if p.rule is None]
    assert [(p.name, len(p.parameters)) for p in generic] == [("child.attention", 4)]


def test_a_table_with_a_changed_forward_is_looked_up() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 3 * super().forward(input + 1)

    class Words(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = Scaled(9, 6, padding_idx=2).double()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.table(x[..., 0].abs().round().long() % 7))

    engine, model = BookKeepingEngine(), Words()
    assert_same_sum(
        book_kept(model, data(), engine=engine), naive(model, data(), C, squares), 1e-12
    )
    [point] = [p for p in engine.recorder.coverage(model).points if p.rule is None]
    assert point.generic is not None
    assert point.generic.forms == {"lookup"}


def outside(model: nn.Module, inputs: Batch) -> Tensor:
    losses: Tensor = squares(model, inputs) + model.get_parameter("first.weight").sum()
    return losses


def test_a_use_outside_the_model_is_refused_by_name() -> None:
    for _ in range(2):  # also when it was refused before
        engine = BookKeepingEngine()
        with pytest.raises(UncoveredParameterError, match=r"first\.weight.*engine='sequential'"):
            book_kept(Net(), data(), outside, engine)


def test_a_use_that_turns_up_later_is_refused_and_then_covered() -> None:
    class Later(Net):
        also = False

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out + F.linear(x, self.first.weight) if self.also else out

    engine, model = BookKeepingEngine(), Later()
    book_kept(model, data(), engine=engine)
    model.also = True
    with pytest.raises(UncoveredParameterError, match=r"first\.weight"):
        book_kept(model, data(), engine=engine)
    found = book_kept(model, data(), engine=engine)
    assert_same_sum(found, naive(model, data(), C, squares), 1e-12)


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
    with pytest.raises(ConfigurationError, match=r"example_loss=.*one loss per example.*\(\d,\)"):
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


def test_further_arguments_are_taken_into_account() -> None:
    model = UsesGate()
    check(model, data())
    check(model, data(rows=1))
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
