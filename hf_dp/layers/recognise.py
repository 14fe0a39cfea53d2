"""Which rule fits a module: by exact type where torch defines it, else by what its forward computes.

A name proves nothing: dozens of transformers classes are called RMSNorm, and a subclass may change
``forward``. So a module that is not one of torch's own is run on a random input and compared with the
formula its rule assumes; only agreement gives it the rule.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_dp.layers.base import LayerRule, LayerRules
from hf_dp.layers.conv import convolution, group_norm, is_plain_convolution
from hf_dp.layers.embedding import embedding, is_plain_embedding
from hf_dp.layers.factors import dense, wide
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
CONDITIONS: Mapping[LayerRule, Callable[[nn.Module], bool]] = {
    embedding: is_plain_embedding,
    convolution: is_plain_convolution,
}

Formula = Callable[[nn.Module, Tensor], Tensor]
_ROUNDING = 1e-3, 5e-2  # of real outputs, relative to a row: in float32, and below it


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
            fits = CONDITIONS.get(rule)
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
    candidates: list[LayerRule] = []
    if set(own) == {"weight"} and weight.dim() == 1:
        candidates = [rms_norm, rms_norm_offset]
    elif set(own) <= {"weight", "bias"} and weight.dim() == 2:
        candidates = [transposed_linear, linear]
    for rule in candidates:
        width = weight.shape[1 if rule is linear else 0]
        if _computes(module, _FORMULAS[rule], width):
            return rule
    return None


def is_on_probation(module: nn.Module, rule: LayerRule | None) -> bool:
    """Whether `rule` was given to `module` for what it computed when it was tried, not for its type."""
    return rule in _FORMULAS and not type(module).__module__.startswith("torch.nn.")


def still_computes(module: nn.Module, rule: LayerRule, inputs: Tensor, output: object) -> bool:
    """Whether a module that `is_on_probation` gave, on a real input, what the rule's formula gives."""
    if not isinstance(output, Tensor) or inputs.dim() == 0:
        return False
    rounds = max(torch.finfo(tensor.dtype).eps for tensor in (inputs, output, *module.parameters()))
    twin = copy.copy(module)
    twin._parameters = {
        name: None if p is None else nn.Parameter(wide(p.detach()))
        for name, p in module._parameters.items()
    }
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        expected = _FORMULAS[rule](twin, wide(inputs))
    if output.shape != expected.shape:
        return False
    if not expected.numel():
        return True
    gap, size = (wide(output) - expected).abs(), expected.abs()
    coarse = rounds > torch.finfo(torch.float32).eps or inputs.is_cuda
    coarse |= torch.is_autocast_enabled(inputs.device.type)
    bound = _ROUNDING[coarse] * size.amax(-1) + torch.finfo(torch.float16).tiny
    # written so that what is not finite, which may come up in either, does not count
    return not bool((gap.amax(-1) > bound).any())


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


# Each is given the module for its parameters and its epsilon.
_FORMULAS: Mapping[LayerRule, Formula] = {
    rms_norm: _rms_gain,
    rms_norm_offset: _rms_one_plus_gain,
    transposed_linear: _transposed,
    linear: _linear,
}

# Shapes of further inputs, without the width, and the least and the largest scale of their rows.
_FURTHER: tuple[tuple[tuple[int, ...], float, float], ...] = (
    ((8,), 1, 4),
    ((16,), -2, 2),
    ((2, 2, 2), 0, 4),
    ((8, 1), 3, 5),
    ((1, 2), 0, 0),
)


def _computes(module: nn.Module, formula: Formula, width: int) -> bool:
    """Whether `module` agrees with `formula` on random inputs, large and small, and random parameters.

    Values and gradients (of matrices not for every input) are compared, in training and in evaluation
    mode, for inputs of two, three and four axes and of one to sixteen rows. A float64 copy is run; the
    tolerance leaves room for modules that compute in float32 inside. The small inputs make a wrong eps
    visible, the large ones a limit.
    """
    generator = torch.Generator().manual_seed(0)  # a public check: nothing private is involved

    def drawn(shape: tuple[int, ...], least: float, largest: float) -> Tensor:
        x = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
        scales = torch.logspace(least, largest, math.prod(shape), dtype=torch.float64)
        return x * scales.view(*shape, 1)

    x = drawn((2, 3), -4, 1)
    large = module.get_parameter("weight").dim() > 1  # gradients as large as it take their time
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            twin = copy.deepcopy(module).cpu().double().requires_grad_()
            for parameter in twin.parameters():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
            return all(
                _agree(_in_mode(twin, training), formula, inputs)
                for training in (True, False)
                for inputs in (x, x.flatten(0, 1))
            ) and all(
                _agree(_in_mode(twin, module.training), formula, drawn(*further), values_only=large)
                for further in _FURTHER
            )
    except Exception:  # foreign code, tried on a guess: it may fail in any way
        return False


def _in_mode(twin: nn.Module, training: bool) -> nn.Module:
    for module in twin.modules():  # an overridden train() may do more than that
        module.training = training
    return twin


def _agree(twin: nn.Module, formula: Formula, x: Tensor, *, values_only: bool = False) -> bool:
    actual, expected = twin(x), formula(twin, x)
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return False
    if values_only:
        return _close(actual.to(expected), expected)
    cotangent = torch.randn(x.shape[:-1], generator=torch.Generator().manual_seed(1)).double()
    found = [actual, *_gradients(actual, cotangent, twin)]
    wanted = [expected, *_gradients(expected, cotangent, twin)]
    return all(_close(one.to(other), other) for one, other in zip(found, wanted, strict=True))


def _close(found: Tensor, expected: Tensor) -> bool:
    """To 1e-4 of each number, or to 1e-6 of the largest in its row, which is what float32 rounds by."""
    size = expected.detach().abs().amax(-1, keepdim=True)
    allowed = 1e-4 * expected.abs() + 1e-6 * size + 1e-7
    return bool(((found - expected).abs() <= allowed).all())


def _gradients(output: Tensor, cotangent: Tensor, twin: nn.Module) -> tuple[Tensor, ...]:
    weighted = (output * cotangent[..., None].to(output)).sum()
    found = torch.autograd.grad(weighted, list(twin.parameters()))
    return tuple(map(dense, found))
