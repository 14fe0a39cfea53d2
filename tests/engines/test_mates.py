"""Losses that look at the batch show it, whatever they look for; rounding of one example is none of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_zoo import Batch, assert_same_sum, naive
from torch import Tensor, nn
from toy_nets import C, Net, book_kept, data, squares

from hf_dp.engines import engine_named, mates
from hf_dp.engines.base import ExampleLoss
from hf_dp.engines.mates import check_mates
from hf_dp.errors import ConfigurationError

Weights = Callable[[Tensor], Tensor]
"""Losses ``(B,)`` -> what each counts."""


def hardest(count: int, *, lowest: bool = False) -> Weights:
    def weights(losses: Tensor) -> Tensor:
        kept = losses.topk(min(count, len(losses)), largest=not lowest).indices
        return torch.zeros_like(losses).index_fill(0, kept, 1.0)

    return weights


def of_share(share: float) -> Weights:
    return lambda losses: hardest(max(1, round(share * len(losses))))(losses)


def advantages(losses: Tensor) -> Tensor:
    apart = losses - losses.mean()
    found: Tensor = apart / ((apart.square().sum() / torch.tensor(len(losses) - 1)).sqrt() + 1e-6)
    return found  # of one example alone: no number


OTHERS: dict[str, Weights] = {
    "above the mean": lambda losses: (losses > losses.mean()).double(),
    "not below the mean": lambda losses: (losses >= losses.mean()).double(),
    "above the median": lambda losses: (losses > losses.median()).double(),
    "not below the median": lambda losses: (losses >= losses.median()).double(),
    "share of the sum": lambda losses: 1 / losses.sum(),
    "focal, normalised": lambda losses: (w := (1 - (-losses).exp()) ** 2) / w.sum(),
    "advantages": advantages,
    "advantages of numbers alone": lambda losses: advantages(losses).nan_to_num(1.0),
    "no outliers": lambda losses: (losses <= 1.9 * losses.mean()).double(),
}
FROM = {"not below the median": 3, "no outliers": 9}  # with fewer examples none is left out


def weighing(weights: Weights, *, gradient_alone: bool = False) -> ExampleLoss:
    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        losses = squares(model, inputs)
        counted = weights(losses.detach()).to(losses)
        if gradient_alone:
            return losses.detach() + (losses - losses.detach()) * counted
        return losses * counted

    return loss


def inputs_of(rows: int, seed: int = 0) -> Batch:
    """Rows with losses from 0.2 to a few, in no order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator)
    return {"x": data(rows)["x"][order]}


def refused(loss: ExampleLoss, inputs: Batch) -> bool:
    try:
        check_mates(Net(), inputs, loss)
    except ConfigurationError as error:
        return "batch mates" in str(error)
    return False


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_examples_that_are_kept_by_their_rank_are_refused(rows: int, lowest: bool) -> None:
    kept = [weighing(hardest(count, lowest=lowest)) for count in range(1, rows)]
    assert [refused(loss, inputs_of(rows)) for loss in kept] == [True] * len(kept)


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 8, 16])
def test_gradients_that_are_kept_by_rank_are_refused(rows: int) -> None:
    kept = [weighing(hardest(count), gradient_alone=True) for count in range(1, rows)]
    assert [refused(loss, inputs_of(rows)) for loss in kept] == [True] * len(kept)


@pytest.mark.parametrize(
    ("kind", "rows"),
    [(kind, n) for kind in OTHERS for n in (2, 3, 4, 5, 6, 9, 16) if n >= FROM.get(kind, 0)],
)
def test_weights_that_the_batch_gives_are_refused(kind: str, rows: int) -> None:
    assert refused(weighing(OTHERS[kind]), inputs_of(rows))


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_gradients_are_compared_where_losses_are_small(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = weighing(OTHERS["share of the sum"], gradient_alone=True)
    small: ExampleLoss = lambda model, inputs: scale * shared(model, inputs)  # noqa: E731
    assert refused(small, inputs_of(6))
    monkeypatch.setitem(mates._NO_LOSSES, "float32", 0.1)  # planted
    assert refused(small, inputs_of(6)) == (scale == 1.0)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.9])
def test_a_share_of_the_batch_is_refused_also_where_losses_are_nothing(share: float) -> None:
    inputs = inputs_of(12)
    inputs["x"][[1, 5, 6]] = 0.0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        losses = squares(model, batch) * batch["x"].abs().sum((1, 2)).sign()
        return losses * of_share(share)(losses.detach())

    assert refused(loss, inputs)


def test_examples_that_are_not_finite_make_no_difference_but_hide_none() -> None:
    inputs = inputs_of(8)
    inputs["x"][2] = torch.nan
    inputs["x"][3] = 1e200
    assert not refused(squares, inputs)
    for loss in (weighing(hardest(7)), weighing(hardest(3)), weighing(OTHERS["share of the sum"])):
        assert refused(loss, inputs)


HARMLESS: dict[str, Weights] = {
    "focal": lambda losses: (1 - (-losses).exp()) ** 2,
    "clamped": lambda losses: (losses < 1.0).double(),
    "none": torch.zeros_like,
    "some alike": lambda losses: torch.ones_like(losses),
}


@pytest.mark.parametrize("kind", HARMLESS)
@pytest.mark.parametrize("rows", [2, 3, 5, 16])
def test_weights_of_each_examples_own_are_taken(kind: str, rows: int) -> None:
    inputs = inputs_of(rows)
    if kind == "some alike":
        inputs["x"][1:] = inputs["x"][:1]
    assert not refused(weighing(HARMLESS[kind]), inputs)


def tipped(which: tuple[int, ...], inputs: Batch) -> ExampleLoss:
    """Some examples go another way among others than alone, as a router's do at a tie."""
    rows = inputs["x"][list(which), 0, 0]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        tie = torch.isin(batch["x"][:, 0, 0], rows)
        return squares(model, batch) * torch.where(tie & (len(tie) > 1), 1.1, 1.0)

    return loss


@pytest.mark.parametrize("rows", [3, 4, 8, 16])
def test_one_example_that_rounding_tips_over_is_taken_and_two_are_not(rows: int) -> None:
    inputs = inputs_of(rows)
    order = squares(Net(), inputs).argsort().tolist()
    for one in order:
        assert not refused(tipped((one,), inputs), inputs)
    assert refused(tipped((order[0], order[-1]), inputs), inputs)


def test_two_examples_have_no_one_to_take_their_place() -> None:
    inputs = inputs_of(2)
    assert refused(tipped((0,), inputs), inputs)


def test_what_is_tried_costs_little() -> None:
    calls: list[int] = []

    def counted(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(len(batch["x"]))
        return squares(model, batch)

    check_mates(Net().eval(), inputs_of(16), counted)
    assert calls.count(16) == 5  # one looks for draws, three compare losses, one compares gradients
    assert calls.count(1) == 16
    assert len(calls) == 21


def test_each_part_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: no second round; any rows instead of those at the ends; what is no number counts as none."""
    one_left_out, inputs = weighing(hardest(7), gradient_alone=True), inputs_of(8)
    with monkeypatch.context() as planted:
        planted.setattr(mates, "_ROUNDS", 0)
        assert not refused(one_left_out, inputs)
    middle = squares(Net(), inputs).argsort().tolist()[2:6]
    with monkeypatch.context() as planted:
        planted.setattr(mates, "_ends", lambda losses: middle)
        assert not refused(one_left_out, inputs)
    with monkeypatch.context() as planted:
        plain: Any = lambda one, other: (one - other).abs().nan_to_num(0, 0, 0)  # noqa: E731
        planted.setattr(mates, "apart", plain)
        assert not refused(weighing(OTHERS["advantages"]), inputs)


@pytest.mark.parametrize("engine", ["auto", "two_pass", "book_keeping"])
def test_no_engine_sums_what_is_kept_by_rank(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, inputs = weighing(hardest(4)), inputs_of(5)
    with pytest.raises(ConfigurationError, match="batch mates"):
        book_kept(Net(), inputs, kept, engine_named(engine))
    monkeypatch.setattr("hf_dp.engines.settle.check_mates", lambda *_: None)  # planted
    with pytest.raises(AssertionError):
        assert_same_sum(
            book_kept(Net(), inputs, kept, engine_named(engine)),
            naive(Net(), inputs, C, kept),
            1e-3,
        )
