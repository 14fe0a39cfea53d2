"""The preflight sees losses and layers that mix examples or look at padding, and names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_zoo import Batch
from preflight_zoo import Centred, Reader, fly, loss_of
from torch import Tensor, nn

from hf_dp.engines import SequentialEngine
from hf_dp.engines import preflight as module
from hf_dp.errors import ConfigurationError


class DetachedScale(nn.Module):
    """The value of each row is its own, its gradient is scaled by the size of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach() + (x - x.detach()) / len(x)


class Widened(nn.Module):
    """Scales by how far the batch was padded."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.shape[1]


def batch_mean(model: nn.Module, inputs: Batch) -> Tensor:
    return loss_of(model, inputs).mean().expand(len(inputs["ids"]))


def contrastive(model: nn.Module, inputs: Batch) -> Tensor:
    logits = model(inputs["ids"], inputs["mask"])
    scores = logits @ logits.T
    return nn.functional.cross_entropy(scores, torch.arange(len(scores)), reduction="none")


def with_a_balance(model: nn.Module, inputs: Batch) -> Tensor:
    shares = model(inputs["ids"], inputs["mask"]).softmax(-1).mean(0)
    return loss_of(model, inputs) + 0.01 * shares.square().sum()


def by_the_longest(model: nn.Module, inputs: Batch) -> Tensor:
    return loss_of(model, inputs) * inputs["mask"].sum(1) / inputs["mask"].shape[1]


def steep_in_padding(model: nn.Module, inputs: Batch) -> Tensor:
    """No loss shows it, but next to an example that has padding every gradient is nan."""
    losses = loss_of(model, inputs)
    padded = (inputs["mask"] == 0).any(1)
    return losses + torch.where(padded, torch.where(padded, losses * 0, 1.0).sqrt(), 0.0)


def steep_among_others(model: nn.Module, inputs: Batch) -> Tensor:
    losses = loss_of(model, inputs)
    return losses + (losses * 0).sqrt() if len(losses) > 1 else losses


LOSSES = [
    (batch_mean, "batch mates"),
    (contrastive, "batch mates"),
    (with_a_balance, "batch mates"),
    (by_the_longest, "padding"),
    (steep_in_padding, "batch mates"),
    (steep_among_others, "batch mates"),
]
LAYERS: list[tuple[Callable[[], nn.Module], str, str, str]] = [
    (Centred, "between", "Centred", "batch mates"),
    (lambda: Between(Centred()), r"between\.inner", "Centred", "batch mates"),
    (Widened, "between", "Widened", "padding"),
    (lambda: BatchNormed(8), r"between\.norm", "BatchNorm1d", "batch mates"),
]


class Between(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.inner(x)
        return moved


class BatchNormed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.norm(x.mT).mT
        return moved


@pytest.mark.parametrize(
    ("loss", "what"), LOSSES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_loss_that_mixes_examples_is_named(loss: Any, what: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^example_loss='loss'.* its {what}\. "):
        fly(Reader(), loss)


@pytest.mark.parametrize(("make", "name", "kind", "what"), LAYERS)
def test_a_layer_that_mixes_examples_is_named(make: Any, name: str, kind: str, what: str) -> None:
    match = rf"^model\.{name}='{kind}': expected a layer whose output .* its {what}\. "
    with pytest.raises(ConfigurationError, match=match):
        fly(Reader(make()))


def test_code_between_layers_is_named_by_the_layer_that_it_feeds() -> None:
    class Pooling(Reader):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            states = self.table(ids)
            return self.head(self.body(states - states.mean(0)).mean(1))  # type: ignore[no-any-return]

    with pytest.raises(ConfigurationError, match=r"^model\.body='Linear': .* whose input"):
        fly(Pooling())


def test_a_gradient_that_mixes_examples_is_seen_where_the_loss_does_not() -> None:
    with pytest.raises(ConfigurationError, match="batch mates"):
        fly(Reader(DetachedScale()))


def faintly_mixed(model: nn.Module, inputs: Batch) -> Tensor:
    """The shortest has a gradient of a thousandth, half of which is its batch mates' size."""
    losses = loss_of(model, inputs)
    shortest = inputs["mask"].sum(1) == 2
    mixed = losses.detach() + (losses - losses.detach()) * (0.5 + 0.5 / len(losses))
    return torch.where(shortest, 1e-3 * mixed, losses)


def test_a_faint_gradient_that_mixes_examples_is_seen() -> None:
    with pytest.raises(ConfigurationError, match="batch mates"):
        fly(Reader(), faintly_mixed)


def test_what_examples_one_by_one_cannot_do_to_one_another_is_let_pass() -> None:
    for model, loss in ((Reader(Centred()), loss_of), (Reader(Widened()), by_the_longest)):
        fly(model, loss, one_by_one=True)


@pytest.mark.parametrize(
    ("model", "loss"),
    [(Reader(make()), loss_of) for make, *_ in LAYERS]
    + [(Reader(), loss) for loss, _ in LOSSES[:3]],
)
def test_without_the_check_of_coupling_these_pass(
    model: nn.Module, loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the sequential engine, which computes each alone, nothing else could see them."""
    monkeypatch.setattr(module, "check_coupling", lambda *_, **__: None)
    monkeypatch.setattr(module, "_check_agreement", lambda *_, **__: None)
    fly(model, loss, engine=SequentialEngine())


class Full(nn.Module):
    """Has room for so many positions of a batch, as a router may, and lets the rest go by."""

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x[..., 0].numel()).view(x.shape[:-1])
        return x * (places < 60)[..., None]


def test_what_shows_only_in_a_batch_as_wide_as_in_training_is_refused() -> None:
    fly(Reader(Full()))
    fly(Reader(Full()), width=10)
    with pytest.raises(ConfigurationError, match=r"between='Full'.*batch mates"):
        fly(Reader(Full()), width=16)
    fly(Reader(), width=16)


def test_a_width_that_memory_has_no_room_for_is_left_to_training() -> None:
    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        if len(inputs["ids"]) > 4:
            raise RuntimeError(message)
        return loss_of(model, inputs)

    message = "CUDA out of memory"
    fly(Reader(), loss, width=16)
    message = "expanded size"
    with pytest.raises(RuntimeError, match=message):
        fly(Reader(), loss, width=16)
