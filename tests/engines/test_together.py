"""Small layers that are alike are answered for together: the same numbers, and nothing mixed up."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine, SequentialEngine, engine_named
from hf_dp.engines import together as module_under_test
from hf_dp.engines.tap import Recording
from hf_dp.engines.together import Waiting
from hf_dp.layers.factors import OneHot
from hf_dp.sums import ClippedSum

BATCH = 4


class Stack(nn.Module):
    """Linear layers and norms, some alike, one used twice, one without a bias, one with another eps."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.bare = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=eps) for eps in (0.1, 0.1, 1.0))
        self.half_frozen = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.half_frozen[1].bias.requires_grad_(False)
        self.twice = nn.Linear(width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        h: Tensor = self.table(ids)
        for layer in (*self.first, self.twice, *self.norms, *self.bare, *self.half_frozen):
            h = h + torch.tanh(layer(h))
        out: Tensor = self.head(self.twice(h).mean(1))
        return out


def batch(positions: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 11, (BATCH, positions), generator=generator)
    return {"ids": ids, "labels": ids[:, 0] % 2}


def loss(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    each = nn.functional.cross_entropy(model(inputs["ids"]), inputs["labels"], reduction="none")
    return each


def summed(engine: Any, model: nn.Module, inputs: Mapping[str, Any], norm: float) -> ClippedSum:
    found: ClippedSum = engine.clipped_sum(
        model, inputs, example_loss=loss, clipping=FlatClipping(norm)
    )
    return found


def check_same(one: ClippedSum, other: ClippedSum, within: float) -> None:
    torch.testing.assert_close(one.norms, other.norms, rtol=within, atol=within)
    assert list(one.grads) == list(other.grads)
    for name, grad in other.grads.items():
        torch.testing.assert_close(one.grads[name], grad, rtol=within, atol=within, msg=name)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("positions", [1, 2, 5, 40])
@pytest.mark.parametrize("at_once", [1, 3 * BATCH * 5 * 6, 2**18])
def test_sum_and_norms_are_those_of_one_example_at_a_time(
    positions: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "AT_ONCE", at_once)
    model, inputs = Stack().double(), batch(positions)
    expected = summed(SequentialEngine(), model, inputs, norm=0.7)
    assert bool((expected.norms > 0.7).any())
    check_same(summed(BookKeepingEngine(), model, inputs, 0.7), expected, 1e-12)


def test_layers_are_put_together_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    put_together = module_under_test._put_together

    def noted(calls: Any) -> Any:
        groups.append(len(calls))
        return put_together(calls)

    monkeypatch.setattr(module_under_test, "_put_together", noted)
    summed(BookKeepingEngine(), Stack(), batch(), 1.0)
    # three and one that has a bias; the bare ones and one without a trained bias; norms of one eps
    assert sorted(groups) == [2, 3, 4]


def test_norms_with_another_epsilon_put_together_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = dict.fromkeys(module_under_test._SETTINGS, module_under_test._nothing)
    monkeypatch.setattr(module_under_test, "_SETTINGS", settings)
    model, inputs = Stack().double(), batch()
    expected = summed(SequentialEngine(), model, inputs, 0.7)
    with pytest.raises(AssertionError):
        check_same(summed(BookKeepingEngine(), model, inputs, 0.7), expected, 1e-12)


def test_a_parameter_used_twice_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack()
    taken: list[nn.Module] = []
    takes = Waiting.takes

    def noted(self: Waiting, call: Any) -> bool:
        if takes(self, call):
            taken.append(call.point.module)
            return True
        return False

    monkeypatch.setattr(Waiting, "takes", noted)
    summed(BookKeepingEngine(), model, batch(), 1.0)
    assert not any(module is model.twice for module in taken)
    assert any(module is model.first[0] for module in taken)


def test_a_twice_used_parameter_that_waits_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = Stack().double(), batch()
    expected = summed(SequentialEngine(), model, inputs, 0.7)

    def blind(self: Waiting, uses: Any) -> None:
        made(self, dict.fromkeys(uses, 1))

    made = Waiting.__init__
    monkeypatch.setattr(Waiting, "__init__", blind)
    with pytest.raises(AssertionError):
        check_same(summed(BookKeepingEngine(), model, inputs, 0.7), expected, 1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_not_finite_example_adds_nothing_and_the_others_are_as_alone(bad: float) -> None:
    model, inputs = Stack().double(), batch()

    def spoilt(model: nn.Module, given: Mapping[str, Any]) -> Tensor:
        scale = torch.ones(len(given["ids"]), dtype=torch.float64)
        first = (given["ids"] == inputs["ids"][0]).all(1)
        return loss(model, given) * torch.where(first, bad, scale)

    clipping = FlatClipping(0.7)
    one, other = (
        engine.clipped_sum(model, inputs, example_loss=spoilt, clipping=clipping)
        for engine in (BookKeepingEngine(), SequentialEngine())
    )
    assert all(bool(torch.isfinite(grad).all()) for grad in one.grads.values())
    for name, grad in other.grads.items():
        torch.testing.assert_close(one.grads[name], grad, rtol=1e-12, atol=1e-12, msg=name)


def test_positions_that_cancel_are_taken_apart_in_every_layer_of_a_group() -> None:
    torch.manual_seed(1)

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(40, 40, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            signs = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
            return torch.stack([(layer(x) * signs).sum((1, 2)) for layer in self.layers]).sum(0)

    model = Cancelling()
    rows = torch.randn(BATCH, 1, 40)
    inputs = {"x": rows.expand(-1, 4, -1) + 1e-3 * torch.randn(BATCH, 4, 40)}

    def value(model: nn.Module, given: Mapping[str, Any]) -> Tensor:
        out: Tensor = model(given["x"])
        return out

    one, other = (
        engine.clipped_sum(model, inputs, example_loss=value, clipping=FlatClipping(1e-3))
        for engine in (BookKeepingEngine(), SequentialEngine())
    )
    torch.testing.assert_close(one.norms, other.norms, rtol=1e-4, atol=0)
    for name, grad in other.grads.items():
        torch.testing.assert_close(one.grads[name], grad, rtol=1e-3, atol=1e-7, msg=name)


@pytest.mark.parametrize("engine", ["book_keeping", "two_pass"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_pass_is_left_when_it_is_over(
    engine: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the graph is not Python's, so what it is in a cycle with would never be collected
    runner, model, made = engine_named(engine), Stack(), []
    summed(runner, model, batch(), 1.0)
    init = Recording.__init__

    def noted(self: Recording, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Recording, "__init__", noted)
    if fails:
        monkeypatch.setattr(OneHot, "squared_norm", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        summed(runner, model, batch(), 1.0)
    gc.collect()
    assert made
    assert not any(recording() is not None for recording in made)
