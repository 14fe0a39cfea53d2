"""Several rows of one user, clipped as one: exact for every engine, and bounded whatever they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_zoo import adapted
from engine_zoo import Batch, assert_same_sum, difference, half_clipped, length, own_losses
from engine_zoo import batch as engine_batch
from engine_zoo import build as engine_build
from family_zoo import batch, build
from influence import ROUNDING, C, draws, joined
from torch import Tensor, nn
from user_loop import by_users, cut

from hf_dp.clipping import FlatClipping, LossRelease
from hf_dp.engines import AutomaticEngine, BookKeepingEngine, SequentialEngine, TwoPassEngine
from hf_dp.engines.base import GradientEngine
from hf_dp.engines.owners import Owners, UserReduction
from hf_dp.errors import ConfigurationError
from hf_dp.layers import generic
from hf_dp.layers.packing import Packing
from hf_dp.layers.per_unit import Vec
from hf_dp.sums import ClippedSum

pytestmark = pytest.mark.filterwarnings("ignore:.loss_type=None. was set:UserWarning")

ENGINES: dict[str, Callable[[], GradientEngine]] = {
    "book_keeping": BookKeepingEngine,
    "two_pass": TwoPassEngine,
    "auto": AutomaticEngine,
    "sequential": SequentialEngine,
    "sequential, 3 rows": lambda: SequentialEngine(rows_at_once=3),
}
CROWDS = {
    "ragged": (3, 1, 4),
    "even": (2, 2, 2, 2),
    "one user": (8,),
    "one row each": (1,) * 8,
}
FAMILIES = ["gpt2", "llama", "bert", "t5", "mixtral", "vit", "opt", "bloom", "convnext", "whisper"]


def clipped(
    engine: GradientEngine, model: nn.Module, inputs: Batch, owners: Owners | None, **more: Any
) -> ClippedSum:
    more = {"clipping": FlatClipping(C), "example_loss": own_losses, **more}
    return engine.clipped_sum(model, inputs, owners=owners, **more)


def check(
    model: nn.Module,
    inputs: Batch,
    sizes: tuple[int, ...],
    tolerance: float = 1e-12,
    reduction: UserReduction = "mean",
    engines: tuple[str, ...] = tuple(ENGINES),
) -> None:
    free = by_users(model, inputs, sizes, 1.0, reduction=reduction)
    norm = half_clipped(free.norms)
    expected = by_users(model, inputs, sizes, norm, reduction=reduction)
    for name in engines:
        found = clipped(
            ENGINES[name](),
            model,
            inputs,
            Owners(sizes, reduction),
            clipping=FlatClipping(norm),
        )
        assert_same_sum(found, expected, tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_users_equal_the_loop(family: str, crowd: str, reduction: UserReduction) -> None:
    inputs = batch(family, rows=8, dtype=torch.float64)
    check(build(family, torch.float64), inputs, CROWDS[crowd], reduction=reduction)


@pytest.mark.parametrize("family", FAMILIES)
def test_users_of_many_families_equal_the_loop(family: str) -> None:
    inputs = batch(family, rows=6, dtype=torch.float64)
    check(build(family, torch.float64), inputs, (3, 1, 2), engines=("book_keeping", "two_pass"))


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "vit"])
def test_users_under_lora_equal_the_loop(family: str) -> None:
    inputs = batch(family, rows=6, dtype=torch.float64)
    engines = ("book_keeping", "two_pass")
    for sizes in ((3, 1, 2), (3, 3)):
        check(adapted(family, torch.float64), inputs, sizes, engines=engines)


def test_users_in_float32_equal_the_loop() -> None:
    check(build("gpt2"), batch("gpt2", rows=6), (3, 1, 2), 1e-5)


class OwnNet(nn.Module):
    """A layer without a rule, under one with a rule, and one weight used by two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own, self.linear = Own(), nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5, bias=False)
        self.tied.weight = self.linear.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(torch.tanh(self.linear(self.own(x)))).square().sum((1, 2))


class Own(nn.Module):
    """Two parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.shift = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.mix + self.shift)


def own_data(rows: int) -> Batch:
    return {"x": draws(rows, 3, 5, seed=2).double()}


def of_own(model: nn.Module, inputs: Any) -> Tensor:
    losses: Tensor = model(**inputs)
    return losses


@pytest.mark.parametrize("held", [generic.MOST_HELD, 0])
@pytest.mark.parametrize("kind", [BookKeepingEngine, TwoPassEngine])
def test_layers_without_a_rule_equal_the_loop(
    kind: type[GradientEngine], held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generic, "MOST_HELD", held)  # 0: gradients are computed anew, row by row
    model, inputs, sizes = OwnNet(), own_data(6), (3, 1, 2)
    expected = by_users(model, inputs, sizes, C, loss_of=of_own)
    found = clipped(kind(), model, inputs, Owners(sizes), example_loss=of_own)
    assert_same_sum(found, expected, 1e-12)


@pytest.mark.parametrize("kind", [BookKeepingEngine, TwoPassEngine])
def test_under_checkpointing_and_dropout_users_have_the_gradient_of_their_masks(
    kind: type[GradientEngine],
) -> None:
    model = build("gpt2", torch.float64, training=True)
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    inputs, sizes = batch("gpt2", rows=6, dtype=torch.float64), (3, 1, 2)
    parameters = dict(model.named_parameters())
    grads, norms = [], []
    for user in range(len(sizes)):  # the whole batch each time, so that its masks are the same
        torch.manual_seed(7)
        losses = own_losses(model, inputs).split(sizes)
        found = torch.autograd.grad(losses[user].mean(), list(parameters.values()))
        grads.append(dict(zip(parameters, found, strict=True)))
        norms.append(length(grads[-1]))
    torch.manual_seed(7)
    summed = clipped(kind(), model, inputs, Owners(sizes), clipping=FlatClipping(max(norms) / 2))
    torch.testing.assert_close(
        summed.norms, torch.tensor(norms, dtype=torch.float64), rtol=1e-10, atol=0
    )
    weights = [min(1.0, max(norms) / 2 / norm) for norm in norms]
    expected = {
        name: sum(w * g[name] for w, g in zip(weights, grads, strict=True)) for name in parameters
    }
    assert length(difference(summed.grads, expected)) <= 1e-10 * length(expected)


def test_under_bfloat16_users_are_within_its_rounding() -> None:
    model, inputs, sizes = build("bert"), batch("bert", rows=6), (3, 1, 2)
    free = by_users(model, inputs, sizes, 1e9)
    with torch.autocast("cpu", torch.bfloat16):
        found = clipped(
            BookKeepingEngine(), model, inputs, Owners(sizes), clipping=FlatClipping(1e9)
        )
    assert length(difference(found.grads, free.grads)) <= 2e-2 * length(free.grads)


# ---- bounded influence -----------------------------------------------------------------------------

POISONS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan in one row": lambda x: x.index_fill(0, torch.tensor([1]), torch.nan),
    "inf": lambda x: torch.full_like(x, torch.inf),
    "1e30": lambda x: x * 1e30,
    "1e4": lambda x: x * 1e4,
    "zeros": torch.zeros_like,
    "one row over and over": lambda x: x[:1].expand_as(x) * 50,
    "rows that cancel": lambda x: torch.cat([x[:1], -x[:1], x[2:]]) * 1e4,
}


def as_embeddings() -> tuple[nn.Module, Batch]:
    """A real architecture that is given vectors instead of ids, so that any number can come in."""
    model, inputs = engine_build("bert-cls"), engine_batch("bert-cls")
    ids = inputs.pop("input_ids")
    inputs = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
    inputs["inputs_embeds"] = draws(2 * len(ids), ids.shape[1], 16, seed=3)
    return model, inputs


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("poison", POISONS)
def test_one_user_moves_the_sum_by_at_most_the_sensitivity(
    poison: str, name: str, reduction: UserReduction
) -> None:
    model, inputs = as_embeddings()
    release = LossRelease(share=0.3, ceiling=1.0)
    rows = len(inputs["labels"])
    sizes = (2, 4, rows - 6)
    first, bad, last = cut(inputs, sizes)
    bad["inputs_embeds"] = POISONS[poison](bad["inputs_embeds"])
    rest = {key: torch.cat([first[key], last[key]]) for key in inputs}
    whole = {key: torch.cat([first[key], bad[key], last[key]]) for key in inputs}
    with_it = clipped(ENGINES[name](), model, whole, Owners(sizes, reduction), loss_release=release)
    without = clipped(
        ENGINES[name](), model, rest, Owners((2, rows - 6), reduction), loss_release=release
    )
    change = length(difference(joined(with_it), joined(without)))
    assert change <= C * ROUNDING
    assert all(torch.isfinite(value).all() for value in joined(with_it).values())
    others = with_it.norms[[0, 2]]
    torch.testing.assert_close(others, without.norms, rtol=1e-5, atol=0)


def test_rows_without_an_owner_are_refused() -> None:
    model, inputs = as_embeddings()
    for kind in ENGINES.values():
        with pytest.raises(ConfigurationError, match=r"Owners\.sizes"):
            clipped(kind(), model, inputs, Owners((1, 2)))


@pytest.mark.parametrize("sizes", [(1, 0), (2, -1), (1.0,)])
def test_sizes_that_are_none_are_refused(sizes: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Owners\.sizes"):
        Owners(sizes)


def test_unknown_reductions_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Owners\.reduction"):
        Owners((1,), "median")  # type: ignore[arg-type]


def test_rows_at_once_are_refused_below_one() -> None:
    with pytest.raises(ConfigurationError, match=r"SequentialEngine\.rows_at_once"):
        SequentialEngine(rows_at_once=0)


# ---- these tests see faults ------------------------------------------------------------------------


def _without_cross_terms(self: Vec, packing: Packing) -> Vec:
    longest = self.values.flatten(1).norm(dim=1).split(packing.sizes)
    rows = torch.cat([part == part.max() for part in longest])
    return Vec(packing.added(self.values * rows.view(-1, *[1] * (self.values.dim() - 1))))


def _shifted(self: Packing, rows: Tensor, *, shared: bool = False) -> Tensor:
    return honest(self, rows.roll(1, 0))


honest = Packing.joined


@pytest.mark.parametrize(
    ("place", "name", "fault"),
    [
        (Vec, "grouped", _without_cross_terms),
        (Packing, "joined", _shifted),
        (Owners, "weighted", lambda self, losses: losses),
    ],
    ids=["rows left out", "rows of others", "no mean"],
)
def test_planted_faults_are_seen(
    place: type, name: str, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, fault)
    inputs = batch("gpt2", rows=6, dtype=torch.float64)
    with pytest.raises(AssertionError):
        check(build("gpt2", torch.float64), inputs, (3, 1, 2), engines=("book_keeping",))
