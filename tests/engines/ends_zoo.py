"""Models, a batch and a sum on which losses that look at their batch are tried."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_zoo import Batch
from torch import nn
from toy_nets import Net

from hf_dp.clipping import FlatClipping
from hf_dp.engines import GradientEngine, settle
from hf_dp.engines.base import ExampleLoss

C = 0.05


def familiar() -> nn.Module:
    """Of torch's modules alone, so that what it gave is given to the loss again."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()


def dropping() -> nn.Module:
    return nn.Sequential(*familiar(), nn.Dropout(0.3)).train()


def of_ones_own() -> nn.Module:
    return Net()


MODELS = {"familiar": familiar, "dropping": dropping, "of one's own": of_ones_own}


def batch(size: int = 6, **more: Any) -> Batch:
    generator = torch.Generator().manual_seed(1)
    reward = torch.rand(size, generator=generator)
    reward[-1] = 50.0
    x = torch.randn(size, 6, generator=generator).double()
    return {"x": x, "y": torch.arange(size) % 6, "reward": reward, **more}


def summed(
    engine: GradientEngine, model: nn.Module, loss: ExampleLoss, inputs: Batch | None = None
) -> Any:
    return engine.clipped_sum(model, inputs or batch(), example_loss=loss, clipping=FlatClipping(C))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often examples were compared in detail."""
    found: list[int] = []
    check = settle.check_mates
    monkeypatch.setattr(settle, "check_mates", lambda *a: found.append(1) or check(*a))
    return found
