"""One example that changes what is done with its whole batch is noticed, in whichever batch it comes."""

from __future__ import annotations

import pytest
import torch
from ends_zoo import MODELS, batch, looks, summed
from engine_zoo import Batch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_nets import Net

from hf_dp.engines import engine_named
from hf_dp.engines.base import ExampleLoss
from hf_dp.errors import ConfigurationError

__all__ = ["looks"]  # a fixture


def crossed(model: nn.Module, x: Tensor, inputs: Batch) -> Tensor:
    return F.cross_entropy(model(x), inputs["y"], reduction="none")


def to_unit(model: nn.Module, inputs: Batch) -> Tensor:
    """Pictures of bytes are brought to 0..1, if one is."""
    x = inputs["x"]
    return crossed(model, x / 255 if bool(x.max() > 10) else x, inputs)


def by_the_largest(model: nn.Module, inputs: Batch) -> Tensor:
    return crossed(model, inputs["x"] / inputs["x"].abs().max().clamp_min(10), inputs)


def nothing_of_such_a_batch(model: nn.Module, inputs: Batch) -> Tensor:
    losses = crossed(model, inputs["x"], inputs)
    return losses if bool(inputs["x"].max() < 10) else torch.zeros_like(losses)


def kept_if_finite(model: nn.Module, inputs: Batch) -> Tensor:
    if not bool(inputs["x"].isfinite().all()):
        return torch.zeros(len(inputs["x"]))
    return crossed(model, inputs["x"], inputs)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("place", [1, 4])
@pytest.mark.parametrize(
    ("loss", "culprit"),
    [
        (to_unit, 200.0),
        (by_the_largest, 200.0),
        (nothing_of_such_a_batch, 200.0),
        (kept_if_finite, torch.nan),
    ],
)
def test_one_example_that_changes_what_is_done_with_its_batch_is_noticed(
    kind: str, place: int, loss: ExampleLoss, culprit: float
) -> None:
    """Be the losses without a graph, and the culprit neither the lowest nor the highest."""
    model, engine, later = MODELS[kind](), engine_named("auto"), batch()
    for _ in range(2):
        summed(engine, model, loss)
    later["x"][place] = culprit
    with pytest.raises(ConfigurationError, match="batch mates"):
        summed(engine, model, loss, later)


class BytesToo(Net):
    """A model of one's own that does what `to_unit` does, and drops a share of what it is given."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(share)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        found: Tensor = super().forward(x / 255 if bool(x.max() > 10) else x)
        return found


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_model_that_does_so_is_noticed_among_all_others(share: float) -> None:
    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        return crossed(model, inputs["x"], inputs)

    model, engine, later = BytesToo(share).train(), engine_named("auto"), batch()
    summed(engine, model, loss)
    later["x"][2] = 200.0
    with pytest.raises(ConfigurationError, match="batch mates"):
        summed(engine, model, loss, later)


def trimmed(model: nn.Module, inputs: Batch) -> Tensor:
    """Calls the model with other shapes for one example than for several: the model is run again."""
    width = int(inputs["lengths"].max())
    x = F.pad(inputs["x"][:, :width], (0, 6 - width))
    seen = torch.arange(6) < inputs["lengths"][:, None]
    return crossed(model, x * seen, inputs)


@pytest.mark.parametrize("kind", MODELS)
def test_a_loss_that_cuts_its_batch_to_the_longest_is_no_influence(
    kind: str, looks: list[int]
) -> None:
    model, engine = MODELS[kind](), engine_named("auto")
    inputs = batch(lengths=torch.tensor([2, 3, 6, 4, 5, 1]))
    for _ in range(3):
        summed(engine, model, trimmed, inputs)
    assert len(looks) == 1
