"""Which modules get a rule, and which only look as if they should."""

from __future__ import annotations

import copy
import importlib
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm
from transformers.pytorch_utils import Conv1D

from hf_dp.layers import DEFAULT_LAYER_RULES, recognise
from hf_dp.layers.embedding import embedding
from hf_dp.layers.linear import linear, transposed_linear
from hf_dp.layers.norm import layer_norm, rms_norm, rms_norm_offset
from hf_dp.layers.recognise import is_on_probation, is_relative_bias_owner, still_computes


class Plain(nn.Linear):
    """Inherits `forward`, so it computes what its parent does."""


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class RMSNorm(nn.Module):
    """The name proves nothing: `rule` says what is computed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.eps, self.kind = 1e-6, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mean removed":
            x = x - x.mean(-1, keepdim=True)
        if self.kind == "a limit":
            x = x.clamp(-100, 100)
        if self.kind == "mixing from seven rows on" and len(x) > 6:
            x = x + x.roll(1, 0)
        axes = (-1, -2) if self.kind == "two axes of four" and x.dim() == 4 else (-1,)
        eps = {"other eps": 1e-3, "slightly other eps": 1e-5}.get(self.kind, self.eps)
        normalised = x * torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)
        gain = {"gain squared": self.weight**2, "two plus gain": 2 + self.weight}
        out = normalised * gain.get(self.kind, self.weight)
        if self.kind == "a tuple":
            return (out,)  # type: ignore[return-value]
        return out[..., :1] if self.kind == "another shape" else out


class Fails(nn.Module):
    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


class CannotBeCopied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        raise NotImplementedError


class WithExtra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * self.scale


class WithChild(WithExtra):
    def __init__(self) -> None:
        super().__init__()
        del self.scale
        self.child = nn.Identity()


KNOWN: list[tuple[nn.Module, object]] = [
    (nn.Linear(6, 5), linear),
    (Plain(6, 5), linear),
    (nn.Embedding(5, 6), embedding),
    (nn.Embedding(5, 6, padding_idx=0), embedding),
    (nn.Embedding(5, 6, sparse=True), embedding),
    (nn.LayerNorm(6), layer_norm),
    (nn.RMSNorm(6), rms_norm),
    (LlamaRMSNorm(6), rms_norm),
    (Qwen3RMSNorm(6), rms_norm),
    (T5LayerNorm(6), rms_norm),
    (RMSNorm("as named"), rms_norm),
    (GemmaRMSNorm(6), rms_norm_offset),
    (Conv1D(5, 6), transposed_linear),
    (Conv1D(6, 6), transposed_linear),
]
UNKNOWN: list[nn.Module] = [
    Doubled(6, 5),
    Doubled(6, 6),
    nn.Embedding(5, 6, max_norm=1.0),
    nn.Embedding(5, 6, scale_grad_by_freq=True),
    nn.Bilinear(6, 6, 5),
    nn.Conv1d(6, 6, 1, groups=2),
    nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular"),
    nn.ConvTranspose1d(6, 6, 1),
    nn.LSTM(6, 6),
    nn.BatchNorm1d(6),
    nn.PReLU(6),
    nn.MultiheadAttention(6, 2),
    Gemma3TextScaledWordEmbedding(5, 6, 0, embed_scale=2.0),
    OPTLearnedPositionalEmbedding(5, 6),
    RMSNorm("mean removed"),
    RMSNorm("other eps"),
    RMSNorm("slightly other eps"),
    RMSNorm("gain squared"),
    RMSNorm("two plus gain"),
    RMSNorm("a tuple"),
    RMSNorm("another shape"),
    *(RMSNorm(kind) for kind in ("a limit", "two axes of four", "mixing from seven rows on")),
    WithExtra(),
    WithChild(),
    CannotBeCopied(),
    *(Fails(error) for error in (TypeError, KeyError, AttributeError, AssertionError)),
]


@pytest.mark.parametrize(("module", "rule"), KNOWN, ids=lambda x: type(x).__name__)
def test_what_computes_a_known_formula_gets_its_rule(module: nn.Module, rule: object) -> None:
    assert recognise(module) is rule


@pytest.mark.parametrize("module", UNKNOWN, ids=lambda x: type(x).__name__)
def test_what_computes_anything_else_gets_none(module: nn.Module) -> None:
    assert recognise(module) is None


@pytest.mark.parametrize("module", [nn.Linear(6, 5), LlamaRMSNorm(6)])
def test_a_module_whose_forward_was_replaced_gets_none(module: nn.Module) -> None:
    module = copy.deepcopy(module)
    module.forward = types.MethodType(lambda self, x: 2 * x, module)  # type: ignore[method-assign]
    assert recognise(module) is None


def test_a_users_rule_comes_first_and_only_for_the_same_forward() -> None:
    def mine(*_: object) -> Any: ...

    assert recognise(Doubled(6, 5), {**DEFAULT_LAYER_RULES, Doubled: mine}) is mine
    assert recognise(Plain(6, 5), {**DEFAULT_LAYER_RULES, Plain: mine}) is mine
    assert recognise(nn.Linear(6, 5), {**DEFAULT_LAYER_RULES, Plain: mine}) is linear

    class Child(Doubled):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert recognise(Child(6, 5), {**DEFAULT_LAYER_RULES, Doubled: mine}) is None


def test_looking_leaves_module_and_generators_alone() -> None:
    module = LlamaRMSNorm(6)
    torch.manual_seed(0)
    before, weight = torch.random.get_rng_state(), module.weight.clone()
    recognise(module)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(module.weight, weight)
    assert module.weight.requires_grad
    assert module.weight.dtype == torch.float32


def test_a_large_foreign_table_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise AssertionError("copied")

    monkeypatch.setattr(copy, "deepcopy", refuse)
    assert recognise(Gemma3TextScaledWordEmbedding(5, 6, 0, embed_scale=2.0)) is None


# ---- the table behind `compute_bias` -------------------------------------------------------------


def attention(has_table: bool = True) -> T5Attention:
    config = T5Config(d_model=8, d_kv=4, num_heads=2)
    return T5Attention(config, has_relative_attention_bias=has_table)


def test_an_attention_that_owns_a_relative_bias_is_known() -> None:
    assert is_relative_bias_owner(attention())


@pytest.mark.parametrize(
    "table",
    [
        nn.Linear(2, 2),
        nn.Embedding(32, 2, padding_idx=0),
        nn.Embedding(32, 2, scale_grad_by_freq=True),
        None,
    ],
)
def test_another_table_is_not(table: nn.Module | None) -> None:
    module = attention()
    module.relative_attention_bias = table
    assert not is_relative_bias_owner(module)


def test_without_table_or_method_or_with_a_replaced_method_it_is_not() -> None:
    assert not is_relative_bias_owner(attention(has_table=False))
    patched = attention()
    patched.compute_bias = lambda *_: None  # type: ignore[method-assign]
    assert not is_relative_bias_owner(patched)
    bare = nn.Module()
    bare.relative_attention_bias = nn.Embedding(3, 2)
    assert not is_relative_bias_owner(bare)


class DropConnect(nn.Linear):
    """Another weight at every call, in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, 0.5, self.training), self.bias)


class Gain(nn.Module):
    """RMSNorm whose gradient is not what its value says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.eps, self.kind = 1e-6, kind

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.kind == "scaled":
            weight = 0.5 * weight + 0.5 * weight.detach()
        if self.kind == "detached":
            weight = weight.detach()
        if self.kind == "another path" and x.dim() == 2:
            weight = 2 * weight
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * weight


@pytest.mark.parametrize("kind", ["scaled", "detached", "another path"])
def test_a_gradient_that_the_value_does_not_tell_is_noticed(kind: str) -> None:
    assert recognise(Gain("plain")) is rms_norm
    assert recognise(Gain(kind)) is None


@pytest.mark.parametrize("training", [True, False])
def test_what_is_plain_only_without_dropout_is_not_plain(training: bool) -> None:
    module = DropConnect(6, 6).train(training)
    assert recognise(module) is None
    assert module.training is training


def test_recognising_draws_nothing() -> None:
    modules = [Gain("plain"), DropConnect(6, 6)]
    before = torch.get_rng_state()
    for module in modules:
        recognise(module)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("named", [False, True])
def test_a_norm_that_adds_nothing_is_not_given_an_epsilon(named: bool) -> None:
    """Added in the rule, it would change the gradient where inputs are small."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))
            if named:
                self.eps = 0

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * self.weight

    module = Bare()
    assert recognise(module) is rms_norm
    x, g = 1e-4 * torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    [(_, factor)] = rms_norm(module, x, g, 2)
    [expected] = torch.autograd.grad((module(x) * g).sum(), [module.weight])
    torch.testing.assert_close(factor.dense().values.sum(0), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["a limit", "two axes of four", "mixing from seven rows on"])
def test_it_is_the_further_inputs_that_tell(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: only small inputs of few rows and axes."""
    monkeypatch.setattr(importlib.import_module("hf_dp.layers.recognise"), "_FURTHER", ())
    assert recognise(RMSNorm(kind)) is rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("module", "width"),
    [(LlamaRMSNorm(6), 6), (GemmaRMSNorm(6), 6), (T5LayerNorm(6), 6), (Conv1D(5, 6), 6)],
)
def test_real_outputs_agree_with_the_formula(
    module: nn.Module, width: int, dtype: torch.dtype, autocast: bool
) -> None:
    module = copy.deepcopy(module).to(dtype)
    rule = recognise(module)
    assert rule is not None
    assert is_on_probation(module, rule)
    x = torch.randn(4, 3, width, generator=torch.Generator().manual_seed(0)).to(dtype) * 50
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = module(x)
        assert still_computes(module, rule, x, output)
        assert still_computes(module, rule, x[:0], output[:0])
        for wrong in (1.2 * output, output.flip(0), output[:, :2], (output,)):
            assert not still_computes(module, rule, x, wrong)
    assert not is_on_probation(nn.Linear(6, 5), recognise(nn.Linear(6, 5)))
