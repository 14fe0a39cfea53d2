"""The rule for fused experts: matrices ``(E, ...)``, and for each token which of them it is sent through.

    ``y_t = sum over j of w_tj (down_e(gate(up_e(x_t))))`` with ``e = index_tj``

The experts' first layer is run again and the output's gradient pushed back through the second, for all
units at once; then each layer's gradient is a sum of outer products of rows, by expert and unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_dp.layers.base import UnitAxis
from hf_dp.layers.factors import Factor, OneHot, wide
from hf_dp.layers.routed import Routed
from hf_dp.layers.whole import WholeCall

Gate = Callable[[nn.Module, Tensor], Tensor]
"""``gate(module, rows)``: what is between an expert's layers, row by row."""


@dataclass(frozen=True)
class Stack:
    """One of the two layers of all experts.

    Attributes:
        weight: The parameter's name, ``(E, d, p)`` or transposed.
        bias: The name of ``(E, d)``, if there is one.
        transposed: The weight is ``(E, p, d)``.
        wide_in: p.
        wide_out: d.
    """

    weight: str
    bias: str | None
    transposed: bool
    wide_in: int
    wide_out: int

    def matrices(self, module: nn.Module) -> Tensor:
        """``(E, d, p)``."""
        weight = module.get_parameter(self.weight).detach()
        return weight.mT if self.transposed else weight

    def forward(self, module: nn.Module, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows, packed by expert, through their expert's layer: ``(S, p)`` to ``(S, d)``."""
        matrices = self.matrices(module)
        bias = None if self.bias is None else module.get_parameter(self.bias).detach()
        parts = [
            F.linear(some.to(matrices.dtype), matrices[e], None if bias is None else bias[e])
            for e, some in enumerate(rows.split(counts))
            if len(some)
        ]
        return torch.cat(parts) if parts else rows.new_zeros(0, self.wide_out)

    def backward(self, module: nn.Module, grads: Tensor, counts: Sequence[int]) -> Tensor:
        """The gradient of the rows, ``(S, d)`` to ``(S, p)``."""
        matrices = self.matrices(module)
        parts = [
            some.to(matrices.dtype) @ matrices[e]
            for e, some in enumerate(grads.split(counts))
            if len(some)
        ]
        return torch.cat(parts) if parts else grads.new_zeros(0, self.wide_in)


@dataclass(frozen=True)
class _Routing:
    """Where each (token, slot) goes: packed by expert, units and tokens in their order.

    Attributes:
        order: Which of the flattened (token, slot) each packed row is, ``(S,)``.
        experts: Its expert, ``(S,)``.
        units: Its unit, ``(S,)``.
        counts: Rows of each expert.
        slots: How many (token, slot) there are; some may go to no expert.
        num_units: B.
    """

    order: Tensor
    experts: Tensor
    units: Tensor
    counts: list[int]
    slots: int
    num_units: int

    @classmethod
    def of(cls, index: Tensor, num_experts: int) -> _Routing:
        """For indices ``(B, T, k)``; those that name no expert are left out."""
        flat = index.reshape(-1).long()
        experts, order = flat.sort(stable=True)
        here = (experts >= 0) & (experts < num_experts)
        experts, order = experts[here], order[here]
        units = order // max(1, index.shape[1] * index.shape[2])
        counts = torch.bincount(experts, minlength=num_experts).tolist()
        return cls(order, experts, units, counts, flat.numel(), index.shape[0])

    def routed(self, left: Tensor, right: Tensor) -> Routed:
        """The factor of a weight."""
        return Routed(
            left,
            right,
            self.experts * self.num_units + self.units,
            num_experts=len(self.counts),
            num_units=self.num_units,
        )

    def looked_up(self, rows: Tensor) -> OneHot:
        """The factor of a bias, from packed rows ``(S, d)``."""
        rows = wide(rows)
        apart = rows.new_zeros(self.slots, rows.shape[1])
        ids = self.order.new_zeros(self.slots)
        apart[self.order], ids[self.order] = rows, self.experts
        shape = (self.num_units, -1)
        return OneHot(ids.view(shape), apart.view(*shape, rows.shape[1]), len(self.counts))


@dataclass(frozen=True)
class Experts:
    """The rule for one module.

    Attributes:
        up: From the tokens' width to the experts'.
        down: And back.
        gate: What is between, row by row.
    """

    up: Stack
    down: Stack
    gate: Gate

    def __call__(self, call: WholeCall) -> list[Factor] | None:
        """A factor for each of the call's parameters; None if the call is not as the formula has it."""
        own = call.module._parameters
        names = [next((n for n, p in own.items() if p is q), None) for q in call.parameters]
        answers = self.of_call(call, call.module)
        if answers is None or None in names:
            return None
        return [answers[name] for name in names if name is not None]

    def of_call(self, call: WholeCall, module: nn.Module) -> dict[str, Factor] | None:
        """Name -> factor, for a call of `module` or of what wraps it; None if it is not as expected."""
        roles, [grads], [axis] = _roles(call), call.output_grads, call.output_axes
        if roles is None or grads is None or call.drawn is not None:
            return None
        tensors = [_apart(one, where, call.num_units) for one, where in (*roles, (grads, axis))]
        hidden, index, weights, grads = tensors
        if not hidden.shape[:2] == index.shape[:2] == weights.shape[:2] == grads.shape[:2]:
            return None
        enabled, dtype = call.autocast
        autocast = torch.autocast(call.device.type, dtype=dtype, enabled=enabled)
        return self.answers(
            module,
            *(hidden, index, weights, grads, autocast),
            then=lambda outputs: call.check(call.marks.of_all([outputs])),
        )

    def answers(
        self,
        module: nn.Module,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
        grads: Tensor,
        autocast: torch.autocast,
        then: Callable[[Tensor], None] | None = None,
    ) -> dict[str, Factor]:
        """Name -> factor, from ``(B, T, d)``, ``(B, T, k)`` twice, and ``(B, T, d)``.

        The experts are run again, for all units at once: the first layer and the gate, and the second
        layer if `then` wants to see the outputs, ``(B, T, d)``.
        """
        slots = index.shape[2]
        routing = _Routing.of(index, len(self.up.matrices(module)))
        tokens = routing.order // max(1, slots)
        rows = hidden.flatten(0, 1)[tokens]
        scaled = grads.flatten(0, 1)[tokens] * weights.reshape(-1)[routing.order][:, None]
        with torch.no_grad(), autocast:
            before = self.up.forward(module, rows, routing.counts)
            above = self.down.backward(module, scaled, routing.counts)
        with torch.enable_grad(), autocast:
            before.requires_grad_()
            inner = self.gate(module, before)
        [below] = torch.autograd.grad(inner, [before], above.to(inner.dtype))
        if then is not None:
            with torch.no_grad(), autocast:
                made = self.down.forward(module, inner.detach(), routing.counts)
            scale = weights.reshape(-1)[routing.order][:, None]
            outputs = grads.new_zeros(grads.flatten(0, 1).shape, dtype=wide(made).dtype)
            then(outputs.index_add_(0, tokens, wide(made) * scale.to(outputs)).view(grads.shape))
        found: dict[str, Factor] = {}
        for stack, into, back in ((self.up, rows, below), (self.down, inner.detach(), scaled)):
            sides = (into, back) if stack.transposed else (back, into)
            found[stack.weight] = routing.routed(*sides)
            if stack.bias is not None:
                found[stack.bias] = routing.looked_up(back)
        return found


def _roles(call: WholeCall) -> list[tuple[Tensor, UnitAxis]] | None:
    """Tokens, experts' indices and experts' weights among what the module was given."""
    given = [
        (leaf, axis)
        for leaf, axis in zip(call.arguments, call.axes, strict=True)
        if isinstance(leaf, Tensor) and (axis.dim is not None or call.num_units == 1)
    ]
    floating = [pair for pair in given if pair[0].is_floating_point()]
    whole = [pair for pair in given if not pair[0].is_floating_point()]
    tensors = sum(isinstance(leaf, Tensor) for leaf in call.arguments)
    if (tensors, len(floating), len(whole), len(call.tapped)) != (3, 2, 1, 1):
        return None
    return [floating[0], whole[0], floating[1]]


def _apart(tensor: Tensor, axis: UnitAxis, num_units: int) -> Tensor:
    """``(B, T, width)``."""
    if num_units > 1:
        tensor = axis.units_first(tensor, num_units)
    return tensor.reshape(num_units, -1, tensor.shape[-1])
