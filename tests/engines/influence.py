"""Models whose gradients the example itself brings, and what removing an example does to a sum."""

from __future__ import annotations

from typing import Any

import torch
from engine_zoo import Batch, difference
from torch import Tensor, nn

from hf_dp.clipping import FlatClipping, LossRelease
from hf_dp.engines import engine_named
from hf_dp.engines.base import ExampleLoss
from hf_dp.events import Norm
from hf_dp.sums import ClippedSum

ENGINES = ["book_keeping", "two_pass", "sequential", "auto"]
ROUNDING = 1 + 1e-6
C = 0.5


class Inner(nn.Module):
    """Its loss is the inner product of a layer's output with a gradient that the example brings."""

    def __init__(self, d: int = 64, p: int = 64) -> None:
        super().__init__()
        self.layer = nn.Linear(p, d, bias=False)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return (self.layer(x) * g).flatten(1).sum(1)


class Tied(nn.Module):
    """An embedding and a head with one weight, each with a gradient that the example brings."""

    def __init__(self, rows: int = 50, width: int = 40) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.head = nn.Linear(width, rows, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, a: Tensor, x: Tensor, g: Tensor) -> Tensor:
        return (self.table(ids) * a).sum((1, 2)) + (self.head(x) * g).sum((1, 2))


def of_rows(model: nn.Module, inputs: Batch) -> Tensor:
    losses: Tensor = model(**inputs)
    return losses


def clipped(
    engine: str,
    model: nn.Module,
    inputs: Batch,
    loss: ExampleLoss = of_rows,
    *,
    clipping_norm: float = C,
    norm: Norm = "l2",
    release: LossRelease | None = None,
) -> ClippedSum:
    return engine_named(engine).clipped_sum(
        model,
        inputs,
        example_loss=loss,
        clipping=FlatClipping(clipping_norm, norm),
        loss_release=release,
    )


def joined(summed: ClippedSum) -> dict[str, Tensor]:
    """The whole release: gradients, and the loss's coordinate if there is one."""
    coordinate = {} if summed.loss_sum is None else {"loss": summed.loss_sum}
    return {**summed.grads, **coordinate}


def without(inputs: Batch, index: int) -> Batch:
    return {k: torch.cat([v[:index], v[index + 1 :]]) for k, v in inputs.items()}


def moved(
    engine: str, model: nn.Module, inputs: Batch, index: int, *args: Any, **options: Any
) -> dict[str, Tensor]:
    """What removing one example does to the release."""
    whole = clipped(engine, model, inputs, *args, **options)
    rest = clipped(engine, model, without(inputs, index), *args, **options)
    return difference(joined(whole), joined(rest))


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
