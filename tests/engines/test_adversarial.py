"""Law 1: whatever one example holds, it moves the sum by at most the sensitivity."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from engine_zoo import Batch, batch, build, difference, length, own_losses
from influence import (
    ENGINES,
    ROUNDING,
    C,
    Inner,
    clipped,
    draws,
    joined,
    moved,
    of_rows,
    without,
)
from torch import Tensor, nn

from hf_dp.clipping import LossRelease

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
def test_an_example_dropped_for_its_gradient_takes_its_loss_along(engine: str) -> None:
    inputs = {"x": draws(4, 5, 64, seed=1).abs(), "g": draws(4, 5, 64, seed=2).abs()}
    inputs["g"][1] *= 1e25  # a loss that is finite, a squared norm that is not
    model = Inner()
    nn.init.constant_(model.layer.weight, 0.01)
    assert bool(((of_rows(model, inputs) > 0) & of_rows(model, inputs).isfinite()).all())
    assert length(moved(engine, model, inputs, 1, release=LossRelease())) <= 1e-6


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
