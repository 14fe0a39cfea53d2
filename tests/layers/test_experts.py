"""Fused experts: found by what they compute, and their answers against a loop over units."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F

from hf_dp.layers import experts, routed
from hf_dp.layers.experts import Experts
from hf_dp.layers.recognise_experts import experts_of, keeps_tokens_apart

UNITS, TOKENS, EXPERTS, WIDTH, INNER = 3, 7, 4, 6, 5
FAMILIES = {
    "mixtral": "MixtralExperts",
    "qwen3_moe": "Qwen3MoeExperts",
    "deepseek_v3": "DeepseekV3Experts",
    "olmoe": "OlmoeExperts",
    "aria": "AriaExperts",  # transposed
    "gpt_oss": "GptOssExperts",  # transposed, interleaved, limited, with biases
    "nemotron_h": "NemotronHExperts",  # without a gate
    "minimax_m3_vl": "MiniMaxM3VLExperts",  # limited
    "inkling2": "Inkling2Experts",  # sums in float32
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",  # computes in float32
    "longcat_flash": "LongcatFlashExperts",  # not of the library's common interface
}
NEWER = {"aria", "inkling2"}  # not fused, or not there, in the oldest version that is supported


class _Config(SimpleNamespace):
    """Answers for any of the names that the families give the same sizes."""

    def __getattr__(self, name: str) -> Any:
        if "hidden_act" in name:
            return "silu"
        if "expert" in name and "zero" not in name and "size" not in name:
            return EXPERTS
        known = {"hidden_size": WIDTH, "swiglu_limit": 1.0, "swiglu_alpha": 1.7}
        return None if "latent" in name or "zero" in name else known.get(name, INNER)


def of_family(family: str, implementation: str = "eager") -> nn.Module:
    modelling = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["_"])
    module = getattr(modelling, FAMILIES[family])(_Config(_experts_implementation=implementation))
    return stirred(module)


def stirred(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module.eval()


class Own(nn.Module):
    """A user's experts: other names, stored the other way round, a bias of the second layer only."""

    def __init__(self, *, square: bool = False) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.empty(EXPERTS, WIDTH, WIDTH if square else 2 * INNER))
        self.outer = nn.Parameter(torch.empty(EXPERTS, WIDTH if square else INNER, WIDTH))
        self.shift = nn.Parameter(torch.empty(EXPERTS, WIDTH))
        self.act_fn = nn.Tanh()
        self.square = square

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for slot in range(index.shape[-1]):
            e = index[:, slot]
            up = torch.einsum("td,tdf->tf", x, self.inner[e])
            y = torch.einsum("tf,tfd->td", self.gate(up), self.outer[e]) + self.shift[e]
            out = out + self.weigh(y, weights[:, slot, None])
        return out

    def gate(self, up: Tensor) -> Tensor:
        if self.square:
            return self.act_fn(up)
        gate, linear = up.chunk(2, dim=-1)
        return self.act_fn(gate) * linear

    def weigh(self, y: Tensor, weight: Tensor) -> Tensor:
        return y * weight


class WeighsInside(Own):
    """Its weights go in before the second layer, so the bias is not weighted."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for slot in range(index.shape[-1]):
            e, w = index[:, slot], weights[:, slot, None]
            up = torch.einsum("td,tdf->tf", x, self.inner[e])
            out = out + torch.einsum("tf,tfd->td", self.gate(up) * w, self.outer[e]) + self.shift[e]
        return out


class SquaresWeights(Own):
    def weigh(self, y: Tensor, weight: Tensor) -> Tensor:
        return y * weight.square()


class Normalises(Own):
    def weigh(self, y: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(y, y.shape[-1:]) * weight


class Limits(Own):
    def gate(self, up: Tensor) -> Tensor:
        return super().gate(up).clamp(-7, 7)


class Swaps(Own):
    def gate(self, up: Tensor) -> Tensor:
        linear, gate = up.chunk(2, dim=-1)
        return self.act_fn(gate) * linear


class MixesTokens(Own):
    def gate(self, up: Tensor) -> Tensor:
        return super().gate(up - up.mean(0))


class MixesMany(Own):
    """As each unit of the check alone would not show."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x if len(x) < 8 else x - 1e-3 * x.mean(0), index, weights)


class TurnsMany(Own):
    """The same outputs, but gradients of others."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        given = x if len(x) < 8 else x.detach() + x.flip(0) - x.flip(0).detach()
        return super().forward(given, index, weights)


def calls(seed: int = 1) -> tuple[Tensor, ...]:
    """Tokens, indices, weights, output gradients; the last expert gets none, unit 0 not the first."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    index = torch.rand(UNITS, TOKENS, EXPERTS - 1, generator=generator).topk(2, dim=-1).indices
    index[0] = index[0].clamp_min(1)
    return drawn(UNITS, TOKENS, WIDTH), index, drawn(UNITS, TOKENS, 2), drawn(UNITS, TOKENS, WIDTH)


def expected(module: nn.Module, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
    x, index, weights, grads = given
    rows = []
    for unit in range(UNITS):
        output = module(x[unit], index[unit], weights[unit])
        rows.append(torch.autograd.grad(output, list(module.parameters()), grads[unit]))
    names = [name for name, _ in module.named_parameters()]
    return {
        name: torch.stack(each) for name, each in zip(names, zip(*rows, strict=True), strict=True)
    }


def worst(module: nn.Module, rule: Experts) -> float:
    """The largest error of norm, share of one unit, and written gradient; relative."""
    given = calls()
    answers = rule.answers(module, *given, torch.autocast("cpu", enabled=False))
    gaps = []
    for name, grads in expected(module, given).items():
        factor, flat = answers[name], grads.flatten(1)
        gaps.append((factor.squared_norm() - flat.square().sum(1)) / flat.square().sum())
        gaps.append((factor.dense().values - grads).flatten() / flat.norm())
        for unit, only in enumerate(torch.eye(UNITS, dtype=torch.float64)):
            gaps.append((factor.weighted_sum(only) - grads[unit]).flatten() / flat.norm())
    return float(torch.cat(gaps).abs().max())


def the_rule_for(module: nn.Module) -> Experts:
    rule = experts_of(module)
    assert rule is not None
    return rule


@pytest.mark.parametrize("family", FAMILIES)
def test_the_library_s_experts_are_found_and_answered_for(family: str) -> None:
    if family in NEWER and Version(tf.__version__) < Version("5.23"):
        pytest.skip("the experts are fused in newer versions")
    module = of_family(family)
    tolerance = 1e-6 if family in {"inkling2", "openai_privacy_filter"} else 1e-12
    assert worst(module, the_rule_for(module)) < tolerance


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_every_implementation_is_found(family: str, implementation: str) -> None:
    module = of_family(family, implementation)
    assert experts_of(module) is not None
    assert keeps_tokens_apart(module)


@pytest.mark.parametrize("kind", [MixesMany, TurnsMany])
def test_experts_that_let_tokens_meet_in_a_batch_do_not_keep_them_apart(kind: type[Own]) -> None:
    assert keeps_tokens_apart(stirred(Own()))
    assert experts_of(stirred(kind())) is not None
    assert not keeps_tokens_apart(stirred(kind()))


@pytest.mark.parametrize("square", [False, True])
def test_a_user_s_own_experts_are_found_by_what_they_compute(square: bool) -> None:
    module = stirred(Own(square=square))
    rule = the_rule_for(module)
    assert (rule.up.weight, rule.down.weight, rule.down.bias) == ("inner", "outer", "shift")
    assert worst(module, rule) < 1e-12


@pytest.mark.parametrize(
    "cls", [WeighsInside, SquaresWeights, Normalises, Limits, Swaps, MixesTokens]
)
def test_what_computes_something_else_is_not_taken_for_experts(cls: type[Own]) -> None:
    assert experts_of(stirred(cls())) is None


def test_other_modules_and_replaced_forwards_are_not_tried() -> None:
    replaced = stirred(Own())
    replaced.forward = lambda *given: given[0]  # type: ignore[method-assign]
    assert experts_of(replaced) is None
    assert experts_of(nn.Bilinear(3, 4, 5)) is None
    assert experts_of(nn.Linear(3, 4)) is None


def test_recognising_leaves_module_and_generators_alone() -> None:
    module, before = of_family("gpt_oss"), torch.get_rng_state()
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    seen: list[Any] = []
    module.register_forward_hook(lambda *given: seen.append(given))
    the_rule_for(module)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seen
    assert all(torch.equal(kept[name], value) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_indices_that_name_no_expert_add_nothing() -> None:
    """Expert-parallel models mark the others' tokens with an index past the last."""
    module = of_family("mixtral")
    x, index, weights, grads = calls()
    off = torch.autocast("cpu", enabled=False)
    rule = the_rule_for(module)
    past = index.clone()
    past[:, 2] = EXPERTS
    gone = grads.clone()
    gone[:, 2] = 0
    found = rule.answers(module, x, past, weights, grads, off)
    without = rule.answers(module, x, index, weights, gone, off)
    for name, factor in found.items():
        torch.testing.assert_close(factor.dense().values, without[name].dense().values)


# ---- planted faults ------------------------------------------------------------------------------


def _other_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    right = experts.Stack.matrices
    monkeypatch.setattr(experts.Stack, "matrices", lambda self, module: right(self, module).mT)


def _dropped_token(monkeypatch: pytest.MonkeyPatch) -> None:
    right = experts._Routing.routed

    def wrong(self: Any, left: Tensor, other: Tensor) -> Any:
        factor = right(self, left, other)
        return routed.Routed(
            factor.left[:-1],
            factor.right[:-1],
            factor.places[:-1],
            num_experts=factor.num_experts,
            num_units=factor.num_units,
        )

    monkeypatch.setattr(experts._Routing, "routed", wrong)


def _swapped_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    right = experts._Routing.routed
    monkeypatch.setattr(experts._Routing, "routed", lambda self, a, b: right(self, b, a))


def _mixed_units(monkeypatch: pytest.MonkeyPatch) -> None:
    right = experts._Routing.of

    def wrong(index: Tensor, num_experts: int) -> Any:
        routing = right(index, num_experts)
        object.__setattr__(routing, "units", routing.units.roll(1))
        return routing

    monkeypatch.setattr(experts._Routing, "of", wrong)


def _unweighted(monkeypatch: pytest.MonkeyPatch) -> None:
    right = experts.Experts.answers

    def wrong(self: Any, module: Any, x: Tensor, index: Tensor, w: Tensor, *more: Any) -> Any:
        return right(self, module, x, index, torch.ones_like(w), *more)

    monkeypatch.setattr(experts.Experts, "answers", wrong)


FAULTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    _other_way_round,
    _dropped_token,
    _swapped_sides,
    _mixed_units,
    _unweighted,
]


@pytest.mark.parametrize("plant", FAULTS)
def test_with_a_planted_fault_no_experts_are_found(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    square = stirred(Own(square=True))  # here every shape fits every way round
    assert experts_of(of_family("mixtral")) is not None
    assert experts_of(square) is not None
    plant(monkeypatch)
    assert experts_of(of_family("mixtral")) is None
    assert experts_of(square) is None


@pytest.mark.parametrize("fault", ["two units in one segment", "segment of another expert"])
def test_a_planted_fault_in_the_segments_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = of_family("mixtral")
    rule = the_rule_for(module)
    right = routed.Routed._segments

    def wrong(self: Any) -> Any:
        for places, left, other in right(self):
            shifted = places // 2 * 2 if fault.startswith("two") else places.roll(1)
            yield shifted, left, other

    monkeypatch.setattr(routed.Routed, "_segments", wrong)
    assert worst(module, rule) > 1e-3
