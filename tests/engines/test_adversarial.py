"""Law 1: whatever one example holds, it moves the sum by at most the sensitivity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_zoo import Batch, batch, build, difference, length, naive, own_losses
from torch import Tensor, nn

from hf_dp.clipping import FlatClipping, LossRelease
from hf_dp.engines import engine_named
from hf_dp.engines.base import ExampleLoss
from hf_dp.engines.precision import full_precision
from hf_dp.layers.factors import Mat
from hf_dp.sums import ClippedSum

ENGINES = ["book_keeping", "sequential", "auto"]
ROUNDING = 1 + 1e-6
C = 0.5


class Inner(nn.Module):
    """Its loss is the inner product of a layer's output with a gradient that the example brings."""

    def __init__(self, d: int = 64, p: int = 64) -> None:
        super().__init__()
        self.layer = nn.Linear(p, d, bias=False)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return (self.layer(x) * g).flatten(1).sum(1)


class Tied(nn.Module):
    """An embedding and a head with one weight, each with a gradient that the example brings."""

    def __init__(self, rows: int = 50, width: int = 40) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.head = nn.Linear(width, rows, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, a: Tensor, x: Tensor, g: Tensor) -> Tensor:
        return (self.table(ids) * a).sum((1, 2)) + (self.head(x) * g).sum((1, 2))


def of_rows(model: nn.Module, inputs: Batch) -> Tensor:
    losses: Tensor = model(**inputs)
    return losses


def clipped(
    engine: str,
    model: nn.Module,
    inputs: Batch,
    loss: ExampleLoss = of_rows,
    *,
    clipping_norm: float = C,
    release: LossRelease | None = None,
) -> ClippedSum:
    return engine_named(engine).clipped_sum(
        model,
        inputs,
        example_loss=loss,
        clipping=FlatClipping(clipping_norm),
        loss_release=release,
    )


def joined(summed: ClippedSum) -> dict[str, Tensor]:
    """The whole release: gradients, and the loss's coordinate if there is one."""
    coordinate = {} if summed.loss_sum is None else {"loss": summed.loss_sum}
    return {**summed.grads, **coordinate}


def without(inputs: Batch, index: int) -> Batch:
    return {k: torch.cat([v[:index], v[index + 1 :]]) for k, v in inputs.items()}


def moved(
    engine: str, model: nn.Module, inputs: Batch, index: int, *args: Any, **options: Any
) -> dict[str, Tensor]:
    """What removing one example does to the release."""
    whole = clipped(engine, model, inputs, *args, **options)
    rest = clipped(engine, model, without(inputs, index), *args, **options)
    return difference(joined(whole), joined(rest))


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- float inputs: what an example may hold -------------------------------------------------------

POISONS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda x: torch.full_like(x, torch.nan),
    "one nan": lambda x: x.index_fill(1, torch.tensor([2]), torch.nan),
    "inf": lambda x: torch.full_like(x, torch.inf),
    "minus inf": lambda x: torch.full_like(x, -torch.inf),
    "1e30": lambda x: x * 1e30,
    "1e18": lambda x: x * 1e18,
    "1e4": lambda x: x * 1e4,
    "zeros": torch.zeros_like,
    "1e-30": lambda x: x * 1e-30,
}


def as_embeddings(name: str) -> tuple[nn.Module, Batch]:
    """A real architecture that is given vectors instead of ids, so that any number can come in."""
    model, inputs = build(name), batch(name)
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = draws(*ids.shape, 16, seed=3)
    return model, inputs


@pytest.mark.parametrize("release", [None, LossRelease(share=0.3, ceiling=1.0)])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("poison", POISONS)
def test_one_example_moves_a_real_model_by_at_most_the_sensitivity(
    poison: str, engine: str, release: LossRelease | None
) -> None:
    model, inputs = as_embeddings("bert-cls")
    clean = clipped(engine, model, without(inputs, 1), own_losses, release=release)
    inputs["inputs_embeds"][1:2] = POISONS[poison](inputs["inputs_embeds"][1:2])
    whole = clipped(engine, model, inputs, own_losses, release=release)
    change = length(difference(joined(whole), joined(clean)))
    assert change <= C * ROUNDING
    assert all(torch.isfinite(value).all() for value in joined(whole).values())
    if poison in ("nan", "one nan", "inf", "minus inf"):
        assert not torch.isfinite(whole.norms[1])
        assert change <= 1e-6 * length(
            joined(clean)
        )  # it adds nothing, and the others are as before
    others = [0, 2, 3, 4]
    torch.testing.assert_close(whole.norms[others], clean.norms, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e10, 1e18, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("positions", [1, 5, 60])  # the norm by Gram, and written out
def test_any_scale_of_inputs_and_gradients_is_bounded(
    scale: float, engine: str, positions: int
) -> None:
    model = Inner()
    inputs = {"x": draws(4, positions, 64, seed=1), "g": draws(4, positions, 64, seed=2)}
    for field in inputs:
        wild = {key: value.clone() for key, value in inputs.items()}
        wild[field][2] *= scale
        change = length(moved(engine, model, wild, 2))
        assert change <= C * ROUNDING
        if 1 < scale <= 1e10:
            assert change == pytest.approx(C, rel=1e-5)  # clipped, not dropped


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_is_not_finite_drops_its_example_alone(engine: str) -> None:
    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        return of_rows(model, {"x": inputs["x"], "g": inputs["g"]}) + inputs["offset"]

    inputs = {"x": draws(4, 5, 64, seed=1), "g": draws(4, 5, 64, seed=2)}
    inputs["offset"] = torch.tensor([0.0, torch.inf, torch.nan, 0.0])
    model, release = Inner(), LossRelease()
    both = {key: value[[0, 3]] for key, value in inputs.items()}
    whole = clipped(engine, model, inputs, loss, release=release)
    kept = clipped(engine, model, both, loss, release=release)
    assert length(difference(joined(whole), joined(kept))) <= 1e-6
    assert torch.isfinite(whole.norms).tolist() == [True, False, False, True]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", [1e30, -1e30, 1e8])
def test_gradient_and_loss_together_stay_within_the_sensitivity(engine: str, value: float) -> None:
    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        return of_rows(model, {"x": inputs["x"], "g": inputs["g"]}) + inputs["offset"]

    inputs = {"x": draws(4, 5, 64, seed=1), "g": 1e3 * draws(4, 5, 64, seed=2)}
    inputs["offset"] = torch.tensor([0.0, value, 0.0, 0.0])
    release = LossRelease(share=0.6, ceiling=2.0)
    change = moved(engine, Inner(), inputs, 1, loss, release=release)
    assert length(change) <= C * ROUNDING
    if value > 0:
        assert length(change) == pytest.approx(C, rel=1e-5)
        assert float(change["loss"]) == pytest.approx(0.6 * C, rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_copies_of_an_example_count_each_for_itself(engine: str) -> None:
    model, inputs = build("gpt2-lm"), batch("gpt2-lm")
    copied = {key: torch.cat([value, value[:1], value[:1]]) for key, value in inputs.items()}
    once = clipped(engine, model, inputs, own_losses)
    thrice = clipped(engine, model, copied, own_losses)
    added = difference(thrice.grads, once.grads)
    assert length(added) == pytest.approx(2 * C, rel=1e-5)
    assert length(moved(engine, model, copied, 5, own_losses)) <= C * ROUNDING


@pytest.mark.parametrize("engine", ENGINES)
def test_an_example_with_nothing_to_predict_adds_nothing(engine: str) -> None:
    model, inputs = build("gpt2-lm"), batch("gpt2-lm")  # row 3 has no labels
    change = moved(engine, model, inputs, 3, own_losses, release=LossRelease())
    assert length(change) <= 1e-6
    assert float(clipped(engine, model, inputs, own_losses).norms[3]) == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_an_example_of_padding_alone_is_bounded(engine: str) -> None:
    model, inputs = build("bert-cls"), batch("bert-cls")
    inputs["attention_mask"][1] = 0
    inputs["input_ids"][1] = 1
    assert length(moved(engine, model, inputs, 1, own_losses)) <= C * ROUNDING


# ---- cancellation ---------------------------------------------------------------------------------


def cancelling_inner(scale: float = 1e4) -> Batch:
    """Example 1 has two huge positions whose gradients cancel up to one of norm about 1e4."""
    inputs = {"x": draws(3, 2, 64, seed=1), "g": draws(3, 2, 64, seed=2)}
    x, g, rest = draws(64, seed=3), draws(64, seed=4), draws(64, seed=5)
    inputs["x"][1] = scale * torch.stack([x, x])
    inputs["g"][1] = scale * torch.stack([g, -g]) + torch.stack([rest, 0 * rest]) * 1e-2
    return inputs


def cancelling_tied() -> Batch:
    """Example 1's gradient through the table cancels the one through the head."""
    inputs = {
        "ids": torch.tensor([[3, 4], [5, 6], [7, 8]]),
        "a": draws(3, 2, 40, seed=1),
        "x": draws(3, 2, 40, seed=2),
        "g": draws(3, 2, 50, seed=3),
    }
    inputs["a"][1], inputs["x"][1] = 1e7 * draws(2, 40, seed=4), 1e7 * draws(2, 40, seed=4)
    inputs["g"][1] = -torch.nn.functional.one_hot(inputs["ids"][1], 50).float()
    inputs["x"][1, 0] += draws(40, seed=5) * 10
    return inputs


def cancelling_table() -> Batch:
    """Example 1 repeats one id with huge rows that cancel up to their rounding."""
    rows = 1e7 * draws(29, 40, seed=4)
    a = draws(3, 30, 40, seed=1)
    a[1] = torch.cat([rows, -rows.sum(0, keepdim=True)])
    return {
        "ids": torch.arange(3)[:, None].expand(3, 30).contiguous(),
        "a": a,
        "x": torch.zeros(3, 1, 40),
        "g": torch.zeros(3, 1, 50),
    }


def lost_squares() -> tuple[nn.Module, Batch]:
    """Example 1's squares vanish on one side of the product although its gradient is not small."""
    inputs = {"x": draws(2, 8, 1000, seed=1), "g": draws(2, 8, 1000, seed=2)}
    inputs["x"][1], inputs["g"][1] = 5e17, 2e-23
    return Inner(1000, 1000), inputs


CANCELLING: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "linear": lambda: (Inner(), cancelling_inner()),
    "linear, just so": lambda: (Inner(), cancelling_inner(scale=30.0)),
    "tied": lambda: (Tied(), cancelling_tied()),
    "table": lambda: (Tied(), cancelling_table()),
    "lost squares": lost_squares,
}


@pytest.mark.parametrize("clipping_norm", [1e-2, 0.5, 50.0])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CANCELLING)
def test_an_example_whose_positions_cancel_is_bounded(
    name: str, engine: str, clipping_norm: float
) -> None:
    model, inputs = CANCELLING[name]()
    change = moved(engine, model, inputs, 1, clipping_norm=clipping_norm)
    assert length(change) <= clipping_norm * ROUNDING


def test_the_plain_gram_form_would_not_bound_it() -> None:
    inputs = cancelling_inner()
    left, right = inputs["g"][1:2], inputs["x"][1:2]
    factor = Mat(left, right)
    assert factor.prefers_gram
    true = torch.einsum("btd,btp->bdp", left.double(), right.double()).norm()
    under = true / factor.squared_norm().clamp_min(0).sqrt()
    assert under > 1.3 or under.isinf()
    by_gram = factor.squared_norm().clamp_min(1e-30).rsqrt() * C
    assert by_gram * true > 1.3 * C


@pytest.mark.parametrize("name", ["linear", "tied", "table", "lost squares"])
def test_trusting_every_norm_would_break_the_bound(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(factors: Any, squared: Any, sensitivity: float) -> Tensor:
        return torch.zeros_like(next(iter(squared.values())), dtype=torch.bool)

    monkeypatch.setattr("hf_dp.engines.book_keeping._cancelling", nobody)
    model, inputs = CANCELLING[name]()
    moves = [
        length(moved("book_keeping", model, inputs, 1, clipping_norm=c)) / c for c in (1e-2, 0.5)
    ]
    assert max(moves) > 1.05


def contrived() -> Iterator[Batch]:
    """Pairs of positions that cancel to every degree, so that some escape every threshold."""
    for seed in range(150):
        left, right, rest = (draws(2, 1, 64, seed=3 * seed + i) for i in range(3))
        leftover = 10 ** (-3 + 3 * (seed % 50) / 50)
        g = torch.cat([left, -left + leftover * rest], 1) * 30
        yield {"x": right.expand(2, 2, 64).contiguous(), "g": g}


def test_no_degree_of_cancellation_gets_past_the_bound() -> None:
    model = Inner()
    worst = max(
        length(clipped("book_keeping", model, {k: v[:1] for k, v in inputs.items()}).grads)
        for inputs in contrived()
    )
    assert worst <= C * ROUNDING


def test_a_cancelling_and_a_poisoned_example_in_one_batch_are_both_bounded() -> None:
    inputs = {"x": draws(4, 60, 64, seed=1), "g": draws(4, 60, 64, seed=2)}  # norms written out
    inputs["x"][1] = 1e4 * inputs["x"][1, :1]
    inputs["g"][1] = 1e4 * inputs["g"][1]
    inputs["g"][1, 30:] = -inputs["g"][1, :30]
    inputs["x"][2] = torch.nan
    assert length(moved("book_keeping", Inner(), inputs, 1)) <= C * ROUNDING
    assert length(moved("book_keeping", Inner(), inputs, 2)) <= 1e-6


def test_an_example_taken_apart_still_adds_its_own_gradient() -> None:
    model, inputs = CANCELLING["linear, just so"]()
    expected = naive(model.double(), {k: v.double() for k, v in inputs.items()}, C, of_rows)
    found = clipped("book_keeping", model.float(), inputs)
    gap = length(difference(found.grads, expected.grads))
    assert gap <= 1e-4 * length(expected.grads)
    torch.testing.assert_close(found.norms.double(), expected.norms, rtol=1e-4, atol=0)


# ---- the arithmetic around the engine ----------------------------------------------------------------


def test_a_region_of_autocast_does_not_reach_the_norms() -> None:
    model, inputs = CANCELLING["linear, just so"]()

    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return of_rows(model, inputs)

    outside = clipped("book_keeping", model, inputs, loss)
    with torch.autocast("cpu", torch.bfloat16):
        inside = clipped("book_keeping", model, inputs, loss)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(inside.norms, outside.norms)
    assert torch.equal(inside.grads["layer.weight"], outside.grads["layer.weight"])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_lower_matmul_precision_does_not_reach_the_norms(engine: str) -> None:
    model, inputs = Inner(), {"x": draws(3, 5, 64, seed=1), "g": draws(3, 5, 64, seed=2)}
    expected = naive(model, inputs, C, of_rows)
    seen: list[str] = []

    def watched(self: Mat, *args: Any) -> Tensor:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return squared_norm(self, *args)

    squared_norm = Mat.squared_norm
    before = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mat, "squared_norm", watched)
        torch.set_float32_matmul_precision("medium")
        try:
            found = clipped(engine, model, inputs)
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(before)
    assert set(seen) == ({"ieee"} if engine != "sequential" else set())
    torch.testing.assert_close(found.norms.double(), expected.norms, rtol=2e-2, atol=0)


def test_precision_comes_back_after_a_failure() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(KeyError), full_precision(torch.device("cpu")):  # noqa: PT012
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        raise KeyError
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert torch.is_grad_enabled()
