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


def keeps_tokens_apart(module: nn.Module) -> bool:
    """Whether `module` is fused experts that give each token among others what they give it alone.

    Outputs and gradients of a small twin's tokens are compared with those of each token in a call of its
    own.
    """
    rule = experts_of(module)
    return rule is not None and any(
        _keeps_apart(module, rule, dtype) for dtype in (torch.float64, torch.float32)
    )


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
    drawn = _draws(dtype)
    units = 2
    hidden, index, weights, grads = _routed(module, rule, drawn, units)
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


def _keeps_apart(module: nn.Module, rule: Experts, dtype: torch.dtype) -> bool:
    drawn = _draws(dtype)
    hidden, index, weights, grads = (
        given.flatten(0, 1) for given in _routed(module, rule, drawn, 2)
    )
    hidden, weights = hidden.requires_grad_(), weights.requires_grad_()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            twin = _twin(module, rule, drawn)

            def answer(tokens: slice) -> list[Tensor]:
                output = twin.forward(hidden[tokens], index[tokens], weights[tokens])
                found = torch.autograd.grad(output, [hidden, weights], grads[tokens])
                return [output.detach(), *(grad[tokens] for grad in found)]

            every = answer(slice(None))
            each = [answer(slice(token, token + 1)) for token in range(len(hidden))]
    except Exception:  # as above
        return False
    alone = (torch.cat(parts) for parts in zip(*each, strict=True))
    gaps = [
        ((one - other).abs().max(1), one.abs().amax(1))
        for one, other in zip(every, alone, strict=True)
    ]
    return all(bool((gap.values <= _AGREEMENT * size).all()) for gap, size in gaps)


def _draws(dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)  # a public check: nothing private is involved

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return drawn


def _routed(
    module: nn.Module, rule: Experts, drawn: Callable[..., Tensor], units: int, tokens: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens small and large, so that limits show; their experts, of which one gets none; and the rest."""
    count = len(module.get_parameter(rule.up.weight))
    scores = drawn(units, tokens, max(1, min(count - 1, 5)))
    index = scores.topk(min(2, scores.shape[2]), dim=-1).indices
    sizes = torch.logspace(-1, 1, units * tokens).view(units, tokens, 1)
    hidden = drawn(units, tokens, _WIDTH)
    return hidden * sizes.to(hidden), index, drawn(*index.shape), drawn(*hidden.shape)


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
