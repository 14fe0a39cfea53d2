"""Is a layer rule right: its factors against autograd on one unit at a time."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from hf_dp.engines.precision import full_precision
from hf_dp.errors import ConfigurationError, explain
from hf_dp.layers.base import LayerRule, LayerRules
from hf_dp.layers.factors import Factor, Vec, combine
from hf_dp.layers.recognise import DEFAULT_LAYER_RULES, recognise
from hf_dp.testing.disagreement import DisagreementError


def check_layer_rule(
    module: nn.Module,
    inputs: Tensor,
    rules: LayerRules = DEFAULT_LAYER_RULES,
    *,
    tolerance: float = 1e-8,
) -> None:
    """Compare the rule that `rules` has for `module` with autograd on each unit alone, in float64.

    Checked are, for every trainable parameter: the norm per unit, the share of each unit, the same for
    a module that is called twice (its two gradients have a cross term), and that a dropped unit leaves
    nothing behind. The module is copied; neither it nor `inputs` changes.

    Args:
        module: A layer; its trainable parameters are those with ``requires_grad``.
        inputs: Two or more units on the first axis, all different, with several positions if the layer
            takes any: a fault that does not show on them is not found.
        rules: Module type -> rule, as for the engines.
        tolerance: Relative. A layer that computes in float32 whatever it is given needs 1e-5.

    Raises:
        ConfigurationError: There is nothing to check.
        DisagreementError: The rule is wrong; the message says where.
    """
    module = copy.deepcopy(module).double()
    for part in module.modules():
        part.training = False  # an overridden eval() may do more than that
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    rule = _rule_for(module, inputs, rules)
    calls = [_Call(module, inputs, seed=1), _Call(module, inputs.flip(0), seed=2)]
    owned = {name: p for name, p in module.named_parameters() if p.requires_grad}
    factors = [_answers(rule, call, owned) for call in calls]
    for name in owned:
        what = f"{type(module).__qualname__}.{name}"
        expected = [call.gradients(owned[name]) for call in calls]
        with full_precision(inputs.device):
            _compare(what, factors[0][name], expected[0], tolerance)
            both = combine([answers[name] for answers in factors])
            _compare(f"{what}, called twice", both, expected[0] + expected[1], tolerance)
            _compare_dropped(what, factors[1][name], expected[1], tolerance)


class _Call:
    """One call of the module, with a gradient for its output."""

    def __init__(self, module: nn.Module, inputs: Tensor, *, seed: int) -> None:
        self.module = module
        self.inputs = inputs
        with torch.no_grad():
            shape = module(inputs).shape
        generator = torch.Generator().manual_seed(seed)  # made-up numbers: nothing private
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.output_grads = drawn.to(inputs.device)

    @property
    def num_units(self) -> int:
        return len(self.inputs)

    def gradients(self, parameter: nn.Parameter) -> Tensor:
        """By autograd, each unit alone, ``(B, *shape)``."""
        each = []
        for unit in range(self.num_units):
            one = slice(unit, unit + 1)
            loss = (self.module(self.inputs[one]) * self.output_grads[one]).sum()
            [grad] = torch.autograd.grad(loss, [parameter], materialize_grads=True)
            each.append(grad)
        return torch.stack(each)


def _rule_for(module: nn.Module, inputs: Tensor, rules: LayerRules) -> LayerRule:
    rule = recognise(module, rules)
    if rule is None:
        raise ConfigurationError(
            explain(
                "rules",
                type(module).__qualname__,
                "a rule for the module's type",
                "It has none, so the generic rule would answer for it, which needs no check.",
                "Pass rules={**DEFAULT_LAYER_RULES, TheModule: your_rule}; a rule of a parent class is "
                "used only if forward is the parent's.",
            )
        )
    if len(inputs) < 2 or not any(p.requires_grad for p in module.parameters()):
        raise ConfigurationError(
            explain(
                "inputs",
                tuple(inputs.shape),
                "two or more units on the first axis, and a module that trains something",
                "With one unit no mix-up of units can show.",
                "Pass a batch of different rows, and a module with requires_grad=True.",
            )
        )
    return rule


def _answers(rule: LayerRule, call: _Call, owned: dict[str, nn.Parameter]) -> dict[str, Factor]:
    before = call.inputs.clone(), call.output_grads.clone()
    with full_precision(call.inputs.device):
        given = list(rule(call.module, call.inputs, call.output_grads, call.num_units))
    if not (torch.equal(before[0], call.inputs) and torch.equal(before[1], call.output_grads)):
        raise DisagreementError(
            "the rule changes what it is given: expected it to leave inputs and output_grads alone. "
            "Other layers share them. Use out-of-place operations."
        )
    answers: dict[str, Factor] = {}
    for name, parameter in owned.items():
        parts = [factor for answered, factor in given if answered is parameter]
        if not parts:
            raise DisagreementError(
                f"{name}: expected the rule to yield a factor for every trainable parameter. It yields "
                "none, so the gradient would not be clipped. Yield (parameter, factor) for it."
            )
        answers[name] = combine(parts)
    return answers


def _compare(what: str, factor: Factor, expected: Tensor, tolerance: float) -> None:
    squared = expected.flatten(1).square().sum(1)
    _same(f"{what}: the norm", factor.squared_norm().sqrt(), squared.sqrt(), tolerance)
    for unit in range(len(expected)):
        only = torch.zeros(len(expected), dtype=torch.float64, device=expected.device)
        only[unit] = 1
        _same(
            f"{what}: the share of unit {unit}",
            factor.weighted_sum(only),
            expected[unit],
            tolerance,
        )


def _compare_dropped(what: str, factor: Factor, expected: Tensor, tolerance: float) -> None:
    dropped = torch.zeros(len(expected), dtype=torch.bool, device=expected.device)
    dropped[0] = True
    ones = torch.ones(len(expected), dtype=torch.float64, device=expected.device)
    left = factor.without(dropped).weighted_sum(ones)
    _same(f"{what}: the sum without unit 0", left, expected[1:].sum(0), tolerance)


def _same(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    if found.shape != expected.shape:
        raise DisagreementError(
            f"{what} has shape {tuple(found.shape)}: expected {tuple(expected.shape)}, that of the "
            "gradient. Arrange the factor's sides as the parameter is stored."
        )
    gap = float(Vec((found - expected)[None]).squared_norm().sqrt())
    size = float(Vec(expected[None]).squared_norm().sqrt())
    if not gap <= tolerance * max(size, 1e-30) + 1e-30:
        raise DisagreementError(
            f"{what} is off by {gap:.3g} where autograd gives a length of {size:.3g}: expected agreement "
            f"to {tolerance:g}. Then the clipped sum would be wrong. Mend the rule."
        )
