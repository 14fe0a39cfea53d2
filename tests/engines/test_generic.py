"""The generic rule's ways: vectorised, one by one, recomputed, looked up; each exact, none trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_zoo import Batch, assert_same_sum, difference, length, naive, own_losses
from family_zoo import batch, build
from influence import ROUNDING
from torch import Tensor, nn
from toy_nets import C, Net, book_kept, data, squares

from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine, TwoPassEngine
from hf_dp.engines.coverage import Coverage
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers import generic, lookup
from hf_dp.layers.generic import GenericRule, Recomputed
from hf_dp.layers.whole import WholeCall
from hf_dp.sums import ClippedSum

WAYS = ["vectorised", "one by one", "recomputed"]


class Gains(nn.Module):
    """A module of its own kind: two inputs, two outputs, a parameter of its own, a child with a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 2, 6, dtype=torch.float64))
        self.mix = nn.Parameter(torch.randn(6, 6, dtype=torch.float64) / 3)
        self.child = nn.Linear(6, 6).double()

    def forward(self, x: Tensor, *, other: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        hidden = self.child(x * self.gain) + other["y"] @ self.mix
        return hidden.cumsum(1) / other["scale"], [torch.tanh(hidden), x.mean(1) * self.gain]


class UsesGains(Net):
    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.gains, self.calls = Gains(), calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            a, (b, c) = self.gains(x, other={"y": x.flip(1), "scale": 3.0, "nothing": None})
            x = a + b * c[:, None]
        return super().forward(x)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All generic calls go one way."""
    if request.param == "one by one":
        monkeypatch.setattr(GenericRule, "_vectorised", lambda self, call: None)
    if request.param == "recomputed":
        monkeypatch.setattr(generic, "MOST_HELD", 0)
    name: str = request.param
    return name


def forms(coverage: Coverage) -> set[str]:
    each = [point.generic.forms for point in coverage.points if point.generic is not None]
    return set().union(*each)


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("kind", [BookKeepingEngine, TwoPassEngine])
def test_every_way_equals_the_loop(way: str, kind: type[BookKeepingEngine], calls: int) -> None:
    model, engine = UsesGains(calls), kind()
    for rows in (1, 4):
        found = engine.clipped_sum(
            model, data(rows=rows), example_loss=squares, clipping=FlatClipping(C)
        )
        assert_same_sum(found, naive(model, data(rows=rows), C, squares), 1e-12)
    assert forms(engine.recorder.coverage(model)) == {way}


@pytest.mark.parametrize("family", ["mixtral", "deberta-v2", "swin", "mamba", "beit", "whisper"])
def test_every_way_equals_the_loop_on_families(way: str, family: str) -> None:
    model, inputs = build(family, torch.float64), batch(family, dtype=torch.float64)
    expected = naive(model, inputs, C)
    for kind in (BookKeepingEngine, TwoPassEngine):
        found = kind().clipped_sum(model, inputs, example_loss=own_losses, clipping=FlatClipping(C))
        assert_same_sum(found, expected, 1e-12)


def test_a_gradient_of_rounding_alone_slows_nothing_down() -> None:
    """That of a key's bias in attention is zero: what is computed of it differs from way to way."""
    weight, bias, noise = torch.ones(6, 6), torch.full((6,), 1e-9), torch.full((6,), -2e-9)
    assert generic._agree([weight, noise], [weight, bias], coarse=False)
    assert not generic._agree([weight, bias + 1e-3], [weight, bias], coarse=False)
    assert not generic._agree([weight * 1.1, bias], [weight, bias], coarse=True)


POISONS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda x: torch.full_like(x, torch.nan),
    "inf": lambda x: torch.full_like(x, torch.inf),
    "1e30": lambda x: x * 1e30,
    "1e8": lambda x: x * 1e8,
    "zeros": torch.zeros_like,
    "1e-30": lambda x: x * 1e-30,
}


@pytest.mark.parametrize("poison", POISONS)
def test_one_example_moves_the_sum_by_at_most_the_sensitivity(way: str, poison: str) -> None:
    model, inputs, engine = UsesGains().float(), {"x": data()["x"].float()}, BookKeepingEngine()
    book_kept(model, inputs, engine=engine)
    without = {"x": inputs["x"][[0, 2, 3, 4]]}
    clean = book_kept(model, without, engine=engine)
    inputs["x"][1] = POISONS[poison](inputs["x"][1])
    whole = book_kept(model, inputs, engine=engine)
    assert all(torch.isfinite(grad).all() for grad in whole.grads.values())
    assert length(difference(whole.grads, clean.grads)) <= C * ROUNDING
    torch.testing.assert_close(whole.norms[[0, 2, 3, 4]], clean.norms, rtol=1e-5, atol=1e-6)


def test_an_example_whose_positions_cancel_is_bounded(way: str) -> None:
    inputs = {"x": data()["x"].float()}
    engine, model = BookKeepingEngine(), UsesGains().float()
    book_kept(model, inputs, engine=engine)
    inputs["x"][1] = 1e4 * torch.stack(
        [inputs["x"][1, 0], -inputs["x"][1, 0], inputs["x"][1, 1] / 1e4]
    )
    whole = book_kept(model, inputs, engine=engine)
    clean = book_kept(model, {"x": inputs["x"][[0, 2, 3, 4]]}, engine=engine)
    assert length(difference(whole.grads, clean.grads)) <= C * ROUNDING


# ---- what the generic rule refuses, or finds out for itself ------------------------------------------


class Opaque:
    """May hold tensors, as caches do."""


class Child(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.gain, self.what = nn.Parameter(torch.linspace(1, 2, 6).double()), what

    def forward(self, x: Tensor, aside: Any = None) -> Any:
        if self.what == "changes its input":
            return x.mul_(self.gain)
        if self.what == "returns a number for all":
            return self.gain.sum()
        out = x * self.gain
        return (out, Opaque()) if self.what == "returns something opaque" else out


class Parent(Net):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.child, self.what = Child(what), what

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "is given something opaque":
            return super().forward(self.child(x, Opaque()))
        if self.what == "is told how many there are":
            return super().forward(self.child(x, len(x)))
        out = self.child(torch.tanh(x))
        return super().forward(out[0] if isinstance(out, tuple) else x + out - out)


@pytest.mark.parametrize(
    "what",
    [
        "changes its input",
        "returns something opaque",
        "is given something opaque",
        "is told how many there are",
    ],
)
def test_a_module_that_cannot_be_run_again_hands_its_parameters_up(what: str) -> None:
    engine, model = BookKeepingEngine(), Parent(what)
    found = book_kept(model, data(), engine=engine)
    assert_same_sum(found, naive(model, data(), C, squares), 1e-12)
    points = engine.recorder.coverage(model).points
    assert [point.name for point in points if point.rule is None] == [""]


def test_a_module_that_vmap_gets_wrong_is_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the vectorised run drops half of the gradient."""
    right = WholeCall.vmapped_grads
    monkeypatch.setattr(WholeCall, "vmapped_grads", lambda self: [g / 2 for g in right(self)])
    engine, model = BookKeepingEngine(), UsesGains()
    assert_same_sum(
        book_kept(model, data(), engine=engine), naive(model, data(), C, squares), 1e-12
    )
    assert forms(engine.recorder.coverage(model)) == {"one by one"}


def test_a_lookup_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the lookup forgets what the forward does after it."""
    right = lookup.lookup

    def wrong(call: WholeCall) -> Any:
        factor = right(call)
        factor.rows = factor.rows * 2
        return factor

    monkeypatch.setattr(lookup, "lookup", wrong)
    model, inputs = build("gemma3"), batch("gemma3")
    engine = BookKeepingEngine()
    found = engine.clipped_sum(model, inputs, example_loss=own_losses, clipping=FlatClipping(C))
    assert_same_sum(found, naive(model, inputs, C), 1e-5)
    assert "lookup" not in forms(engine.recorder.coverage(model))


@pytest.mark.parametrize("fault", ["stale", "other unit", "dropped position", "other parameters"])
def test_a_planted_fault_in_the_second_run_is_caught(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = WholeCall.unit_grads
    kept: dict[int, list[Tensor]] = {}

    def wrong(self: WholeCall, unit: int) -> list[Tensor]:
        if fault == "stale":
            return kept.setdefault(unit % 2, right(self, unit))
        if fault == "other unit":
            return right(self, (unit + 1) % self.num_units)
        if fault == "dropped position":
            grads = self.output_grads
            self.output_grads = [g if g is None else g * (g != g[:, :1]) for g in grads]
            found = right(self, unit)
            self.output_grads = grads
            return found
        return [torch.zeros_like(grad) for grad in right(self, unit)]

    monkeypatch.setattr(WholeCall, "unit_grads", wrong)
    monkeypatch.setattr(GenericRule, "_vectorised", lambda self, call: None)
    monkeypatch.setattr("hf_dp.engines.vectorised.refuse_lost", lambda *_: None)
    found = book_kept(UsesGains(), data())
    with pytest.raises(AssertionError):
        assert_same_sum(found, naive(UsesGains(), data(), C, squares), 1e-3)


# ---- factors that are computed twice ---------------------------------------------------------------


class _Wavering:
    """A source whose second answers are longer than its first, as no accelerator would be."""

    num_units = 3

    def __init__(self) -> None:
        self.calls = 0

    def unit_grads(self, unit: int) -> list[Tensor]:
        self.calls += 1
        return [torch.ones(4) * (unit + 1) * (1 if self.calls <= 3 else 2)]

    parameters = (nn.Parameter(torch.zeros(4)),)


def test_a_share_is_never_longer_than_the_norm_it_was_weighted_by() -> None:
    source = generic._PerUnit(_Wavering())  # type: ignore[arg-type]
    factor = Recomputed(source, 0)
    norms = factor.squared_norm().sqrt()
    for unit in range(3):
        weights = torch.zeros(3)
        weights[unit] = 1 / norms[unit]
        assert float(factor.weighted_sum(weights).norm()) <= 1 + 1e-6


def test_dropped_units_are_not_even_computed() -> None:
    class Asked(_Wavering):
        units: list[int] = []  # noqa: RUF012

        def unit_grads(self, unit: int) -> list[Tensor]:
            self.units.append(unit)
            return super().unit_grads(unit)

    asked = Asked()
    factor = Recomputed(generic._PerUnit(asked), 0)  # type: ignore[arg-type]
    factor.squared_norm()
    asked.units.clear()
    clean = factor.without(torch.tensor([False, True, False]))
    clean.weighted_sum(torch.ones(3))
    assert asked.units == [0, 2]
    assert float(clean.squared_norm()[1]) == 0
    assert torch.equal(clean.dense().values[1], torch.zeros(4))


def test_an_uncovered_output_names_the_module() -> None:
    class Total(Net):
        def __init__(self) -> None:
            super().__init__()
            self.child = Child("returns a number for all")

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.child(x)

    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        return squares(model, inputs) + model.get_submodule("child")(inputs["x"])

    with pytest.raises(UncoveredParameterError, match="child"):
        book_kept(Total(), data(), loss)


def test_a_parameter_that_is_also_reached_unregistered_is_refused() -> None:
    class Behind(Net):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(6).double())
            self.behind = [self.gain]  # not under its name

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.gain) * self.behind[0]

    with pytest.raises(
        UncoveredParameterError, match="under the names that they are registered by"
    ):
        book_kept(Behind(), data())
    with pytest.MonkeyPatch.context() as patch:  # planted: nobody asks; then the sum is wrong
        patch.setattr(WholeCall, "misses", lambda self: False)
        with pytest.raises(UncoveredParameterError, match="expected its whole gradient"):
            book_kept(Behind(), data())
        patch.setattr("hf_dp.engines.vectorised.refuse_lost", lambda *_: None)
        found = book_kept(Behind(), data())
    with pytest.raises(AssertionError):
        assert_same_sum(found, naive(Behind(), data(), C, squares), 1e-3)


def test_the_result_is_a_clipped_sum() -> None:
    assert isinstance(book_kept(UsesGains(), data()), ClippedSum)
