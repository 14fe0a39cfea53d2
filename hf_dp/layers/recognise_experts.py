"""Which modules are fused experts: found by what they compute, never by their name.

Dozens of classes of transformers compute it, under several names, stored either way round, with biases
or without, in several implementations. So a small twin of the module is run on random numbers, and the
rule's answers are compared with autograd on one unit at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.layers.experts import Experts, Gate, Stack

_WIDTH, _INNER = 16, 4  # of the twin; the kernels of grouped products want multiples of 16 bytes
_MOST_EXPERTS = 2**12
_AGREEMENT = 1e-4  # relative; leaves room for modules that compute in float32 inside


def experts_of(module: nn.Module) -> Experts | None:
    """The rule for `module`, if a small twin of it computes what the rule assumes."""
    if "forward" in vars(module):
        return None
    return next((rule for rule in _candidates(module) if _is_right(module, rule)), None)


def _own_gate(module: nn.Module, up: Tensor) -> Tensor:
    gated: Tensor = module._apply_gate(up)  # type: ignore[operator]
    return gated


def _gated(module: nn.Module, up: Tensor) -> Tensor:
    gate, linear = up.chunk(2, dim=-1)
    return _activated(module, gate) * linear


def _activated(module: nn.Module, up: Tensor) -> Tensor:
    activated: Tensor = module.act_fn(up)  # type: ignore[operator]
    return activated


def _candidates(module: nn.Module) -> Iterator[Experts]:
    own = {name: p for name, p in module._parameters.items() if p is not None}
    weights = [name for name, p in own.items() if p.dim() == 3]
    biases: list[Any] = [name for name, p in own.items() if p.dim() == 2]
    counts = {len(p) for p in own.values() if p.dim() > 0}
    if len(weights) != 2 or len(own) != 2 + len(biases) or len(biases) > 2 or len(counts) != 1:
        return
    if max(counts) > _MOST_EXPERTS:
        return
    gates: list[Gate] = [_own_gate] if hasattr(module, "_apply_gate") else []
    gates += [_gated, _activated] if hasattr(module, "act_fn") else []
    for names, ways in product(permutations(weights), product((False, True), repeat=2)):
        for pair in permutations([*biases, *[None] * (2 - len(biases))]):
            up, down = (_stack(own, *parts) for parts in zip(names, pair, ways, strict=True))
            if up is not None and down is not None and up.wide_in == down.wide_out:
                for gate in gates:
                    if up.wide_out in ((down.wide_in,) if gate is _activated else _both(down)):
                        yield Experts(up, down, gate)


def _both(down: Stack) -> tuple[int, int]:
    return down.wide_in, 2 * down.wide_in


def _stack(
    own: dict[str, nn.Parameter], weight: str, bias: str | None, transposed: bool
) -> Stack | None:
    d, p = own[weight].shape[1:][::-1] if transposed else own[weight].shape[1:]
    if bias is not None and own[bias].shape[1] != d:
        return None
    return Stack(weight, bias, transposed, p, d)


def _is_right(module: nn.Module, rule: Experts) -> bool:
    """Whether the rule's answers for a twin with few numbers are those of autograd, unit by unit.

    In float64, or in float32 if the module's kernels have no other; one expert gets no token.
    """
    return any(_agrees(module, rule, dtype) for dtype in (torch.float64, torch.float32))


def _agrees(module: nn.Module, rule: Experts, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)  # a public check: nothing private is involved

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    units, tokens = 2, 5
    count = len(module.get_parameter(rule.up.weight))
    scores = torch.rand(units, tokens, max(1, min(count - 1, 5)), generator=generator)
    index = scores.topk(min(2, scores.shape[2]), dim=-1).indices
    hidden, grads = (drawn(units, tokens, _WIDTH) for _ in range(2))
    # small and large, so that limits show
    hidden = hidden * torch.logspace(-1, 1, units * tokens).view(units, tokens, 1).to(dtype)
    weights = drawn(*index.shape)
    try:
        with torch.random.fork_rng(devices=[]):
            twin = _twin(module, rule, drawn)
            off = torch.autocast("cpu", enabled=False)
            found = rule.answers(twin, hidden, index, weights, grads, off)
            for unit in range(units):
                with torch.enable_grad():
                    output = twin.forward(hidden[unit], index[unit], weights[unit])
                names = list(found)
                expected = torch.autograd.grad(
                    output, [twin.get_parameter(name) for name in names], grads[unit]
                )
                for name, gradient in zip(names, expected, strict=True):
                    mine = found[name].dense().values[unit]
                    if not (mine - gradient).norm() <= _AGREEMENT * gradient.norm():
                        return False
    except Exception:  # foreign code, tried on a guess: it may fail in any way
        return False
    return True


def _twin(module: nn.Module, rule: Experts, drawn: Callable[..., Tensor]) -> nn.Module:
    """The module with random parameters of small widths, without anyone's hooks."""
    twin = copy.copy(module)
    ratio = rule.up.wide_out // rule.down.wide_in
    small = [(rule.up, _WIDTH, ratio * _INNER), (rule.down, _INNER, _WIDTH)]
    twin._parameters = {}
    count = len(module.get_parameter(rule.up.weight))
    for stack, p, d in small:
        shape = (count, p, d) if stack.transposed else (count, d, p)
        twin._parameters[stack.weight] = nn.Parameter(drawn(*shape))
        if stack.bias is not None:
            twin._parameters[stack.bias] = nn.Parameter(drawn(count, d))
    return twin
