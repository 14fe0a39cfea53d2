"""A gradient that leaves a module where no tap is shows on two examples; such models go one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_zoo import Batch, assert_same_sum, naive
from torch import Tensor, nn
from toy_nets import C, Net, book_kept, check, data, squares

from hf_dp.clipping import FlatClipping
from hf_dp.engines import (
    AutomaticEngine,
    BookKeepingEngine,
    SequentialEngine,
    engine_named,
    mates,
)
from hf_dp.engines.base import ExampleLoss
from hf_dp.errors import UncoveredParameterError

REFUSED = "expected its whole gradient"
AUX = 0.02  # as little as the losses weigh that balance experts


class InAttribute(nn.Linear):
    """Leaves a loss of its own behind."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.left: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.left = out.pow(4).mean((1, 2))
        return out


class InList(InAttribute):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.left = [self.left / 2, {"same": self.left / 2}]
        return out


class WithoutRule(nn.Module):
    """In an attribute; no layer has a formula for its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 2, 6))
        self.left: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.left = (x * self.gain).pow(4).mean((1, 2))
        return x * self.gain


class LeavesBehind(Net):
    def __init__(self, part: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first = part().double()  # type: ignore[assignment]


def with_aux(model: nn.Module, inputs: Batch) -> Tensor:
    losses = squares(model, inputs)
    left: Any = model.get_submodule("first").left
    return losses + AUX * (left[0] + left[1]["same"] if isinstance(left, list) else left)


class Returns(nn.Module):
    """Gives a function that holds what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 2, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        gains = torch.tanh(x * self.gain)
        return x, lambda y: y * gains


class InClosure(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Returns().double()

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.gate(x)
        return super().forward(gate(x))


CASES: dict[str, tuple[Callable[[], nn.Module], ExampleLoss]] = {
    "attribute": (lambda: LeavesBehind(InAttribute), with_aux),
    "list": (lambda: LeavesBehind(InList), with_aux),
    "without rule": (lambda: LeavesBehind(WithoutRule), with_aux),
    "closure": (InClosure, squares),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["book_keeping", "two_pass"])
def test_what_flows_past_the_taps_is_refused_every_time(case: str, name: str) -> None:
    (make, loss), engine = CASES[case], engine_named(name)
    model = make()
    for _ in range(2):
        with pytest.raises(UncoveredParameterError, match=REFUSED):
            engine.clipped_sum(model, data(), example_loss=loss, clipping=FlatClipping(C))


@pytest.mark.parametrize("case", CASES)
def test_such_models_are_taken_one_by_one(case: str) -> None:
    (make, loss), engine = CASES[case], AutomaticEngine()
    model = make()
    for _ in range(2):
        found = engine.clipped_sum(model, data(), example_loss=loss, clipping=FlatClipping(C))
        assert_same_sum(found, naive(model, data(), C, loss), 1e-12)
    assert isinstance(engine.chosen, SequentialEngine)


@pytest.mark.parametrize("case", CASES)
def test_without_the_comparison_the_sum_would_be_wrong(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_dp.engines.vectorised.refuse_lost", lambda *_: None)
    make, loss = CASES[case]
    with pytest.raises(AssertionError):
        check(make(), data(), loss)


def test_another_loss_is_compared_anew_and_the_same_one_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, model, rows = BookKeepingEngine(), LeavesBehind(InAttribute), []

    def counted(model: nn.Module, inputs: Batch) -> Tensor:
        rows.append(len(inputs["x"]))
        return squares(model, inputs)

    book_kept(model, data(), counted, engine)
    looked = len(rows)
    book_kept(model, data(), counted, engine)
    assert rows[looked:] == [5, 1, 1], "the pass, and what is done for every batch"
    with pytest.raises(UncoveredParameterError, match=REFUSED):
        book_kept(model, data(), with_aux, engine)


def test_examples_without_a_gradient_leave_the_comparison_to_later_ones() -> None:
    engine, model = BookKeepingEngine(), LeavesBehind(InAttribute)
    with torch.no_grad():
        model.first.bias.zero_()
        model.second.bias.zero_()
    nothing = {"x": torch.zeros_like(data()["x"])}
    book_kept(model, nothing, with_aux, engine)
    with pytest.raises(UncoveredParameterError, match=REFUSED):
        book_kept(model, data(), with_aux, engine)


def test_what_is_left_behind_without_a_gradient_is_no_matter() -> None:
    def watched(model: nn.Module, inputs: Batch) -> Tensor:
        losses = squares(model, inputs)
        left: Any = model.get_submodule("first").left
        return losses + AUX * left.detach()

    check(LeavesBehind(InAttribute), data(), watched)


@pytest.mark.parametrize("name", ["book_keeping", "two_pass"])
def test_dropout_draws_the_same_for_both(name: str) -> None:
    class Dropped(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    model = Dropped().train()
    before = torch.get_rng_state()
    found = []
    for engine in (engine_named(name), SequentialEngine()):
        torch.set_rng_state(before)
        inputs = data(rows=1)
        found.append(
            engine.clipped_sum(model, inputs, example_loss=squares, clipping=FlatClipping(C))
        )
    assert_same_sum(found[0], found[1], 1e-12)


def test_a_generator_of_the_model_s_own_is_not_taken_for_a_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Jitters(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.generator = self.__dict__.get("generator") or torch.Generator().manual_seed(0)
            noise = torch.randn(len(x), 1, 1, generator=self.generator, dtype=x.dtype)
            return super().forward(x * (1 + self.jitter * noise))

    def looked_at(jitter: float) -> None:
        model, engine = Jitters(), BookKeepingEngine()
        model.jitter = 0.0
        book_kept(model, data(1), squares, engine)
        next(iter(engine.recorder._coverages.values())).whole.clear()
        model.jitter = jitter
        book_kept(model, data(1), squares, engine)

    looked_at(0.5)
    monkeypatch.setitem(mates.GAPS, "float32", 1e9)
    with pytest.raises(UncoveredParameterError, match=REFUSED):
        looked_at(0.5)


@pytest.mark.parametrize("positions", [5, 6000])
def test_rounding_in_half_precision_is_not_taken_for_a_loss(positions: int) -> None:
    """Plain autograd adds 12000 numbers up in bfloat16, and comes out far too short."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, positions, 6, generator=generator, dtype=torch.bfloat16)

    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(super().forward(x)) + 1

    model = Normed().bfloat16()
    found = book_kept(model, {"x": x}, squares)
    assert bool(found.norms.all())


def test_in_half_precision_what_is_missing_shows_too() -> None:
    model, inputs = InClosure().bfloat16(), {"x": data()["x"].bfloat16() / 10}
    with pytest.raises(UncoveredParameterError, match=REFUSED):
        book_kept(model, inputs, squares)
