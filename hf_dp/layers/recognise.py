"""Which rule fits a module: by exact type where torch defines it, else by what its forward computes.

A name proves nothing: dozens of transformers classes are called RMSNorm, and a subclass may change
``forward``. So a module that is not one of torch's own is run on a random input and compared with the
formula its rule assumes; only agreement gives it the rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_dp.layers.base import LayerRule, LayerRules
from hf_dp.layers.conv import convolution, group_norm, is_plain_convolution
from hf_dp.layers.embedding import embedding, is_plain_embedding
from hf_dp.layers.linear import linear, transposed_linear
from hf_dp.layers.norm import epsilon_of, layer_norm, rms_norm, rms_norm_offset

DEFAULT_LAYER_RULES: LayerRules = {
    nn.Linear: linear,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.GroupNorm: group_norm,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
}

# Formulas that hold for inputs of any rank, with the width last.
ANY_LEADING_AXES: frozenset[LayerRule] = frozenset(
    {linear, transposed_linear, embedding, layer_norm, rms_norm, rms_norm_offset}
)
_CONDITIONS: Mapping[LayerRule, Callable[[nn.Module], bool]] = {
    embedding: is_plain_embedding,
    convolution: is_plain_convolution,
}

Formula = Callable[[nn.Module, Tensor], Tensor]


def recognise(module: nn.Module, rules: LayerRules = DEFAULT_LAYER_RULES) -> LayerRule | None:
    """The rule that covers `module`'s own parameters, or None.

    Args:
        module: A module that owns parameters directly.
        rules: Module type -> rule. A subclass gets its parent's rule only if it runs the parent's
            ``forward``; a module whose ``forward`` was replaced on the instance gets none.
    """
    if "forward" in vars(module):
        return None
    for cls in type(module).__mro__:
        if cls in rules and _computation(type(module)) == _computation(cls):
            rule = rules[cls]
            fits = _CONDITIONS.get(rule)
            return rule if fits is None or fits(module) else None
    return _by_computation(module)


def _computation(cls: type) -> tuple[object, object]:
    return getattr(cls, "forward", None), getattr(cls, "_conv_forward", None)


def is_relative_bias_owner(module: nn.Module) -> bool:
    """Whether `module` looks its attention bias up in ``compute_bias``, without a unit axis."""
    table = getattr(module, "relative_attention_bias", None)
    return (
        isinstance(table, nn.Embedding)
        and is_plain_embedding(table)
        and table.padding_idx is None
        and callable(getattr(type(module), "compute_bias", None))
        and "compute_bias" not in vars(module)
    )


def _by_computation(module: nn.Module) -> LayerRule | None:
    own = dict(module.named_parameters(recurse=False))
    foreign_table = isinstance(module, nn.Embedding)  # too large to try out in vain
    if foreign_table or any(True for _ in module.children()) or "weight" not in own:
        return None
    weight = own["weight"]
    candidates: list[tuple[LayerRule, Formula]] = []
    if set(own) == {"weight"} and weight.dim() == 1:
        candidates = [(rms_norm, _rms_gain), (rms_norm_offset, _rms_one_plus_gain)]
    elif set(own) <= {"weight", "bias"} and weight.dim() == 2:
        candidates = [(transposed_linear, _transposed), (linear, _linear)]
    for rule, formula in candidates:
        width = weight.shape[1 if rule is linear else 0]
        if _computes(module, formula, width):
            return rule
    return None


def _rms_gain(module: nn.Module, x: Tensor) -> Tensor:
    return _over_rms(module, x) * module.get_parameter("weight")


def _rms_one_plus_gain(module: nn.Module, x: Tensor) -> Tensor:
    return _over_rms(module, x) * (1 + module.get_parameter("weight"))


def _over_rms(module: nn.Module, x: Tensor) -> Tensor:
    eps = epsilon_of(module, x.dtype)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _transposed(module: nn.Module, x: Tensor) -> Tensor:
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    return F.linear(x, weight.mT, bias)


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.get_parameter("weight"), module._parameters.get("bias"))


def _computes(module: nn.Module, formula: Formula, width: int) -> bool:
    """Whether `module` agrees with `formula` on random inputs, large and small, and random parameters.

    Values and gradients are compared, in training and in evaluation mode, for inputs of two and of
    three axes. A float64 copy is run; the tolerance leaves room for modules that compute in float32
    inside. The small inputs make a wrong eps visible.
    """
    generator = torch.Generator().manual_seed(0)  # a public check: nothing private is involved
    x = torch.randn(2, 3, width, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-4, 1, 6, dtype=torch.float64).view(2, 3, 1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            twin = copy.deepcopy(module).cpu().double().requires_grad_()
            for parameter in twin.parameters():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
            return all(
                _agree(twin.train(training), formula, inputs)
                for training in (True, False)
                for inputs in (x, x.flatten(0, 1))
            )
    except Exception:  # foreign code, tried on a guess: it may fail in any way
        return False


def _agree(twin: nn.Module, formula: Formula, x: Tensor) -> bool:
    actual, expected = twin(x), formula(twin, x)
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return False
    cotangent = torch.randn(x.shape[:-1], generator=torch.Generator().manual_seed(1)).double()
    found = [actual, *_gradients(actual, cotangent, twin)]
    wanted = [expected, *_gradients(expected, cotangent, twin)]
    return all(
        torch.allclose(one.to(other), other, rtol=1e-4, atol=1e-7)
        for one, other in zip(found, wanted, strict=True)
    )


def _gradients(output: Tensor, cotangent: Tensor, twin: nn.Module) -> tuple[Tensor, ...]:
    weighted = (output * cotangent[..., None].to(output)).sum()
    return torch.autograd.grad(weighted, list(twin.parameters()))
