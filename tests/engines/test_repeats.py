"""A module that is run again for one example must give what it gave it among others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_zoo import Batch, assert_same_sum, naive
from torch import Tensor, nn
from toy_nets import C, squares

from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine, TwoPassEngine, engine_named
from hf_dp.layers import generic
from hf_dp.layers.base import FIRST, FOLDED, SHARED, UnitAxis
from hf_dp.layers.generic import GenericRule
from hf_dp.layers.recognise_experts import experts_of
from hf_dp.layers.repeats import Marks, UnrepeatedError
from hf_dp.layers.whole import WholeCall

KINDS = [BookKeepingEngine, TwoPassEngine]


class Matrix(nn.Module):
    """Gets examples in either order and gives them back in theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor, turned: bool) -> Tensor:
        found = torch.tanh(x @ self.weight)
        return found.flip(0) if turned else found


class Table(nn.Embedding):
    """The same of a table, whose forward does more than look up."""

    def forward(self, x: Tensor, turned: bool) -> Tensor:  # type: ignore[override]
        found = super().forward((x * 3).long().sum(2) % 7) * 2
        return found.flip(0) if turned else found


class Fused(nn.Module):
    """The same of experts, recognised by their twin, which knows no large numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 6, 4))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(3):
            token, slot = torch.where(index == e)
            gate, linear = (x[token] @ self.up[e].T).chunk(2, dim=-1)
            y = (self.act_fn(gate) * linear) @ self.down[e].T
            out = out.index_add(0, token, y * weights[token, slot, None])
        if x.amax() > 50:  # three tokens for each example
            out = out.view(-1, 3, 6).flip(0).flatten(0, 1)
        return out


class Turned(nn.Module):
    """Turns the examples round if one of them holds a large number."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = {"matrix": Matrix, "table": lambda: Table(7, 6), "experts": Fused}
        self.kind, self.inner, self.head = kind, inner[kind](), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        turned = bool(x.amax() > 50)
        given = x.flip(0) if turned else x
        if self.kind == "experts":
            rows = given.flatten(0, 1)
            index = (rows.abs() * 100).long()[:, :1] % 3
            hidden = self.inner(rows, index, rows[:, 1:2]).view_as(x)
        else:
            hidden = self.inner(given, turned)
        found: Tensor = self.head(hidden)
        return found


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    first, later = torch.rand(2, 4, 3, 6, generator=generator, dtype=torch.float64)
    later[0, 0, 0] = 60.0
    return [{"x": first}, {"x": later}]


def summed(engine: Any, model: nn.Module, inputs: Batch) -> Any:
    return engine.clipped_sum(model, inputs, example_loss=squares, clipping=FlatClipping(C))


@pytest.fixture(params=["vectorised", "one by one", "recomputed", "lookup", "experts"])
def turned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Turned]:
    """Every way of the generic rule, and a model whose examples go it in either order."""
    if request.param == "one by one":
        monkeypatch.setattr(GenericRule, "_vectorised", lambda self, call: None)
    if request.param == "recomputed":
        monkeypatch.setattr(generic, "MOST_HELD", 0)
    way: str = request.param
    return way, Turned({"lookup": "table", "experts": "experts"}.get(way, "matrix"))


@pytest.mark.parametrize("kind", [*KINDS, lambda: engine_named("auto")])
def test_examples_that_a_module_puts_back_in_order_are_not_mixed(
    turned: tuple[str, Turned], kind: Any
) -> None:
    (way, model), engine = turned, kind()
    first, later = batches()
    for inputs in (first, later, first):
        assert_same_sum(summed(engine, model, inputs), naive(model, inputs, C, squares), 1e-12)
    if hasattr(engine, "recorder"):
        points = engine.recorder.coverage(model).points
        assert {form for p in points if p.generic is not None for form in p.generic.forms} == {way}


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_check_they_are_mixed(
    turned: tuple[str, Turned], kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: nothing is compared."""
    monkeypatch.setattr(WholeCall, "check", lambda *_: None)
    monkeypatch.setattr("hf_dp.layers.lookup._COARSE", float("inf"))
    monkeypatch.setattr("hf_dp.layers.lookup._CLOSE", float("inf"))
    engine, (_, model) = kind(), turned
    first, later = batches()
    summed(engine, model, first)
    with pytest.raises(AssertionError):
        assert_same_sum(summed(engine, model, later), naive(model, later, C, squares), 1e-3)


def test_the_toy_experts_are_recognised() -> None:
    assert experts_of(Turned("experts").inner) is not None


class Masked(Turned):
    """Has one of its numbers, or other ones for each example, replaced as masks do."""

    def __init__(self, large: float, each: bool) -> None:
        super().__init__("matrix")
        self.large, self.each, self.inner = large, each, MaskedMatrix().double()

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape, dtype=torch.bool)
        mask[..., -1] = True
        if self.each:
            mask[..., :3] |= x[..., :1] > 0.5
            mask[..., 2:] |= x[..., :1] < 0.3
        turned = bool(x.amax() > 50)
        given = x.flip(0) if turned else x
        logits = self.inner(given, turned, mask, self.large)
        return logits.softmax(-1) * 10 * x.clamp_max(1)


class MaskedMatrix(Matrix):
    def forward(self, x: Tensor, turned: bool, mask: Tensor, large: float) -> Tensor:  # type: ignore[override]
        return super().forward(x, turned).masked_fill(mask, large)


class Sorts(Turned):
    """Has the examples turned round from the first on, but for a batch of one."""

    def forward(self, x: Tensor) -> Tensor:
        turned = len(x) > 1 and bool(x[0, 0, 0] > x[-1, 0, 0])
        found: Tensor = self.head(self.inner(x.flip(0) if turned else x, turned))
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_above_answers_where_the_first_examples_show_it(kind: Any) -> None:
    model, engine = Sorts("matrix"), kind()
    inputs = {"x": batches()[0]["x"].sort(0, descending=True).values}
    assert_same_sum(summed(engine, model, inputs), naive(model, inputs, C, squares), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("large", [-1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("each", [False, True])
def test_what_a_mask_puts_in_does_not_drown_the_rest(kind: Any, large: float, each: bool) -> None:
    """Planted: one magnitude only, as large as the mask's, and the test fails."""
    model, engine = Masked(large, each), engine_named("auto")
    for inputs in batches():
        assert_same_sum(summed(engine, model, inputs), naive(model, inputs, C, squares), 1e-12)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("large", [1e2, 1e4, 1e9])
def test_marks_see_beside_large_numbers_and_take_rounding(share: float, large: float) -> None:
    generator = torch.Generator().manual_seed(2)
    output = torch.randn(4, 40, 50, generator=generator, dtype=torch.float64)
    output[:, :, 7:9] = large * torch.randn(4, 40, 2, generator=generator)
    output[torch.rand(output.shape, generator=generator) < share] = -large
    other = torch.where(output.abs() < 9, output.flip(0), output)
    noise = torch.randn(output.shape, generator=generator)
    marks = Marks([output], [FIRST], 4)
    marks.check(marks.of_all([output * (1 + 1e-5 * noise)]), None, coarse=False, described="it")
    marks.check(marks.of_all([output * (1 + 4e-3 * noise)]), None, coarse=True, described="it")
    for coarse in (False, True):
        with pytest.raises(UnrepeatedError):
            marks.check(marks.of_all([other]), None, coarse=coarse, described="it")


AXES = [FIRST, UnitAxis(1), UnitAxis(2), FOLDED]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_marks_of_all_are_those_of_each(axis: UnitAxis, dtype: torch.dtype) -> None:
    output = torch.randn(8, 8, 8).to(dtype)
    units = 4 if axis.folded else 8
    each = list(output.unflatten(0, (4, 2)) if axis.folded else output.movedim(axis.dim or 0, 0))
    marks = Marks([output], [axis], units)

    def check(outputs: list[Tensor], *, coarse: bool) -> None:
        for unit, one in enumerate(outputs):
            marks.check(
                marks.of_unit([one], torch.tensor(unit)), unit, coarse=coarse, described="it"
            )
        [stacked] = torch.func.vmap(lambda one, unit: marks.of_unit([one], unit))(
            torch.stack(outputs), torch.arange(units)
        )
        marks.check([stacked], None, coarse=coarse, described="it")
        marks.check(marks.of_all([torch.stack(outputs)]), None, coarse=coarse, described="it")

    check(each, coarse=False)
    others = [each[::-1], [one * torch.nan for one in each], [-one for one in each]]
    others += [[each[1], each[0], *each[2:]], [one.flip(0) for one in each]]
    for other in others:
        with pytest.raises(UnrepeatedError, match="it may sort examples"):
            check(other, coarse=True)


def test_marks_compare_what_is_not_finite_and_see_beside_it() -> None:
    output = torch.randn(3, 5, 4)
    output[:, 0], output[:, 1] = -torch.inf, torch.finfo(torch.float32).min
    output[0, 2] = torch.nan
    marks = Marks([output, output.sum()], [FIRST, SHARED], 3)
    for unit in range(3):
        found = marks.of_unit([output[unit][None], output[unit].sum()], torch.tensor(unit))
        marks.check(found, unit, coarse=False, described="it")
    for other in (output.flip(0), output[:, :2]):
        found = marks.of_unit([other[2][None], other.sum()], torch.tensor(2))
        with pytest.raises(UnrepeatedError):
            marks.check(found, 2, coarse=True, described="it")
