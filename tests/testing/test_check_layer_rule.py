"""The check of layer rules passes what is right and names what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_dp.errors import ConfigurationError
from hf_dp.layers import DEFAULT_LAYER_RULES
from hf_dp.layers.base import positions
from hf_dp.layers.factors import Factor, Mat, OneHot, Vec
from hf_dp.layers.linear import linear
from hf_dp.testing import DisagreementError, check_layer_rule

Answers = Iterator[tuple[nn.Parameter, Factor]]


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Gain(nn.Module):
    """A layer of one's own."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain.exp()


def gain(module: nn.Module, x: Tensor, g: Tensor, num_units: int) -> Answers:
    products = positions(x * g, num_units).sum(1)
    yield module.gain, Vec(products * module.gain.detach().exp())


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.Linear(6, 5), numbers(3, 4, 6)),
        (nn.Linear(6, 5), numbers(3, 6)),
        (Conv1D(6, 6), numbers(3, 4, 6)),
        (nn.LayerNorm(6), numbers(3, 4, 6)),
        (nn.Embedding(7, 4, padding_idx=1), torch.arange(12).view(3, 4) % 7),
        (nn.Conv2d(3, 4, 2, stride=2), numbers(3, 3, 6, 6)),
        (nn.GroupNorm(3, 6), numbers(3, 6, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_rules_that_are_right_pass(module: nn.Module, inputs: Tensor) -> None:
    check_layer_rule(module, inputs)


def test_a_rule_of_ones_own_passes() -> None:
    module, inputs = Gain(), numbers(3, 4, 6)
    before = inputs.clone()
    check_layer_rule(module, inputs, {**DEFAULT_LAYER_RULES, Gain: gain})
    assert torch.equal(inputs, before)
    assert module.gain.dtype == torch.float32
    assert module.gain.grad is None


def transposed(module: Any, x: Tensor, g: Tensor, n: int) -> Answers:
    yield module.weight, Mat(x, g)
    yield module.bias, Vec(g.sum(1))


def without_bias(module: Any, x: Tensor, g: Tensor, n: int) -> Answers:
    yield module.weight, Mat(g, x)


def last_position_dropped(module: Any, x: Tensor, g: Tensor, n: int) -> Answers:
    yield from linear(module, x[:, :-1], g[:, :-1], n)


def units_swapped(module: Any, x: Tensor, g: Tensor, n: int) -> Answers:
    yield from linear(module, x.roll(1, 0), g.roll(1, 0), n)


def summed_over_the_batch(module: Any, x: Tensor, g: Tensor, n: int) -> Answers:
    yield module.weight, Mat(g, x)
    yield module.bias, Vec(g.sum((0, 1)).expand(n, -1))


def in_place(module: Any, x: Tensor, g: Tensor, n: int) -> Answers:
    yield from linear(module, x, g.mul_(1.5), n)


class WithoutCross(Vec):
    """Adds norms instead of gradients when a module is called twice."""

    def merged(self, other: Factor) -> Factor | None:
        return None

    def cross(self, other: Factor) -> Tensor:
        return torch.zeros_like(self.squared_norm())


def missing_cross_term(module: Any, x: Tensor, g: Tensor, n: int) -> Answers:
    yield module.weight, WithoutCross(torch.bmm(g.mT, x))
    yield module.bias, Vec(g.sum(1))


class KeepsDropped(Vec):
    def without(self, dropped: Tensor) -> Vec:
        return self


def dropped_unit_kept(module: Any, x: Tensor, g: Tensor, n: int) -> Answers:
    yield module.weight, KeepsDropped(torch.bmm(g.mT, x))
    yield module.bias, Vec(g.sum(1))


def stale(module: Any, x: Tensor, g: Tensor, n: int) -> Answers:
    kept = vars(module).setdefault("_kept", (x, g))
    yield from linear(module, *kept, n)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (transposed, r"weight: the share of unit 0 has shape \(6, 5\): expected \(5, 6\)"),
        (without_bias, "bias: expected the rule to yield a factor"),
        (last_position_dropped, "Linear.weight: the norm is off"),
        (units_swapped, "Linear.weight: the norm is off"),
        (summed_over_the_batch, "Linear.bias: the norm is off"),
        (in_place, "the rule changes what it is given"),
        (missing_cross_term, "Linear.weight, called twice: the norm is off"),
        (dropped_unit_kept, "Linear.weight: the sum without unit 0 is off"),
        (stale, "Linear.weight, called twice: the norm is off"),
    ],
)
def test_a_planted_fault_is_named(rule: Callable[..., Answers], message: str) -> None:
    with pytest.raises(DisagreementError, match=message):
        check_layer_rule(nn.Linear(6, 5), numbers(3, 4, 6), {nn.Linear: rule})


def test_a_forgotten_padding_row_is_named() -> None:
    def careless(module: Any, ids: Tensor, g: Tensor, n: int) -> Answers:
        yield module.weight, OneHot(ids, g, 7)

    table = nn.Embedding(7, 4, padding_idx=1)
    with pytest.raises(DisagreementError, match=r"Embedding\.weight"):
        check_layer_rule(table, torch.arange(12).view(3, 4) % 7, {nn.Embedding: careless})


def test_what_cannot_be_checked_is_said() -> None:
    with pytest.raises(ConfigurationError, match="a rule for the module's type"):
        check_layer_rule(Gain(), numbers(3, 4, 6))
    with pytest.raises(ConfigurationError, match="two or more units"):
        check_layer_rule(nn.Linear(6, 5), numbers(1, 4, 6))
    with pytest.raises(ConfigurationError, match="trains something"):
        check_layer_rule(nn.Linear(6, 5).requires_grad_(False), numbers(3, 4, 6))
