"""Losses from elsewhere: what they do to their batch stays theirs, and what they draw is noticed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ends_zoo import C, batch, familiar, summed
from engine_zoo import Batch, assert_same_sum, naive
from torch import Tensor, nn
from torch.nn import functional as F
from toy_nets import Net

from hf_dp.clipping import FlatClipping
from hf_dp.engines import engine_named, given_losses, recorder, settle
from hf_dp.engines.base import ExampleLoss
from hf_dp.engines.explain import explain_engine
from hf_dp.engines.given_losses import OwnDrawsError, copied, watched_draws, with_own_batches
from hf_dp.engines.sequential import SequentialEngine
from hf_dp.engines.settle import ChangedLossesError
from hf_dp.errors import ConfigurationError

ENGINES = ["auto", "book_keeping", "two_pass", "sequential"]


def losses(model: nn.Module, inputs: Batch) -> Tensor:
    return F.cross_entropy(model(inputs["x"]), inputs["y"], reduction="none")


# ---- batches -------------------------------------------------------------------------------------


def takes_out(model: nn.Module, inputs: Batch) -> Tensor:
    labels = inputs.pop("y")
    return F.cross_entropy(model(inputs["x"]), labels, reduction="none")


def puts_in(model: nn.Module, inputs: Batch) -> Tensor:
    inputs["x"] = inputs["x"] / 2
    return losses(model, inputs)


def in_place(model: nn.Module, inputs: Batch) -> Tensor:
    inputs["x"].div_(2)
    return losses(model, inputs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("loss", [takes_out, puts_in, in_place])
def test_a_loss_may_do_with_its_batch_what_it_likes(loss: ExampleLoss, engine: str) -> None:
    model, inputs, one = familiar(), batch(), engine_named(engine)
    before = copy.deepcopy(inputs)
    expected = naive(familiar(), inputs, C, lambda m, b: loss(m, copy.deepcopy(b)))
    for _ in range(2):
        assert_same_sum(summed(one, model, loss, inputs), expected, 1e-12)
        assert inputs.keys() == before.keys()
        for name, value in before.items():
            assert torch.equal(inputs[name], value)


def test_the_fault_of_one_batch_for_all_calls_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(given_losses, "copied", lambda inputs: inputs)
    inputs = batch()
    summed(engine_named("sequential"), familiar(), in_place, inputs)
    assert not torch.equal(inputs["x"], batch()["x"])


def test_an_explanation_leaves_its_examples_as_they_were() -> None:
    inputs = batch()
    explain_engine(familiar(), inputs, engine=engine_named("auto"), example_loss=takes_out)
    assert "y" in inputs


def test_copies_share_nothing_with_what_was_copied() -> None:
    given: dict[str, Any] = {
        "x": torch.zeros(2),
        "inner": {"ids": [torch.zeros(2), "word"]},
        "numbers": np.zeros(2),
    }
    found = copied(given)
    found["x"] += 1
    found["inner"]["ids"][0] += 1
    found["numbers"] += 1
    assert given["x"].sum() == given["inner"]["ids"][0].sum() == given["numbers"].sum() == 0


def test_a_loss_is_wrapped_once_and_those_of_a_library_are_not() -> None:
    wrapped = with_own_batches(losses)
    assert with_own_batches(wrapped) is wrapped
    assert with_own_batches(F.relu) is F.relu  # type: ignore[arg-type]


# ---- draws ---------------------------------------------------------------------------------------


def mixed_up(shares: Callable[[int], Tensor]) -> ExampleLoss:
    """Mixup inside the loss: alone, an example is mixed with itself."""

    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        x, y = inputs["x"], inputs["y"]
        share = shares(len(x))[:, None]
        out = model(share * x + (1 - share) * x.flip(0))
        own = F.cross_entropy(out, y, reduction="none")
        others = F.cross_entropy(out, y.flip(0), reduction="none")
        return share[:, 0] * own + (1 - share[:, 0]) * others

    return loss


DRAWN: dict[str, Callable[[int], Tensor]] = {
    "torch": lambda size: torch.rand(size).double(),
    "numpy": lambda size: torch.full((size,), np.random.rand()).double(),  # noqa: NPY002 (as people write it)
    "python": lambda size: torch.full((size,), random.random()).double(),
}


@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize("engine", ["book_keeping", "two_pass"])
def test_a_loss_that_draws_is_refused_by_engines_that_take_examples_together(
    engine: str, drawn: str
) -> None:
    with pytest.raises(OwnDrawsError, match="drawn outside of the model"):
        summed(engine_named(engine), familiar(), mixed_up(DRAWN[drawn]))


@pytest.mark.parametrize("make", [familiar, Net])
def test_auto_takes_a_batch_one_by_one_in_which_a_loss_draws(
    make: Callable[[], nn.Module],
) -> None:
    mixing: list[bool] = []
    mixed = mixed_up(DRAWN["torch"])

    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        return mixed(model, inputs) if mixing else losses(model, inputs)

    expected = naive(make(), batch(), C, losses)  # alone, an example is mixed with itself
    model, engine = make(), engine_named("auto")
    for _ in range(2):
        assert_same_sum(summed(engine, model, loss), expected, 1e-12)
        assert not isinstance(engine.chosen, SequentialEngine)  # type: ignore[attr-defined]
        mixing.append(True)
    always = engine_named("auto")
    assert_same_sum(summed(always, make(), mixed), expected, 1e-12)
    assert isinstance(always.chosen, SequentialEngine)  # type: ignore[attr-defined]


def test_the_fault_of_not_looking_for_draws_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One example, replaced, then moves the sum by more than twice its bound."""
    for file in (settle, recorder):
        monkeypatch.setattr(file, "refuse_own_draws", lambda *_, **__: set())
    sums = []
    for value in (0.0, 1e3):
        inputs = batch()
        inputs["x"][0] = value
        torch.manual_seed(0)
        found = summed(engine_named("book_keeping"), familiar(), mixed_up(DRAWN["torch"]), inputs)
        sums.append(torch.cat([grad.flatten() for grad in found.grads.values()]))
    assert float((sums[0] - sums[1]).norm()) > 2 * C


class Headed(nn.Module):
    """Dropout within parts that a loss calls one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*familiar(), nn.Dropout(0.3))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(6, 6).double())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(x))
        return found


def by_parts(model: nn.Module, inputs: Batch) -> Tensor:
    body, head = model.get_submodule("body"), model.get_submodule("head")
    return F.cross_entropy(head(body(inputs["x"])), inputs["y"], reduction="none")


@pytest.mark.parametrize("loss", [losses, by_parts])
@pytest.mark.parametrize("engine", ["book_keeping", "two_pass"])
def test_draws_of_the_models_own_modules_are_not_the_loss_s(engine: str, loss: ExampleLoss) -> None:
    torch.manual_seed(0)
    model, one = Headed().train(), engine_named(engine)
    for _ in range(3):
        assert len(summed(one, model, loss).norms) == 6


def test_draws_are_known_by_where_they_are_drawn() -> None:
    model = Headed().train()
    device = torch.device("cpu")
    with watched_draws(device, model.modules()) as draws:
        model(batch()["x"])
    assert draws.any
    assert not draws.outside
    assert draws.outermost == {model}
    with watched_draws(device, model.modules()) as draws:
        model(batch()["x"])
        torch.rand(1)
    assert draws.outside
    with pytest.raises(RuntimeError), watched_draws(device, model.modules()) as draws:
        model(torch.zeros(2, 3).double())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- what changes, or couples --------------------------------------------------------------------


def in_batch(model: nn.Module, inputs: Batch) -> Tensor:
    """The other examples are each one's negatives."""
    out = F.normalize(model(inputs["x"]), dim=1)
    return F.cross_entropy(out @ out.T.detach() * 5, torch.arange(len(out)), reduction="none")


@pytest.mark.parametrize("engine", ["auto", "book_keeping", "two_pass"])
def test_negatives_from_the_batch_are_refused(engine: str) -> None:
    """One at a time there would be none: every gradient would be zero."""
    with pytest.raises(ConfigurationError, match="batch mates"):
        summed(engine_named(engine), familiar(), in_batch)


def test_losses_that_change_from_call_to_call_are_told_of() -> None:
    calls: list[int] = []

    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        calls.append(1)
        return losses(model, inputs) * len(calls)

    with pytest.raises(ChangedLossesError):
        engine_named("book_keeping").clipped_sum(
            familiar(), batch(1), example_loss=loss, clipping=FlatClipping(C)
        )
