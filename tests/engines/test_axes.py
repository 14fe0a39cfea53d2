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
from hf_dp.engines.coverage import Coverage, Layout, coverage_of
from hf_dp.layers import DEFAULT_LAYER_RULES
from hf_dp.layers.base import FIRST, ROW, UnitAxis


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


class FoldedPositionsFirst(Net):
    """Rows folded position by position: interleaved, not one example after the other."""

    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(0, 1)
        out = self.first(turned.flatten(0, 1)).unflatten(0, turned.shape[:2])
        return self.second(out.transpose(0, 1))


class InWindows(Net):
    """Two windows of each example on the first axis, as in Swin."""

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        out = self.first(x.reshape(rows * 2, length // 2, width))
        return self.second(torch.tanh(out).reshape(rows, length, width))


class SortedByLength(Net):
    """Examples are sorted on the way, as for packed sequences: the axis is right, the order is not."""

    def forward(self, x: Tensor) -> Tensor:
        order = (x.abs().sum(-1) > 0).sum(1).argsort(descending=True, stable=True)
        return self.second(self.first(x[order])[order.argsort()])


def generic_points(engine: BookKeepingEngine, model: nn.Module) -> list[str]:
    return [point.name for point in engine.recorder.coverage(model).points if point.rule is None]


@pytest.mark.parametrize(
    ("kind", "climbed"),
    [
        (PositionsFirst, []),
        (Folded, []),
        (InWindows, []),
        (FoldedPositionsFirst, [""]),
        (WithoutPadding, [""]),
        (InChunks, ["second", ""]),
        (SortedByLength, [""]),
    ],
)
def test_wherever_the_examples_are_the_sum_is_exact(kind: type[Net], climbed: list[str]) -> None:
    for rows in (1, 2, 4, 5):  # also with as many positions as examples
        inputs = data(rows=rows, positions=4)
        for index in range(rows):  # as padding
            inputs["x"][index, 4 - index % 4 :] = 0
        engine, model = BookKeepingEngine(), kind()
        found = book_kept(model, inputs, engine=engine)
        assert_same_sum(found, naive(model, inputs, C, squares), 1e-12)
        if rows > 1:
            assert generic_points(engine, model) == climbed


def test_a_layout_that_depends_on_the_example_is_not_believed_from_the_first_ones() -> None:
    inputs = data(rows=4)
    inputs["x"][0, 1:] = 0  # alone, the first example is one row
    engine, model = BookKeepingEngine(), WithoutPadding()
    found = book_kept(model, inputs, engine=engine)
    assert_same_sum(found, naive(model, inputs, C, squares), 1e-12)
    assert generic_points(engine, model) == [""]


def test_unpadded_rows_that_could_be_shared_out_evenly_are_not() -> None:
    """Full rows first, then some of 2 and 4 positions: 12 rows for 4 examples, but not 3 each."""
    engine, model = BookKeepingEngine(), WithoutPadding()
    full = data(rows=4, positions=4)
    assert_same_sum(book_kept(model, full, engine=engine), naive(model, full, C, squares), 1e-12)
    uneven = data(rows=4, positions=4)
    uneven["x"][:2, 2:] = 0
    assert int((uneven["x"].abs().sum(-1) > 0).sum()) == 12
    found = book_kept(model, uneven, engine=engine)
    assert_same_sum(found, naive(model, uneven, C, squares), 1e-12)


def test_a_layout_that_changes_later_is_established_anew() -> None:
    engine, model, inputs = BookKeepingEngine(), WithoutPadding(), data(rows=4)
    inputs["x"][:, 1:] = 0
    for batch_of in (inputs, data(rows=4)):
        expected = naive(model, batch_of, C, squares)
        assert_same_sum(book_kept(model, batch_of, engine=engine), expected, 1e-12)


def kinds(coverage: Coverage, name: str) -> set[UnitAxis | None]:
    assert coverage.axes is not None
    return {axis for layout in coverage.axes[name].values() for axis in layout.inputs}


@pytest.mark.parametrize("rows", [4, 6, 9])
def test_first_and_shared_are_told_apart(rows: int) -> None:
    model = build("gpt2-lm")
    coverage = established(model, batch("gpt2-lm", rows=rows), own_losses)
    assert kinds(coverage, "transformer.wpe") == {ROW}
    others = {name for name in coverage.axes or {} if name != "transformer.wpe"}
    assert all(kinds(coverage, name) == {FIRST} for name in others)


def test_explicit_positions_per_example_are_first() -> None:
    inputs = batch("gpt2-lm", rows=4)
    inputs["position_ids"] = torch.arange(9).repeat(4, 1)
    coverage = established(build("gpt2-lm"), inputs, own_losses)
    assert kinds(coverage, "transformer.wpe") == {FIRST}


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
    expected = naive(model, {k: v for k, v in inputs.items() if k != "position_ids"}, C)
    assert_same_sum(book_kept(model, inputs, own_losses, engine), expected, 1e-12)


def test_a_module_that_only_long_examples_reach_is_looked_at_then() -> None:
    class ForLong(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.second(hidden) if x.shape[1] > 3 else hidden

    engine, model = BookKeepingEngine(), ForLong()
    for positions in (3, 5, 3):
        inputs = data(positions=positions)
        expected = naive(model, inputs, C, squares)
        assert_same_sum(book_kept(model, inputs, squares, engine), expected, 1e-12)


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
    book_kept(model.eval(), data(rows=1), counted, engine)
    assert calls == [1, 1, 1, 1, 1]
    book_kept(model, data(), counted, engine)
    compared = [5, *[5, 1, 1, 1, 1] * 4]  # looked at for draws, compared in losses and gradients
    again = [1, 1]  # two of every batch
    assert calls[5:] == [1, 2, 1, 2, 1, 2, 3, 3, 2, 2, *compared, 5, *again]
    book_kept(model, data(), counted, engine)
    assert calls[39:] == [5, *again]


def test_the_check_by_doubling_is_what_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: every module is believed to have its examples first. Then the sum is wrong."""

    def believe(model: nn.Module, inputs: Any, coverage: Coverage, loss: Any) -> list[Any]:
        first = {None: Layout((FIRST,), (FIRST,))}
        coverage.axes = {point.name: dict(first) for point in coverage.points}
        return []

    def unchecked(model: nn.Module, few: Any, coverage: Coverage, *_: Any, **__: Any) -> None:
        return

    monkeypatch.setattr("hf_dp.engines.settle.establish_axes", believe)
    monkeypatch.setattr("hf_dp.engines.settle._trial", unchecked)
    monkeypatch.setattr("hf_dp.engines.recorder.Proof.verdict", lambda *_, **__: True)
    monkeypatch.setattr("hf_dp.engines.vectorised.refuse_lost", lambda *_: None)
    inputs = data(rows=3)  # as many examples as positions
    found = book_kept(PositionsFirst(), inputs)
    with pytest.raises(AssertionError):
        assert_same_sum(found, naive(PositionsFirst(), inputs, C, squares), 1e-3)


def test_the_check_of_the_order_is_what_finds_sorted_examples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: nobody looks at the order. Then norms are one example's and shares another's."""
    inputs = data(rows=4, positions=4)
    for index in range(4):
        inputs["x"][index, index + 1 :] = 0
    monkeypatch.setattr("hf_dp.engines.axes.in_order", lambda *_: True)
    monkeypatch.setattr("hf_dp.engines.settle.prove", lambda *_, **__: True)
    monkeypatch.setattr("hf_dp.engines.recorder.Proof.verdict", lambda *_, **__: True)
    found = book_kept(SortedByLength(), inputs)
    with pytest.raises(AssertionError):
        assert_same_sum(found, naive(SortedByLength(), inputs, C, squares), 1e-3)
