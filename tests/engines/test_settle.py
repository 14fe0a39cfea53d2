"""Finding taps: what ends it without a lesson, and what is found anew when a model has changed."""

from __future__ import annotations

import importlib
import types
from typing import Any

import pytest
import torch
from engine_zoo import Batch, assert_same_sum, naive
from torch import Tensor, nn
from toy_nets import C, Net, book_kept, data, squares

from hf_dp.engines import BookKeepingEngine, coverage, settle
from hf_dp.engines.tap import Recording


class Places(Net):
    """A table of positions serves all examples at once."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(9, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = super().forward(x + self.places(torch.arange(x.shape[1])))
        return hidden


@pytest.mark.parametrize("message", ["CUDA out of memory", "not enough memory"])
def test_memory_that_runs_out_teaches_nothing_about_the_model(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Recording.backward

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(message)

    engine, model = BookKeepingEngine(), Places()
    monkeypatch.setattr(Recording, "backward", fails)
    with pytest.raises(RuntimeError, match=message):
        book_kept(model, data(), engine=engine)
    monkeypatch.setattr(Recording, "backward", backward)
    assert_same_sum(
        book_kept(model, data(), engine=engine), naive(model, data(), C, squares), 1e-12
    )
    points = engine.recorder.coverage(model).points
    assert sorted(point.name for point in points) == ["first", "places", "second"]
    assert all(point.rule is not None for point in points)


def scaled(self: nn.Linear, x: Tensor) -> Tensor:
    return x @ (3 * self.weight.mT) + self.bias


def patched_instance(model: Net) -> None:
    vars(model.first)["forward"] = types.MethodType(scaled, model.first)


class Scaled(nn.Linear):
    forward = scaled


def other_type(model: Net) -> None:
    model.first.__class__ = Scaled


def other_module(model: Net) -> None:
    replaced = Scaled(6, 6)
    replaced.weight, replaced.bias = model.first.weight, model.first.bias
    model.first = replaced


@pytest.mark.parametrize("change", [patched_instance, other_type, other_module])
def test_a_module_that_computes_something_else_is_looked_at_anew(change: Any) -> None:
    engine, model = BookKeepingEngine(), Net()
    inputs: Batch = data()
    for _ in range(2):
        found = book_kept(model, inputs, engine=engine)
        assert_same_sum(found, naive(model, inputs, C, squares), 1e-12)
        change(model)
    found = book_kept(model, inputs, engine=engine)
    assert_same_sum(found, naive(model, inputs, C, squares), 1e-12)


class Mixes(nn.Module):
    """A matrix, and what else it is set to."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.weight, self.kind, self.scale = nn.Parameter(torch.eye(6) + 1), kind, 1.0
        self.register_buffer("held", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.weight
        if self.kind == "of three":
            out = out / (2.0 if x.shape[1] == 3 else 1.0)
        return out * self.scale * self.held  # type: ignore[operator]


class Mixed(Net):
    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.mixes = Mixes(kind).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = super().forward(self.mixes(x))
        return hidden


def rules(engine: BookKeepingEngine, model: nn.Module) -> dict[str, bool]:
    return {p.name: p.rule is not None for p in engine.recorder.coverage(model).points}


def set_scale(model: Mixed) -> None:
    model.mixes.scale = 4.0


def set_buffer(model: Mixed) -> None:
    model.mixes.held.mul_(4)  # type: ignore[operator]


@pytest.mark.parametrize("change", [set_scale, set_buffer])
@pytest.mark.parametrize("noticed", [True, False])
def test_a_recognised_module_that_is_set_otherwise_is_looked_at_anew(
    change: Any, noticed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: what it is set to is not looked at."""
    if not noticed:
        monkeypatch.setattr(coverage, "state_of", lambda module: ())
    engine, model = BookKeepingEngine(), Mixed()
    book_kept(model, data(), engine=engine)
    before = engine.recorder.coverage(model)
    model.eval().train()
    assert engine.recorder.coverage(model) is before
    assert rules(engine, model)["mixes"]
    change(model)
    found, expected = book_kept(model, data(), engine=engine), naive(model, data(), C, squares)
    if noticed:
        assert_same_sum(found, expected, 1e-12)
        assert not rules(engine, model)["mixes"]
    else:
        with pytest.raises(AssertionError):
            assert_same_sum(found, expected, 1e-3)


@pytest.mark.parametrize("checked", [True, False])
def test_a_module_that_computes_otherwise_on_real_numbers_loses_its_rule(
    checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: nothing is compared."""
    recogniser = importlib.import_module("hf_dp.layers.recognise")
    monkeypatch.setattr(recogniser, "_computes", lambda module, formula, width: True)
    if not checked:
        monkeypatch.setattr(settle, "still_computes", lambda *_: True)
        monkeypatch.setattr("hf_dp.engines.vectorised.refuse_lost", lambda *_: None)
    engine, model = BookKeepingEngine(), Mixed("of three")
    found, expected = book_kept(model, data(), engine=engine), naive(model, data(), C, squares)
    assert rules(engine, model)["mixes"] is not checked
    if checked:
        assert_same_sum(found, expected, 1e-12)
    else:
        with pytest.raises(AssertionError):
            assert_same_sum(found, expected, 1e-3)
