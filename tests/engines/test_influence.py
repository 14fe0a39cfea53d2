"""Examples that influence one another without a gradient: found by comparing those together and alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from engine_zoo import Batch, assert_same_sum, naive
from torch import Tensor, nn
from toy_nets import C, Net, book_kept, data, squares

from hf_dp.engines import BookKeepingEngine, engine_named, mates, settle
from hf_dp.engines.base import ExampleLoss
from hf_dp.engines.mates import check_mates
from hf_dp.errors import ConfigurationError


class Coupled(Net):
    """What the examples have in common enters without a gradient."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.drop = kind, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.first(x))).float()
        if self.kind == "mean" or (self.kind == "training" and self.training):
            h = h - h.mean(0, keepdim=True).detach()
        if self.kind == "largest":
            scale = 127 / h.abs().max().detach()
            h = h + ((h * scale).round() / scale - h).detach()
        if self.kind == "router" and len(h) > 1:  # rounding tips it over for one example
            tied = torch.isin(x[:, 0, 0], data()["x"][1, 0, 0])
            h = h * (1 + 0.001 * tied)[:, None, None]
        if self.kind == "noise":
            h = h + 0.1 * torch.randn_like(h)
        if self.kind == "half":
            h = h.bfloat16()
        found: Tensor = self.second(h.double())
        return found


@pytest.mark.parametrize("kind", ["mean", "training", "largest"])
@pytest.mark.parametrize("engine", ["auto", "two_pass"])
def test_examples_that_influence_one_another_without_a_gradient_are_refused(
    kind: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Coupled(kind).train(kind == "training")
    model.drop.p = 0.5
    with pytest.raises(ConfigurationError, match="does not depend on its batch mates"):
        book_kept(model, data(), engine=engine_named(engine))
    monkeypatch.setattr(settle, "check_mates", lambda *_: None)  # planted: nothing is compared
    if kind != "training":
        found = book_kept(model, data(), engine=engine_named(engine))
        with pytest.raises(AssertionError):
            assert_same_sum(found, naive(model, data(), C, squares), 1e-4)


class WithHead(nn.Module):
    """A body that is frozen by `eval()`, and a head that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Net(), Coupled("training")
        self.body.requires_grad_(False)
        self.eval()
        self.head.train()
        self.head.drop.p = 0.0

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(x))
        return found


@pytest.mark.parametrize("engine", ["auto", "two_pass", "book_keeping"])
def test_a_head_alone_in_training_mode_is_looked_at_in_that_mode(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match=r"head.*batch mates"):
        book_kept(WithHead(), data(), engine=engine_named(engine))
    by_the_root: Any = lambda model: (False, True)[: 1 + model.training]  # noqa: E731
    monkeypatch.setattr(mates, "modes_of", by_the_root)  # planted
    monkeypatch.setattr("hf_dp.engines.recorder.Ends.show", lambda _: False)
    model = WithHead()
    found = book_kept(model, data(), engine=engine_named(engine))
    with pytest.raises(AssertionError):
        assert_same_sum(found, naive(model, data(), C, squares), 1e-4)


def test_a_mode_that_some_module_is_put_in_later_is_looked_at_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hf_dp.engines.recorder.Ends.show", lambda _: False)
    model, engine = WithHead().eval(), BookKeepingEngine()
    book_kept(model, data(), engine=engine)
    model.head.train()
    with pytest.raises(ConfigurationError, match="batch mates"):
        book_kept(model, data(), engine=engine)


class Merging(nn.Linear):
    """Merges its adapter into the frozen weight in evaluation mode, as loralib's layers do."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))
        self.weight.requires_grad_(False)
        self.merged = False
        self.double()

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (self.up @ self.down).detach() * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.merged else out + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("engine", ["auto", "two_pass", "book_keeping"])
def test_a_look_at_evaluation_mode_calls_nobodys_eval(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked_at() -> tuple[Merging, Any, Any, Tensor]:
        torch.manual_seed(0)
        layer = Merging().train()
        weight, expected = layer.weight.clone(), naive(layer, {"input": data()["x"]}, C, of_input)
        found = book_kept(layer, {"input": data()["x"]}, of_input, engine_named(engine))
        return layer, found, expected, weight

    layer, found, expected, weight = looked_at()
    assert_same_sum(found, expected, 1e-10)
    assert not layer.merged
    assert torch.equal(layer.weight, weight)
    monkeypatch.setattr("hf_dp.engines.probe.evaluation_flags", lambda model: model.eval())
    layer, found, expected, _ = looked_at()  # planted
    assert layer.merged
    with pytest.raises(AssertionError):
        assert_same_sum(found, expected, 1e-2)


def of_input(model: nn.Module, inputs: Batch) -> Tensor:
    losses: Tensor = model(inputs["input"]).square().flatten(1).sum(1)
    return losses


class StartsAtZero(Net):
    """What the examples have in common reaches the losses through a factor that is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 6, bias=False).double()
        nn.init.zeros_(self.gate.weight)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x) + self.gate(10 * (x - x.mean(0, keepdim=True)))
        return found


def test_what_waits_behind_a_zero_is_seen_in_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="batch mates"):
        book_kept(StartsAtZero(), data())
    monkeypatch.setattr(mates._Mates, "gradient_gaps", mates._Mates.loss_gaps)
    found = book_kept(StartsAtZero(), data())  # planted: only losses are compared
    with pytest.raises(AssertionError):
        assert_same_sum(found, naive(StartsAtZero(), data(), C, squares), 1e-4)


@pytest.mark.parametrize("kind", ["", "router", "noise", "half"])
@pytest.mark.parametrize("training", [True, False])
def test_draws_and_rounding_are_no_influence(kind: str, training: bool) -> None:
    model, engine = Coupled(kind).train(training), BookKeepingEngine()
    summed = book_kept(model, data(), engine=engine)
    assert bool(torch.isfinite(summed.norms).all())
    assert engine.recorder.coverage(model).compared


def weighted_by_the_batch(model: nn.Module, inputs: Batch) -> Tensor:
    losses = squares(model, inputs)
    found: Tensor = losses / losses.detach().mean()
    return found


def test_another_loss_is_compared_anew() -> None:
    model, engine = Net(), BookKeepingEngine()
    book_kept(model, data(), engine=engine)
    with pytest.raises(ConfigurationError, match="batch mates"):
        book_kept(model, data(), weighted_by_the_batch, engine)


class Weighted:
    """A loss that one setting makes a mean over the batch."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, model: nn.Module, inputs: Batch) -> Tensor:
        losses = squares(model, inputs)
        found: Tensor = losses / (1 + self.share * (losses.detach().mean() - 1))
        return found


def closed_over(share: float) -> ExampleLoss:
    return lambda model, inputs: Weighted(share)(model, inputs)


@pytest.mark.parametrize(
    "make",
    [Weighted, closed_over, lambda share: functools.partial(weighted, share=share)],
    ids=["object", "closure", "partial"],
)
def test_another_setting_of_a_loss_is_compared_anew(make: Any) -> None:
    model, engine = Net(), BookKeepingEngine()
    book_kept(model, data(), make(0.0), engine)
    with pytest.raises(ConfigurationError, match="batch mates"):
        book_kept(model, data(), make(1.0), engine)
    with pytest.raises(ConfigurationError, match="Refused before"):  # what is set can be set back
        book_kept(model, data(), make(0.0), engine)


def weighted(model: nn.Module, inputs: Batch, share: float) -> Tensor:
    return Weighted(share)(model, inputs)


def test_a_loss_that_is_made_anew_at_each_step_is_looked_at_in_detail_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[int] = []
    monkeypatch.setattr(settle, "check_mates", lambda *_: compared.append(1))
    model, engine = Net(), BookKeepingEngine()
    for step in range(40):
        book_kept(model, data(), lambda m, b, step=step: squares(m, b) + step, engine)
    assert len(compared) == 1


def test_what_was_refused_stays_refused() -> None:
    """A batch that is harmless shows nothing of those to come."""
    model, engine = Net(), BookKeepingEngine()
    same = {"x": data()["x"][:1].repeat(4, 1, 1)}  # of equal losses each is its own mean
    for inputs in (data(), same):
        with pytest.raises(ConfigurationError, match="batch mates"):
            book_kept(model, inputs, weighted_by_the_batch, engine)
    book_kept(model, same, weighted_by_the_batch, BookKeepingEngine())  # which alone shows nothing


def test_gradients_that_are_all_rounding_show_nothing() -> None:
    """A model that still equals the one it learns from has a large loss and no gradient."""
    torch.manual_seed(0)
    student, inputs = Net().float(), {"x": data()["x"].float()}
    teacher = student(inputs["x"]).detach()

    def distilled(model: nn.Module, batch: Batch) -> Tensor:
        mine = model(batch["x"])
        theirs = torch.stack(
            [teacher[(inputs["x"] == one).all((1, 2)).nonzero()[0, 0]] for one in batch["x"]]
        )
        entropy = -(theirs.softmax(-1) * mine.log_softmax(-1)).sum((1, 2))
        cosine = 1 - torch.cosine_similarity(mine, theirs, -1).mean(1)
        found: Tensor = entropy + cosine
        return found

    check_mates(student, inputs, distilled)
