"""A small model with padded examples, as the preflight is tried on, and layers that it refuses."""

from __future__ import annotations

from typing import Any

import torch
from engine_zoo import Batch
from torch import Tensor, nn

from hf_dp.clipping import FlatClipping, LossRelease
from hf_dp.engines import engine_named
from hf_dp.engines.preflight import preflight

LENGTHS = (6, 4, 3, 2)
C = 0.3


class Reader(nn.Module):
    """Embeds, mixes positions as an attention would, and classifies the mean of the real ones."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)
        self.between = between or nn.LayerNorm(8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.dropout(self.between(torch.tanh(self.body(self.table(ids)))))
        real = mask[..., None].to(states)
        pooled = (states * real).sum(1) / real.sum(1)
        logits: Tensor = self.head(pooled)
        return logits


def loss_of(model: nn.Module, inputs: Batch) -> Tensor:
    logits = model(inputs["ids"], inputs["mask"])
    return nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")


def examples() -> tuple[list[Batch], Batch]:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(1, 20, (4, 6), generator=generator) * mask
    together = {"ids": ids, "mask": mask, "labels": torch.tensor([0, 1, 2, 1])}
    alone = [
        {"ids": ids[i : i + 1, :n], "mask": mask[i : i + 1, :n], "labels": together["labels"][i : i + 1]}
        for i, n in enumerate(LENGTHS)
    ]  # fmt: skip
    return alone, together


def fly(
    model: nn.Module,
    loss: Any = loss_of,
    *,
    engine: Any = None,
    clipping: Any = None,
    one_by_one: bool = False,
    width: int = 0,
) -> None:
    alone, together = examples()
    preflight(
        model,
        alone,
        None if one_by_one else together,
        engine=engine or engine_named("auto"),
        example_loss=loss,
        clipping=clipping or FlatClipping(C),
        loss_release=LossRelease(),
        width=width,
    )


class Centred(nn.Module):
    """Subtracts the mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)
