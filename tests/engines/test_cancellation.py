"""Law 1 where positions cancel, and where the arithmetic around the engine is coarse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_zoo import Batch, difference, length, naive
from influence import (
    ENGINES,
    ROUNDING,
    C,
    Inner,
    Tied,
    clipped,
    draws,
    moved,
    of_rows,
)
from torch import Tensor, nn

from hf_dp.engines.precision import full_precision
from hf_dp.layers.factors import Mat


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


TRUSTED = [(name, engine) for name in CANCELLING for engine in ("book_keeping", "two_pass")]
TRUSTED.remove(("table", "book_keeping"))  # it takes norm and sum from the same rows, added up once
TRUSTED = [pair for pair in TRUSTED if pair[0] != "linear, just so"]  # too little for the bound


@pytest.mark.parametrize(("name", "engine"), TRUSTED)
def test_trusting_every_norm_would_break_the_bound(
    name: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(squared: Tensor, uncancelled: Tensor, sensitivity: float) -> Tensor:
        return torch.zeros_like(squared, dtype=torch.bool)

    monkeypatch.setattr(f"hf_dp.engines.{engine}.cancelling", nobody)
    model, inputs = CANCELLING[name]()
    moves = [length(moved(engine, model, inputs, 1, clipping_norm=c)) / c for c in (1e-2, 0.5)]
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

    def watched(*args: Any, **options: Any) -> Tensor:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return bmm(*args, **options)

    bmm = torch.bmm  # Gram matrices
    before = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bmm", watched)
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
