"""Taps on a model that copies, pickles or clips itself while it is tapped."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from engine_zoo import assert_same_sum, naive
from torch import Tensor, nn
from toy_nets import C, Net, data, squares

from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine, TwoPassEngine, engine_named, formula_tap
from hf_dp.errors import ConfigurationError

KINDS = [BookKeepingEngine, TwoPassEngine]


class Scaled(nn.Linear):
    """Has no formula, and so a tap of hooks."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.weight.sum().tanh()


class Copies(Net):
    """Keeps a copy of a layer that is running, or of itself."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.scaled, self.way = Scaled(6, 6).double(), way
        self.copied: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            layers = [self.first, self.scaled]
            copied = (
                copy.deepcopy(layers) if self.way == "copy" else pickle.loads(pickle.dumps(layers))
            )
            self.copied = [(layer, x.detach()) for layer in copied]
        return super().forward(self.scaled(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_copies_of_tapped_modules_are_not_tapped(kind: Any, way: str) -> None:
    model, engine = Copies(way), kind()
    for rows in (3, 2):
        inputs = data(rows)
        found = engine.clipped_sum(model, inputs, example_loss=squares, clipping=FlatClipping(C))
        assert_same_sum(found, naive(model, inputs, C, squares), 1e-12)
        assert not {"forward"} & (vars(model.first).keys() | vars(model.scaled).keys())
    for (layer, x), original in zip(model.copied, (model.first, model.scaled), strict=True):
        layer.requires_grad_(True)
        out = layer(x)
        assert torch.equal(out, original(x))
        assert "Tap" not in type(out.grad_fn).__name__
        assert "_Forward" not in type(vars(layer).get("forward")).__name__


def test_a_copy_of_a_patched_module_is_patched() -> None:
    model = Copies("copy")
    patched = Doubles(model.first)
    vars(model.first)["forward"] = patched
    engine = engine_named("book_keeping")
    found = engine.clipped_sum(model, data(), example_loss=squares, clipping=FlatClipping(C))
    assert_same_sum(found, naive(model, data(), C, squares), 1e-12)
    layer, x = model.copied[0]
    assert torch.equal(layer(x), model.first(x))
    assert vars(model.first)["forward"] is patched


class Doubles:
    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * nn.Linear.forward(self.module, x)


def test_a_copy_with_the_tap_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: copies keep the wrapped forward."""
    monkeypatch.setattr(
        formula_tap._Forward, "__reduce__", lambda self: (formula_tap._itself, (self,))
    )
    with pytest.raises((AssertionError, TypeError, RuntimeError)):
        test_copies_of_tapped_modules_are_not_tapped(BookKeepingEngine, "copy")


class Nested(Net):
    engine: Any = None

    def forward(self, x: Tensor) -> Tensor:
        engine, self.engine = self.engine, None
        if engine is not None and torch.is_grad_enabled() and len(x) == 5:
            inner = {"x": x.detach()}
            engine.clipped_sum(self, inner, example_loss=squares, clipping=FlatClipping(C))
        self.engine = engine
        return super().forward(x)


@pytest.mark.parametrize("inner", ["book_keeping", "two_pass", "auto"])
@pytest.mark.parametrize("outer", ["book_keeping", "two_pass", "auto"])
def test_a_clipped_sum_within_a_clipped_sum_is_refused(outer: str, inner: str) -> None:
    model, engine = Nested(), engine_named(outer)
    for _ in range(2):
        model.engine = engine_named(inner)
        with pytest.raises(ConfigurationError, match="within its own forward"):
            engine.clipped_sum(model, data(), example_loss=squares, clipping=FlatClipping(C))
    model.engine = None
    found = engine.clipped_sum(model, data(), example_loss=squares, clipping=FlatClipping(C))
    assert_same_sum(found, naive(model, data(), C, squares), 1e-12)
