"""A net of two layers in float64 whose `forward` tests change, and its clipped sums."""

from __future__ import annotations

from typing import Any

import torch
from engine_zoo import Batch, assert_same_sum, naive
from left_alone import left_alone
from torch import Tensor, nn

from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine
from hf_dp.engines.base import ExampleLoss
from hf_dp.sums import ClippedSum

C = 0.5


class Net(nn.Module):
    """Two layers; `forward` of subclasses says what is unusual about it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def squares(model: nn.Module, inputs: Batch) -> Tensor:
    out: Tensor = model(**inputs)
    return out.square().flatten(1).sum(1)


def data(rows: int = 5, positions: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, positions, 6, generator=generator, dtype=torch.float64)
    return {"x": x * torch.logspace(-1, 1, rows, dtype=torch.float64)[:, None, None]}


def book_kept(
    model: nn.Module,
    inputs: Batch,
    loss: ExampleLoss = squares,
    engine: BookKeepingEngine | None = None,
    **options: Any,
) -> ClippedSum:
    with left_alone(model):
        return (engine or BookKeepingEngine()).clipped_sum(
            model, inputs, example_loss=loss, clipping=FlatClipping(C), **options
        )


def check(model: nn.Module, inputs: Batch, loss: ExampleLoss = squares) -> None:
    assert_same_sum(book_kept(model, inputs, loss), naive(model, inputs, C, loss), 1e-12)
