"""Clipping in the L1 norm: exact sums, and no example moves one by more than the bound, in L1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from engine_zoo import (
    Batch,
    assert_same_sum,
    batch,
    build,
    build_lora,
    difference,
    half_clipped,
    length,
    naive,
    own_losses,
)
from influence import ENGINES, ROUNDING, C, Inner, Tied, clipped, draws, joined, moved, of_rows
from test_adversarial import POISONS, as_embeddings, without
from torch import Tensor, nn
from toy_nets import Net, data, squares
from user_loop import by_users

from hf_dp.clipping import FlatClipping, LossRelease
from hf_dp.engines import (
    BookKeepingEngine,
    TwoPassEngine,
    engine_named,
    powers,
    two_pass,
    written_out,
)
from hf_dp.engines.base import ExampleLoss
from hf_dp.engines.owners import Owners
from hf_dp.engines.preflight import preflight
from hf_dp.errors import PrivacyError
from hf_dp.events import Norm
from hf_dp.layers.per_unit import Total, Vec, squares_of_rows, sum_of

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2-lm": lambda: build("gpt2-lm", torch.float64),  # embedding and head share a weight
    "bert-cls": lambda: build("bert-cls", torch.float64),
    "albert-cls": lambda: build("albert-cls", torch.float64),  # its layers are one, three times
    "llama-lm": lambda: build_lora("llama-lm", torch.float64),
}


class Again(Net):
    """One layer is called twice, and its weight added once more by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))


def in_float64(name: str) -> Batch:
    found: Batch = batch(name)
    return {k: v.double() if v.is_floating_point() else v for k, v in found.items()}


def check(model: nn.Module, inputs: Batch, loss: ExampleLoss, engines: Sequence[str]) -> None:
    bound = half_clipped(naive(model, inputs, 1.0, loss, 1).norms)
    expected = naive(model, inputs, bound, loss, 1)
    assert length(expected.grads) != pytest.approx(
        length(naive(model, inputs, bound, loss).grads), rel=1e-3
    )  # another norm, another sum
    for engine in engines:
        found = clipped(engine, model, inputs, loss, clipping_norm=bound, norm="l1")
        assert_same_sum(found, expected, 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_sums_are_those_of_the_loop(name: str, engine: str) -> None:
    check(MODELS[name](), in_float64(name), own_losses, [engine])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_called_twice_counts_once(engine: str) -> None:
    check(Again(), data(), squares, [engine])


@pytest.mark.parametrize("engine", ["book_keeping", "two_pass"])
@pytest.mark.parametrize("cancelling", [False, True])
def test_tied_parts_are_added_before_absolute_values_are_taken(
    engine: str, cancelling: bool
) -> None:
    model = Tied().double()
    inputs = {
        "ids": torch.arange(6).view(2, 3),
        "a": draws(2, 3, 40, seed=1).double(),
        "x": draws(2, 3, 40, seed=2).double(),
        "g": draws(2, 3, 50, seed=3).double(),
    }
    if cancelling:  # what the head adds is what the embedding takes away
        inputs["x"] = -inputs["a"]
        inputs["g"] = nn.functional.one_hot(inputs["ids"], 50).double()
        found = clipped(engine, model, inputs, norm="l1")
        assert float(found.norms.max()) <= 1e-12
        return
    check(model, inputs, of_rows, [engine])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("engine", ENGINES)
def test_users_are_clipped_as_one(engine: str, reduction: Any) -> None:
    model, inputs, sizes = build("gpt2-lm", torch.float64), batch("gpt2-lm"), (2, 1, 2)
    free = by_users(model, inputs, sizes, 1.0, reduction=reduction, order=1)
    bound = half_clipped(free.norms)
    expected = by_users(model, inputs, sizes, bound, reduction=reduction, order=1)
    found = engine_named(engine).clipped_sum(
        model,
        inputs,
        example_loss=own_losses,
        clipping=FlatClipping(bound, "l1"),
        owners=Owners(sizes, reduction),
    )
    assert_same_sum(found, expected, 1e-12)


@pytest.mark.parametrize("release", [None, LossRelease(share=0.3, ceiling=1.0)])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("poison", POISONS)
def test_one_example_moves_a_sum_by_at_most_the_bound(
    poison: str, engine: str, release: LossRelease | None
) -> None:
    model, inputs = as_embeddings("bert-cls")
    clean = clipped(engine, model, without(inputs, 1), own_losses, norm="l1", release=release)
    inputs["inputs_embeds"][1:2] = POISONS[poison](inputs["inputs_embeds"][1:2])
    whole = clipped(engine, model, inputs, own_losses, norm="l1", release=release)
    change = length(difference(joined(whole), joined(clean)), 1)
    assert change <= C * ROUNDING
    assert all(torch.isfinite(value).all() for value in joined(whole).values())
    if poison in ("nan", "one nan", "inf", "minus inf"):
        assert not torch.isfinite(whole.norms[1])
        assert change <= 1e-5 * length(joined(clean), 1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18, 1e30, 1e36])
def test_any_scale_of_gradients_is_bounded(scale: float, engine: str) -> None:
    inputs = {"x": draws(4, 5, 64, seed=1), "g": draws(4, 5, 64, seed=2)}
    inputs["g"][2] *= scale
    change = length(moved(engine, Inner(), inputs, 2, norm="l1"), 1)
    assert change <= C * ROUNDING
    if 1 <= scale <= 1e30:
        assert change == pytest.approx(C, rel=1e-5)  # clipped, though its square is infinite


@pytest.mark.parametrize("engine", ENGINES)
def test_examples_with_nothing_to_predict_or_of_length_zero_add_nothing(engine: str) -> None:
    model, inputs = build("gpt2-lm"), batch("gpt2-lm")
    inputs["labels"] = inputs["labels"].index_fill(0, torch.tensor([1]), -100)
    assert length(moved(engine, model, inputs, 1, own_losses, norm="l1"), 1) <= 1e-6
    nothing = {"x": torch.zeros(2, 0, 64), "g": torch.zeros(2, 0, 64)}
    found = clipped(engine, Inner(), nothing, norm="l1")
    assert found.norms.tolist() == [0.0, 0.0]
    assert length(found.grads, 1) == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_long_gradients_of_one_sign_stay_within_the_bound(engine: str) -> None:
    model = Inner(1000, 2000)  # added in float32 one by one, two million numbers lose a percent
    inputs = {"x": torch.full((2, 1, 2000), 0.1), "g": torch.full((2, 1, 1000), 0.7)}
    share = clipped(engine, model, inputs, norm="l1")
    assert float(share.norms[0]) == pytest.approx(2e6 * 0.07, rel=1e-6)
    assert length(share.grads, 1) <= 2 * C * ROUNDING


@pytest.mark.parametrize("engine", ENGINES)
def test_the_released_loss_shares_the_bound(engine: str) -> None:
    inputs = {"x": draws(3, 5, 64, seed=1), "g": 1e3 * draws(3, 5, 64, seed=2)}
    inputs["offset"] = torch.tensor([0.0, 1e6, 0.0])

    def loss(model: nn.Module, rows: Batch) -> Tensor:
        return of_rows(model, {"x": rows["x"], "g": rows["g"]}) + rows["offset"]

    release = LossRelease(share=0.4, ceiling=2.0)
    change = moved(engine, Inner(), inputs, 1, loss, norm="l1", release=release)
    assert length(change, 1) <= C * ROUNDING
    assert float(change["loss"]) == pytest.approx(0.4 * C, rel=1e-5)
    assert length(change, 1) == pytest.approx(C, rel=1e-5)


@pytest.mark.parametrize("kind", [BookKeepingEngine, TwoPassEngine])
@pytest.mark.parametrize("sizes", [None, (1, 2, 2)])
def test_few_units_at_a_time_where_memory_is_short(
    kind: Any, sizes: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = Again(), data()
    owners = None if sizes is None else Owners(sizes)
    options: dict[str, Any] = {"clipping": FlatClipping(C, "l1"), "owners": owners}
    expected = kind().clipped_sum(model, inputs, example_loss=squares, **options)
    together: list[int] = []
    clip = kind._clipped_sum

    def counted(self: Any, inner: nn.Module, rows: Batch, *rest: Any) -> Any:
        together.append(len(rows["x"]))
        return clip(self, inner, rows, *rest)

    monkeypatch.setattr(kind, "_clipped_sum", counted)
    numbers = 84 if kind is BookKeepingEngine else 36  # of all parameters, of the largest
    monkeypatch.setattr(written_out, "_memory", lambda device: 4 * 8 * numbers * 2)
    found = kind().clipped_sum(model, inputs, example_loss=squares, **options)
    assert_same_sum(found, expected, 1e-12)
    assert together == ([2, 2, 1] if sizes is None else [3, 2])
    monkeypatch.setattr(written_out, "_memory", lambda device: 1)
    one_by_one = kind().clipped_sum(model, inputs, example_loss=squares, **options)
    assert_same_sum(one_by_one, expected, 1e-12)


class ThriceTheBound(FlatClipping):
    """In L1; in L2 its shares stay within the bound."""

    def weights(self, power_sums: Any) -> Any:
        return {name: 3 * weight for name, weight in super().weights(power_sums).items()}

    def scaled(self, factor: float) -> FlatClipping:
        return ThriceTheBound(self.clipping_norm * factor, self.norm)


def test_preflight_measures_influence_in_the_norm_of_the_policy() -> None:
    inputs = data(rows=3)
    alone = [{"x": row[None]} for row in inputs["x"]]
    options: dict[str, Any] = {"engine": BookKeepingEngine(), "example_loss": squares}
    preflight(Net(), alone, inputs, clipping=FlatClipping(C, "l1"), **options)
    change = moved_by(ThriceTheBound(C, "l1"), Net(), inputs)
    assert length(change) < C < length(change, 1)
    with pytest.raises(PrivacyError, match="moved by 3 times"):
        preflight(Net(), alone, inputs, clipping=ThriceTheBound(C, "l1"), **options)


def moved_by(policy: FlatClipping, model: nn.Module, inputs: Batch, kind: Any = None) -> Batch:
    """What the second example adds to a sum."""
    engine, loss = (kind or BookKeepingEngine)(), squares if isinstance(model, Net) else own_losses
    whole = engine.clipped_sum(model, inputs, example_loss=loss, clipping=policy)
    rest = engine.clipped_sum(model, without(inputs, 1), example_loss=loss, clipping=policy)
    return difference(whole.grads, rest.grads)


@pytest.mark.parametrize("kind", [BookKeepingEngine, TwoPassEngine])
def test_the_l2_norm_in_its_place_is_seen(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = as_embeddings("bert-cls")
    assert length(moved_by(FlatClipping(C, "l1"), model, inputs, kind), 1) <= C * ROUNDING
    for engine in (written_out, two_pass):
        monkeypatch.setattr(engine, "power_sums", lambda values, norm: squares_of_rows(values))
    assert length(moved_by(FlatClipping(C, "l1"), model, inputs, kind), 1) > 2 * C


def test_absolute_values_taken_of_each_use_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[int, list[Tensor]] = {}
    dense, sums = Total.dense, powers.power_sums

    def noted(self: Total) -> Vec:
        whole = dense(self)
        parts[id(whole.values)] = [part.dense().values for part in self.parts]
        return whole

    def of_each_use(values: Tensor, norm: Norm) -> Tensor:
        return sum_of([sums(part, norm) for part in parts.get(id(values), [values])])

    monkeypatch.setattr(Total, "dense", noted)
    test_tied_parts_are_added_before_absolute_values_are_taken("book_keeping", True)
    monkeypatch.setattr(written_out, "power_sums", of_each_use)
    for cancelling in (True, False):
        with pytest.raises(AssertionError):
            test_tied_parts_are_added_before_absolute_values_are_taken("book_keeping", cancelling)
