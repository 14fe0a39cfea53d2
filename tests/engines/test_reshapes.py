"""Reshapes that put examples on an axis that does not grow with the batch are seen, and others let pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_zoo import Batch, assert_same_sum, naive
from test_moving import graph, twins_of
from torch import Tensor, nn

from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine, GradientEngine
from hf_dp.engines.reshapes import growth, strays
from hf_dp.errors import UncoveredParameterError
from hf_dp.sums import ClippedSum

pytestmark = pytest.mark.usefixtures("taken_as_familiar")

D = 4
C = 0.3
SIZES = [(2, 6), (3, 6), (4, 12), (6, 12), (6, 6), (3, 18), (2, 1), (4, 8)]  # B, T


def owners_after(given: tuple[int, ...], out: tuple[int, ...], units: int) -> Tensor:
    """Whose each number of what came out is; the axis ``-u`` is B * u long, an example's u together."""
    axis = next(number for number, length in enumerate(given) if length < 0)
    before, after = ([-n * units if n < 0 else n for n in shape] for shape in (given, out))
    owners = torch.arange(units).repeat_interleave(-given[axis])
    return owners.view(-1, *[1] * (len(given) - axis - 1)).expand(before).reshape(after)


APART = [
    ((-1, 6, 4), (-6, 4)),
    ((-6, 4), (-1, 6, 4)),
    ((-1, 6, 4), (-24,)),
    ((-1, 6, 4), (-3, 8)),
    ((-1, 6, 4), (1, -6, 4)),
    ((-2, 6, 4), (-1, 2, 3, 8)),
    ((6, -1, 4), (6, -2, 2)),
    ((6, -1, 4), (3, 2, -4)),
    ((4, 6, -1), (24, -1)),
    ((4, 6, -2), (4, 6, -1, 2)),
]
MIXED = [
    ((-1, 6, 4), (6, -4)),
    ((-1, 6, 4), (6, -1, 4)),
    ((-1, 6, 4), (3, -8)),
    ((-6, 4), (6, -4)),
    ((-6, 4), (6, -1, 4)),
    ((6, -1, 4), (-1, 24)),
    ((6, -1, 4), (-2, 12)),
    ((-2, 6, 4), (2, -6, 4)),
    ((4, 6, -2), (4, 6, 2, -1)),
]


@pytest.mark.parametrize(("given", "out"), [*APART, *MIXED])
def test_lengths_tell_where_the_examples_went(given: tuple[int, ...], out: tuple[int, ...]) -> None:
    """Against each number's owner, which must be the same along every axis that does not grow."""
    grows = tuple(tuple(i for i, n in enumerate(shape) if n < 0) for shape in (given, out))
    for units in (2, 3, 6, 12):
        owners = owners_after(given, out, units).movedim(grows[1][0], 0)
        owners = owners.reshape(len(owners), -1)
        mixed = bool((owners != owners[:, :1]).any())
        assert mixed is ((given, out) in MIXED)
        reshape = sized(given, units), sized(out, units)
        assert growth((sized(given, 2), sized(out, 2)), (sized(given, 3), sized(out, 3))) == grows
        assert strays(reshape, (grows[0], grows[1]), units) is mixed


def sized(shape: tuple[int, ...], units: int) -> tuple[int, ...]:
    return tuple(-n * units if n < 0 else n for n in shape)


def test_what_is_not_known_strays() -> None:
    reshape = (4, 6), (6, 4)
    assert growth(reshape, ((4, 6, 1), (6, 4))) == (None, ())
    assert strays(reshape, (None, (1,)), 2)
    assert strays(reshape, ((1,), None), 2)
    assert strays(reshape, ((0,), ()), 2)  # where did they go?
    assert strays(reshape, ((0,), (0, 1)), 2)
    assert strays(((9, 4), (3, 12)), ((0,), (0,)), 4)  # not as many rows for each
    assert not strays(((9, 4), (9, 2, 2)), ((0,), (0,)), 4)
    assert not strays(reshape, ((), ()), 2)


def test_positions_that_were_put_first_count_as_astray() -> None:
    """Folded behind them an example's rows are apart, which no later reshape would tell."""
    assert strays(((6, 3, 4), (18, 4)), ((1,), (0,)), 3)


@pytest.mark.parametrize(("units", "positions"), SIZES)
def test_what_is_arranged_along_an_axis_that_hides_examples_is_seen(
    units: int, positions: int
) -> None:
    def sorted_rows(hidden: Tensor) -> Tensor:
        rows = hidden.reshape(hidden.shape[1], -1)
        return rows[rows.detach().sum(1).argsort()]

    twins = [*twins_of(sorted_rows, 6), *twins_of(sorted_rows, 12), *twins_of(sorted_rows, 1)]
    for known in ([], twins, twins[:1], twins[2:]):
        assert graph(sorted_rows, units, known, positions).by_content


HARMLESS: dict[str, Callable[[Tensor], Tensor]] = {
    "flattened": lambda h: h.reshape(-1, h.shape[-1]).view(h.shape).sort(1)[0],
    "heads": lambda h: (
        h.view(*h.shape[:2], 3, 4).transpose(1, 2).softmax(2).transpose(1, 2).reshape(h.shape)
    ),
    "heads folded": lambda h: (
        h.view(*h.shape[:2], 3, 4).transpose(1, 2).reshape(-1, h.shape[1], 4).cumsum(1)
    ),
    "windows": lambda h: h.reshape(-1, 3, h.shape[-1]).sort(1)[0].reshape(h.shape),
    "all of an example": lambda h: h.reshape(len(h), -1).sort(1)[0],
    "positions first": lambda h: h.transpose(0, 1).reshape(h.shape[1], -1, 4).cumsum(0).sum((0, 2)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_reshapes_that_keep_examples_apart_cost_nothing(name: str) -> None:
    compute = HARMLESS[name]
    twins = twins_of(compute)
    for units in (2, 3, 4, 6, 12):
        for positions in (6, 12):
            assert not graph(compute, units, twins, positions).by_content


class SortsChunks(nn.Module):
    """Turns as many chunks of the whole batch round as it has positions, once a number is large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below, self.above = nn.Linear(D, D), nn.Linear(D, D)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        rows = self.below(x).tanh().reshape(x.shape[1], -1)
        order = torch.arange(len(rows))
        order = order.flip(0) if bool(x.abs().max() > 5) else order
        found = self.above(rows[order].reshape(x.shape))
        losses: Tensor = found.square().sum((1, 2))
        return losses


def loss_of(model: nn.Module, inputs: Batch) -> Tensor:
    found: Tensor = model(inputs["x"])
    return found


@pytest.mark.parametrize(("units", "positions"), [(2, 6), (3, 6), (6, 6), (4, 12), (6, 12)])
def test_a_later_batch_that_moves_them_is_refused(
    units: int, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    calm = {"x": 0.1 * torch.randn(units, positions, D, generator=generator).double()}
    wild = {"x": 100 * calm["x"]}

    def summed(engine: GradientEngine, inputs: Batch) -> ClippedSum:
        return engine.clipped_sum(model, inputs, example_loss=loss_of, clipping=FlatClipping(C))

    model, engine = SortsChunks(), BookKeepingEngine()
    summed(engine, calm)
    with pytest.raises(UncoveredParameterError):
        summed(engine, wild)
    monkeypatch.setattr("hf_dp.engines.by_content.strays", lambda *_: False)  # planted
    model, engine = SortsChunks(), BookKeepingEngine()
    summed(engine, calm)
    with pytest.raises(AssertionError):
        assert_same_sum(summed(engine, wild), naive(model, wild, C, loss_of), 1e-3)
