"""A loss that begins to look at the batch after its first one is found out, whatever made it begin."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ends_zoo import MODELS, C, batch, familiar, looks, summed
from engine_zoo import Batch, assert_same_sum, naive
from torch import Tensor, nn
from torch.nn import functional as F
from toy_nets import Net

from hf_dp.engines import alone_again, engine_named
from hf_dp.engines.base import ExampleLoss
from hf_dp.errors import ConfigurationError

__all__ = ["looks"]  # a fixture


def rewarded(model: nn.Module, inputs: Batch, normalise: bool) -> Tensor:
    logp = -F.cross_entropy(model(inputs["x"]), inputs["y"], reduction="none")
    gain = inputs["reward"].to(logp)
    if normalise:
        gain = (gain - gain.mean()) / (gain.std(unbiased=False) + 1e-4)
    return -gain * logp


@dataclasses.dataclass
class Settings:
    normalise: bool = False
    words: dict[str, Any] = dataclasses.field(default_factory=dict)


class Objective:
    def __init__(self) -> None:
        self.settings = Settings()

    def loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        return rewarded(model, inputs, self.settings.normalise)


NORMALISE = False

Switch = Callable[[], None]


def bound_method() -> tuple[ExampleLoss, Switch]:
    objective = Objective()
    return objective.loss, lambda: setattr(objective.settings, "normalise", True)


def closed_over_a_list() -> tuple[ExampleLoss, Switch]:
    flags: list[bool] = []
    return lambda m, b: rewarded(m, b, bool(flags)), lambda: flags.append(True)


def in_a_mapping() -> tuple[ExampleLoss, Switch]:
    settings = Settings()
    return (
        lambda m, b: rewarded(m, b, settings.words.get("advantage") == "group"),
        lambda: settings.words.update(advantage="group"),
    )


def in_the_file() -> tuple[ExampleLoss, Switch]:
    return lambda m, b: rewarded(m, b, NORMALISE), lambda: globals().update(NORMALISE=True)


def counted() -> tuple[ExampleLoss, Switch]:
    steps = [0]
    return lambda m, b: rewarded(m, b, steps[0] > 20), lambda: steps.append(steps.pop() + 21)


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    yield
    globals().update(NORMALISE=False)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "make", [bound_method, closed_over_a_list, in_a_mapping, in_the_file, counted]
)
def test_a_setting_that_changes_between_batches_is_noticed(make: Any, kind: str) -> None:
    (loss, switch), model, engine = make(), MODELS[kind](), engine_named("auto")
    for _ in range(2):
        summed(engine, model, loss)
    switch()
    with pytest.raises(ConfigurationError, match="batch mates"):
        summed(engine, model, loss)


@pytest.mark.parametrize("kind", ["familiar", "of one's own"])
@pytest.mark.parametrize("name", ["two_pass", "book_keeping"])
def test_every_engine_notices_and_without_that_the_sum_is_wrong(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for planted in (False, True):
        (loss, switch), model, engine = bound_method(), MODELS[kind](), engine_named(name)
        summed(engine, model, loss)
        switch()
        if not planted:
            with pytest.raises(ConfigurationError, match="batch mates"):
                summed(engine, model, loss)
            monkeypatch.setattr(alone_again.Ends, "show", lambda _: False)
            continue
        found = summed(engine, model, loss)
        with pytest.raises(AssertionError):
            assert_same_sum(found, naive(model, batch(), C, loss), 0.1)


@pytest.mark.parametrize("kind", MODELS)
def test_words_in_the_batch_are_settings_too(kind: str) -> None:
    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        return rewarded(model, inputs, inputs["task"] == "rl")

    model, engine = MODELS[kind](), engine_named("auto")
    summed(engine, model, loss, batch(task="sft"))
    with pytest.raises(ConfigurationError, match="batch mates"):
        summed(engine, model, loss, batch(task="rl"))


def straight_through(on: list[bool]) -> ExampleLoss:
    """The losses are each one's own; what they send back is not."""

    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        losses = F.cross_entropy(model(inputs["x"]), inputs["y"], reduction="none")
        weights = losses.detach() / losses.detach().sum() if on else torch.ones_like(losses)
        found: Tensor = losses.detach() + (losses - losses.detach()) * weights
        return found

    return loss


def test_gradients_that_a_loss_sends_back_are_compared_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for planted in (False, True):
        on: list[bool] = []
        loss, model, engine = straight_through(on), familiar(), engine_named("auto")
        summed(engine, model, loss)
        on.append(True)
        if not planted:
            with pytest.raises(ConfigurationError, match="batch mates"):
                summed(engine, model, loss)
            monkeypatch.setattr(alone_again, "_gradients_differ", lambda *_: False)
            continue
        summed(engine, model, loss)  # nothing is noticed


def test_a_familiar_model_is_not_run_again_and_a_loss_on_four_rows() -> None:
    sizes: list[int] = []
    passes: list[int] = []

    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        sizes.append(len(inputs["x"]))
        return rewarded(model, inputs, False)

    model, engine = familiar(), engine_named("book_keeping")
    summed(engine, model, loss)
    sizes.clear()
    before = F.linear
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(F, "linear", lambda *a: passes.append(len(a[0])) or before(*a))
        summed(engine, model, loss)
    assert sizes == [6, 1, 1, 2]
    assert passes == [6, 6]  # its two layers, once


def in_place(model: nn.Module, inputs: Batch) -> Tensor:
    logits = model(inputs["x"])
    logits /= 2.0
    return F.cross_entropy(logits, inputs["y"], reduction="none")


HEAT = [1.0]


def annealed(model: nn.Module, inputs: Batch) -> Tensor:
    return F.cross_entropy(model(inputs["x"]) / HEAT[0], inputs["y"], reduction="none")


def noisy(model: nn.Module, inputs: Batch) -> Tensor:
    logits = model(inputs["x"])
    return F.cross_entropy(logits + torch.randn_like(logits), inputs["y"], reduction="none")


def past_the_root(model: Any, inputs: Batch) -> Tensor:
    out = (
        model.second(model.first(inputs["x"])) if isinstance(model, Net) else model[0](inputs["x"])
    )
    losses: Tensor = out.square().sum(1)
    return losses


def twice(model: nn.Module, inputs: Batch) -> Tensor:
    losses: Tensor = (model(inputs["x"]) - model(-inputs["x"])).square().sum(1)
    return losses


def benign(model: nn.Module, inputs: Batch) -> Tensor:
    return rewarded(model, inputs, False)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("loss", [benign, in_place, annealed, noisy, past_the_root, twice])
def test_losses_of_each_examples_own_are_looked_at_once(
    kind: str, loss: ExampleLoss, looks: list[int]
) -> None:
    model, engine = MODELS[kind](), engine_named("auto")
    for step in range(4):
        HEAT[0] = 0.9**step
        summed(engine, model, loss)
    assert len(looks) == 1


def test_examples_that_are_no_numbers_are_no_influence(looks: list[int]) -> None:
    inputs, model, engine = batch(), familiar(), engine_named("auto")
    inputs["x"][[0, 3]] = torch.nan
    for _ in range(3):
        summed(engine, model, benign, inputs)
    assert len(looks) == 1


class WithMean(nn.Module):
    """Gives what transformers' models give: the batch's loss beside each example's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = familiar()

    def forward(self, x: Tensor) -> dict[str, Any]:
        logits = self.net(x)
        return {"loss": logits.square().mean(), "logits": logits, "cache": object()}


@pytest.mark.parametrize("uses", [True, False])
def test_the_loss_of_the_whole_batch_is_no_examples_own(
    uses: bool, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_dp.engines.coverage.foreign_code", lambda _: "")  # as if a library's
    on: list[bool] = []

    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        found = model(inputs["x"])
        losses = F.cross_entropy(found["logits"], inputs["y"], reduction="none")
        return losses + found["loss"].detach() if on else losses

    model, engine = WithMean(), engine_named("auto")
    summed(engine, model, loss)
    on.extend([True] * uses)
    if uses:
        with pytest.raises(ConfigurationError, match="batch mates"):
            summed(engine, model, loss)
    else:
        summed(engine, model, loss)
    assert len(looks) == 1 + uses


def test_the_model_is_left_as_it_was() -> None:
    model, engine = familiar(), engine_named("book_keeping")
    own: Any = model.forward
    model.forward = own  # as accelerate puts one in its place
    flags = [module.training for module in model.modules()]
    for _ in range(2):
        summed(engine, model, benign)
    assert vars(model)["forward"] is own
    assert flags == [module.training for module in model.modules()]
