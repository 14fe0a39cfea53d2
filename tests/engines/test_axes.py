"""Where the examples are is established by running some alone and doubled, never by a length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_zoo import Batch, assert_same_sum, batch, build, naive, own_losses
from torch import Tensor, nn
from toy_nets import C, Net, book_kept, data, squares

from hf_dp.engines import BookKeepingEngine
from hf_dp.engines.axes import establish_axes
from hf_dp.engines.coverage import Coverage, UnitAxis, coverage_of
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers import DEFAULT_LAYER_RULES


def established(model: nn.Module, inputs: Batch, loss: Any = squares) -> Coverage:
    coverage = coverage_of(model, DEFAULT_LAYER_RULES)
    establish_axes(model, inputs, coverage, loss)
    return coverage


class PositionsFirst(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.transpose(0, 1)).transpose(0, 1))


class Folded(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


class WithoutPadding(Net):
    """Hands on only the positions that hold something, folded: how many depends on the example."""

    def forward(self, x: Tensor) -> Tensor:
        real = x.abs().sum(-1) > 0
        out = torch.zeros_like(x)
        out[real] = self.first(x[real])
        return self.second(out)


class InChunks(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.cat([self.first(part) for part in x.split(1)]))


class OverTheBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(x) + self.first(x.mean(0, keepdim=True))


@pytest.mark.parametrize("kind", [PositionsFirst, Folded, InChunks])
def test_examples_that_are_not_on_the_first_axis_of_one_call_are_refused(kind: type[Net]) -> None:
    for rows in (2, 3, 5):  # also with as many positions as examples
        with pytest.raises(UncoveredParameterError, match=r"module 'first' \(Linear\).*one call"):
            book_kept(kind(), data(rows=rows))


def test_a_layout_that_depends_on_the_example_is_refused_although_the_first_looks_right() -> None:
    inputs = data(rows=4)
    inputs["x"][0, 1:] = 0  # alone, the first example is one row
    with pytest.raises(UncoveredParameterError, match="module 'first'"):
        book_kept(WithoutPadding(), inputs)


def test_a_layout_that_changes_later_is_refused() -> None:
    engine, model, inputs = BookKeepingEngine(), WithoutPadding(), data(rows=4)
    inputs["x"][:, 1:] = 0
    expected = naive(model, inputs, C, squares)
    assert_same_sum(book_kept(model, inputs, engine=engine), expected, 1e-12)
    with pytest.raises(UncoveredParameterError, match="got an input with 12 rows"):
        book_kept(model, data(rows=4), engine=engine)


@pytest.mark.parametrize("rows", [4, 6, 9])
def test_first_and_shared_are_told_apart(rows: int) -> None:
    model = build("gpt2-lm")
    axes = established(model, batch("gpt2-lm", rows=rows), own_losses).axes
    assert axes is not None
    assert axes["transformer.wpe"] is UnitAxis.SHARED
    assert {axis for name, axis in axes.items() if name != "transformer.wpe"} == {UnitAxis.FIRST}


def test_explicit_positions_per_example_are_first() -> None:
    inputs = batch("gpt2-lm", rows=4)
    inputs["position_ids"] = torch.arange(9).repeat(4, 1)
    axes = established(build("gpt2-lm"), inputs, own_losses).axes
    assert axes is not None
    assert axes["transformer.wpe"] is UnitAxis.FIRST


def test_explicit_positions_may_come_and_go() -> None:
    """They are per example or shared, also in a batch of one, where the two look alike."""
    model, engine = build("gpt2-lm", torch.float64), BookKeepingEngine()
    for rows in (1, 4, 1):
        inputs = batch("gpt2-lm", rows=4)
        inputs = {key: value[:rows] for key, value in inputs.items()}
        expected = naive(model, inputs, C)
        inputs["position_ids"] = torch.arange(9).repeat(rows, 1)
        assert_same_sum(book_kept(model, inputs, own_losses, engine), expected, 1e-12)
    inputs["position_ids"] = torch.arange(9)[None]
    inputs |= batch("gpt2-lm", rows=4)
    with pytest.raises(
        UncoveredParameterError, match=r"'transformer\.wpe' got an input with 1 row"
    ):
        book_kept(model, inputs, own_losses, engine)


def test_a_module_that_serves_all_must_keep_doing_so() -> None:
    model, engine = build("gpt2-lm"), BookKeepingEngine()
    inputs = batch("gpt2-lm", rows=4)
    book_kept(model, inputs, own_losses, engine)
    inputs["position_ids"] = torch.arange(9).repeat(4, 1)
    with pytest.raises(UncoveredParameterError, match="expected one row for all examples"):
        book_kept(model, inputs, own_losses, engine)


def test_a_module_that_only_later_examples_reach_is_refused() -> None:
    class ForLarge(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.second(hidden) if bool((x.abs() > 15).any()) else hidden

    inputs = data(rows=8)
    with pytest.raises(UncoveredParameterError, match="'second' took part for some examples only"):
        book_kept(ForLarge(), inputs)
    assert book_kept(ForLarge(), {"x": inputs["x"][:3]}).norms.shape == (3,)


def test_establishing_leaves_no_hooks_and_no_gradients() -> None:
    model = Net()
    established(model, data())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_axes_are_established_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(model: nn.Module, inputs: Any) -> Tensor:
        calls.append(len(inputs["x"]))
        return squares(model, inputs)

    engine, model = BookKeepingEngine(), Net()
    book_kept(model, data(rows=1), counted, engine)
    assert calls == [1]
    book_kept(model, data(), counted, engine)
    assert calls == [1, 1, 2, 1, 2, 1, 2, 5]
    book_kept(model, data(), counted, engine)
    assert calls[8:] == [5]


def test_the_check_by_doubling_is_what_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: every module is believed to have its examples first. Then the sum is wrong."""

    def believe(model: nn.Module, inputs: Any, coverage: Coverage, loss: Any) -> None:
        coverage.axes = {point.name: UnitAxis.FIRST for point in coverage.points}

    monkeypatch.setattr("hf_dp.engines.recorder.establish_axes", believe)
    inputs = data(rows=3)  # as many examples as positions
    found = book_kept(PositionsFirst(), inputs)
    with pytest.raises(AssertionError):
        assert_same_sum(found, naive(PositionsFirst(), inputs, C, squares), 1e-3)
