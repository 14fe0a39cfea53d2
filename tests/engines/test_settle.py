"""Finding taps: what ends it without a lesson, and what is found anew when a model has changed."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from engine_zoo import Batch, assert_same_sum, naive
from torch import Tensor, nn
from toy_nets import C, Net, book_kept, data, squares

from hf_dp.engines import BookKeepingEngine
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
