"""Each layer rule against ordinary autograd on one unit at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm
from transformers.pytorch_utils import Conv1D

from hf_dp.errors import UncoveredParameterError
from hf_dp.layers import LayerRule, recognise
from hf_dp.layers import conv as conv_rules
from hf_dp.layers import embedding as embedding_rules
from hf_dp.layers import linear as linear_rules
from hf_dp.layers.base import positions
from hf_dp.layers.factors import Factor, Mat, combine

UNITS = 3


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(*shape: int, below: int) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(1))


def random(module: nn.Module) -> nn.Module:
    """The module in float64, its parameters drawn anew."""
    module = module.double()
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=seed + 50))
    return module


def check(rule: LayerRule | None, module: nn.Module, inputs: Tensor) -> None:
    """The rule's factors are what autograd gives for each unit alone."""
    assert rule is not None
    with torch.no_grad():
        g = numbers(*module(inputs).shape, seed=7)
    found: dict[int, Factor] = {id(p): factor for p, factor in rule(module, inputs, g, UNITS)}
    trained = [p for p in module.parameters() if p.requires_grad]
    assert found.keys() == {id(p) for p in trained}
    for unit in range(UNITS):
        loss = (module(inputs[unit : unit + 1]) * g[unit : unit + 1]).sum()
        for parameter, expected in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            factor = found[id(parameter)]
            one = factor.weighted_sum(torch.eye(UNITS, dtype=torch.float64)[unit])
            # Gemma's own product with the gain is in float32
            close = 1e-6 if isinstance(module, GemmaRMSNorm) else 1e-12
            torch.testing.assert_close(one, expected, rtol=close, atol=close)
            norm = factor.squared_norm()[unit]
            torch.testing.assert_close(norm, expected.square().sum(), rtol=close, atol=close)


Case = Callable[[], tuple[nn.Module, Tensor]]
CASES: dict[str, Case] = {
    "linear, 2-D": lambda: (nn.Linear(6, 5), numbers(UNITS, 6)),
    "linear, 3-D": lambda: (nn.Linear(6, 5), numbers(UNITS, 4, 6)),
    "linear, 4-D": lambda: (nn.Linear(6, 5), numbers(UNITS, 2, 4, 6)),
    "linear, one position": lambda: (nn.Linear(6, 5), numbers(UNITS, 1, 6)),
    "linear, wide enough for Gram": lambda: (nn.Linear(20, 30), numbers(UNITS, 2, 20)),
    "linear without bias": lambda: (nn.Linear(6, 5, bias=False), numbers(UNITS, 4, 6)),
    "Conv1D": lambda: (Conv1D(5, 6), numbers(UNITS, 4, 6)),
    "Conv1D, square": lambda: (Conv1D(6, 6), numbers(UNITS, 4, 6)),
    "Conv1D, 2-D": lambda: (Conv1D(5, 6), numbers(UNITS, 6)),
    "embedding": lambda: (nn.Embedding(7, 4), ids(UNITS, 5, below=7)),
    "embedding, repeated ids": lambda: (nn.Embedding(7, 4), ids(UNITS, 9, below=2)),
    "embedding, one id each": lambda: (nn.Embedding(7, 4), ids(UNITS, below=7)),
    "embedding, 3-D ids": lambda: (nn.Embedding(7, 4), ids(UNITS, 2, 3, below=7)),
    "embedding, padding": lambda: (nn.Embedding(3, 4, padding_idx=1), ids(UNITS, 9, below=3)),
    "embedding, padding from the end": lambda: (
        nn.Embedding(3, 4, padding_idx=-1),
        ids(UNITS, 9, below=3),
    ),
    "embedding, 32-bit ids": lambda: (nn.Embedding(7, 4), ids(UNITS, 5, below=7).int()),
    "layer norm": lambda: (nn.LayerNorm(6), numbers(UNITS, 4, 6)),
    "layer norm, 2-D": lambda: (nn.LayerNorm(6), numbers(UNITS, 6)),
    "layer norm, 4-D": lambda: (nn.LayerNorm(6), numbers(UNITS, 2, 4, 6)),
    "layer norm over two axes": lambda: (nn.LayerNorm((4, 6)), numbers(UNITS, 5, 4, 6)),
    "layer norm without shift": lambda: (nn.LayerNorm(6, bias=False), numbers(UNITS, 4, 6)),
    "RMSNorm of torch": lambda: (nn.RMSNorm(6), numbers(UNITS, 4, 6)),
    "RMSNorm of Llama": lambda: (LlamaRMSNorm(6), numbers(UNITS, 4, 6)),
    "RMSNorm of Gemma": lambda: (GemmaRMSNorm(6), numbers(UNITS, 4, 6)),
    "RMSNorm of T5": lambda: (T5LayerNorm(6), numbers(UNITS, 4, 6)),
    "conv 1-D": lambda: (nn.Conv1d(4, 5, 3), numbers(UNITS, 4, 9)),
    "conv 1-D, every option": lambda: (
        nn.Conv1d(4, 5, 3, stride=2, padding=2, dilation=2, bias=False),
        numbers(UNITS, 4, 11),
    ),
    "conv 1-D, same": lambda: (
        nn.Conv1d(4, 5, 3, dilation=2, padding="same"),
        numbers(UNITS, 4, 9),
    ),
    "conv 1-D, valid": lambda: (nn.Conv1d(4, 5, 4, padding="valid"), numbers(UNITS, 4, 9)),
    "conv 1-D, rows left over": lambda: (nn.Conv1d(4, 5, 3, stride=3), numbers(UNITS, 4, 11)),
    "conv 1-D, wide enough for Gram": lambda: (nn.Conv1d(20, 30, 5), numbers(UNITS, 20, 6)),
    "conv 2-D, patches": lambda: (nn.Conv2d(3, 5, 2, stride=2), numbers(UNITS, 3, 6, 8)),
    "conv 2-D, every option": lambda: (
        nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
        numbers(UNITS, 3, 6, 7),
    ),
    "conv 3-D": lambda: (
        nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 1), padding=(0, 1, 0)),
        numbers(UNITS, 2, 4, 5, 3),
    ),
    "group norm": lambda: (nn.GroupNorm(3, 6), numbers(UNITS, 6, 5)),
    "group norm, 4-D": lambda: (nn.GroupNorm(2, 6), numbers(UNITS, 6, 5, 4)),
    "group norm, 2-D": lambda: (nn.GroupNorm(2, 6), numbers(UNITS, 6)),
    "RMSNorm per head": lambda: (LlamaRMSNorm(6), numbers(UNITS, 4, 2, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_gives_what_autograd_gives_for_each_unit(name: str) -> None:
    module, inputs = CASES[name]()
    module = random(module)
    check(recognise(module), module, inputs)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    "name", ["linear, 3-D", "Conv1D", "layer norm", "conv 2-D, every option", "group norm"]
)
def test_a_frozen_parameter_gets_no_factor(name: str, frozen: str) -> None:
    module, inputs = CASES[name]()
    module = random(module)
    module.get_parameter(frozen).requires_grad_(False)
    check(recognise(module), module, inputs)


@pytest.mark.parametrize("name", ["embedding", "RMSNorm of Llama"])
def test_a_module_that_is_frozen_gets_no_factor_at_all(name: str) -> None:
    module, inputs = CASES[name]()
    module = random(module)
    rule = recognise(module)
    assert rule is not None
    g = torch.zeros_like(module(inputs))
    module.requires_grad_(False)
    assert list(rule(module, inputs, g, UNITS)) == []


def test_the_relative_bias_gives_what_autograd_gives_for_each_unit() -> None:
    config = T5Config(d_model=8, d_kv=4, num_heads=2, relative_attention_num_buckets=6)
    module = T5Attention(config, has_relative_attention_bias=True).double()
    table = module.relative_attention_bias
    g = numbers(UNITS, 2, 5, 5, seed=3)
    seen: list[Tensor] = []
    with table.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        bias = module.compute_bias(5, 5)
    [(parameter, factor)] = embedding_rules.relative_bias(module, seen[0], g, UNITS)
    assert parameter is table.weight
    for unit in range(UNITS):
        expected = torch.autograd.grad(
            (bias * g[unit : unit + 1]).sum(), parameter, retain_graph=True
        )[0]
        one = factor.weighted_sum(torch.eye(UNITS, dtype=torch.float64)[unit])
        torch.testing.assert_close(one, expected)
    table.requires_grad_(False)
    assert list(embedding_rules.relative_bias(module, seen[0], g, UNITS)) == []


@pytest.mark.parametrize("units", [2, 5])
def test_units_must_be_on_the_first_axis(units: int) -> None:
    with pytest.raises(UncoveredParameterError, match=rf"expected {units} units on the first axis"):
        positions(numbers(3, 4, 6), units)


def test_a_parameter_that_is_computed_from_others_is_not_answered_for() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)).double()
    x = numbers(UNITS, 4, 6)
    answered = [p for p, _ in linear_rules.linear(module, x, numbers(UNITS, 4, 5), UNITS)]
    assert [p is module.bias for p in answered] == [True]


# ---- planted faults ------------------------------------------------------------------------------


def _sides_swapped(module: nn.Module, x: Tensor, g: Tensor, n: int) -> Any:
    return linear_rules.linear(module, x, g, n)


def _last_position_dropped(module: nn.Module, x: Tensor, g: Tensor, n: int) -> Any:
    return linear_rules.linear(module, x[:, :-1], g[:, :-1], n)


def _padding_counted(module: nn.Module, x: Tensor, g: Tensor, n: int) -> Any:
    plain = nn.Embedding(*module.weight.shape, _weight=module.weight)
    plain.weight = module.weight
    return embedding_rules.embedding(plain, x, g, n)


def _padding_forgotten(module: nn.Module, x: Tensor, g: Tensor, n: int) -> Any:
    module._reversed_padding_repeated_twice = (0, 0, 2, 2)  # not those of the last axis
    return conv_rules.convolution(module, x, g[..., : x.shape[-1] // 2], n)


def _kernel_transposed(module: nn.Module, x: Tensor, g: Tensor, n: int) -> Any:
    for parameter, factor in conv_rules.convolution(module, x, g, n):
        if isinstance(factor, conv_rules.Reshaped):
            kernel = factor.inner
            assert isinstance(kernel, Mat)
            turned = kernel.right.unflatten(-1, (4, 3)).mT.flatten(-2)
            factor = conv_rules.Reshaped(Mat(kernel.left, turned), factor.shape)
        yield parameter, factor


def _groups_forgotten(module: nn.Module, x: Tensor, g: Tensor, n: int) -> Any:
    plain = nn.GroupNorm(1, 6).double()
    plain.weight, plain.bias = module.weight, module.bias
    return conv_rules.group_norm(plain, x, g, n)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("conv 1-D", _kernel_transposed),
        ("conv 2-D, every option", _padding_forgotten),
        ("group norm", _groups_forgotten),
        ("Conv1D, square", _sides_swapped),
        ("linear, 3-D", _last_position_dropped),
        ("embedding, padding", _padding_counted),
    ],
)
def test_a_planted_fault_is_seen(name: str, fault: LayerRule) -> None:
    module, inputs = CASES[name]()
    with pytest.raises(AssertionError):
        check(fault, random(module), inputs)


def test_kernels_of_two_calls_add_up_with_their_cross_term() -> None:
    module, inputs = CASES["conv 1-D"]()
    module = random(module)
    other = numbers(*inputs.shape, seed=9)
    with torch.no_grad():
        shape = module(inputs).shape
    g, h = numbers(*shape, seed=7), numbers(*shape, seed=8)
    calls = [(inputs, g), (other, h)]
    factors = [next(conv_rules.convolution(module, x, grad, UNITS))[1] for x, grad in calls]
    dense = sum(factor.dense().values for factor in factors)
    expected = dense.flatten(1).square().sum(1)
    apart = [factor.squared_norm() for factor in factors]
    torch.testing.assert_close(combine(factors).squared_norm(), expected)
    torch.testing.assert_close(sum(apart) + 2 * factors[0].cross(factors[1]), expected)
    assert not torch.allclose(sum(apart), expected)
