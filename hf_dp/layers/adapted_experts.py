"""The rule for LoRA on the matrices of fused experts, ``LoraConfig(target_parameters=...)`` of PEFT.

PEFT wraps the experts once for each matrix ``W``, ``(E, d, p)``, and puts ``W + s L R`` in its place, with
``L`` of ``(E, d, r)`` and ``R`` of ``(E, r, p)``. Where a row's part of the gradient of ``W_e`` is
``left^T right``, that of ``L_e`` is ``left^T (s right R_e^T)``, that of ``R_e`` ``(s left L_e)^T right``: one
side is a rank wide, and no gradient of a matrix is ever written out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.layers.experts import Experts
from hf_dp.layers.factors import Factor
from hf_dp.layers.recognise_experts import experts_of
from hf_dp.layers.routed import Layout, Routed
from hf_dp.layers.whole import WholeCall

_AGREEMENT = 1e-5  # relative, of a small wrapper in float32


def is_wrapper(module: nn.Module) -> bool:
    """Whether PEFT put `module` around another one to adapt a parameter of that."""
    kind = type(module)
    return kind.__name__ == "ParamWrapper" and kind.__module__.startswith("peft.")


def adapted_experts_of(module: nn.Module) -> AdaptedExperts | None:
    """The rule for `module`, if it wraps fused experts and adapts them as the formula has it."""
    wrappers = list(_wrappers(module))
    if not wrappers or not all(map(_is_right, wrappers)):
        return None
    rule = experts_of(wrappers[-1].base_layer)
    return None if rule is None else AdaptedExperts(rule)


@dataclass(frozen=True)
class AdaptedExperts:
    """The rule for one wrapper, and for those that it wraps.

    Attributes:
        rule: For the experts themselves.
    """

    rule: Experts

    def __call__(self, call: WholeCall) -> list[Factor] | None:
        """A factor for each of the call's parameters; None if the call is not as the formula has it."""
        wrappers = list(_wrappers(call.module))
        adapters = [_adapter_of(wrapper) for wrapper in wrappers]
        active = [(w, a) for w, a in zip(wrappers, adapters, strict=True) if a is not None]
        if len(active) < len(wrappers):
            return None
        pairs = [_Pair.of(wrapper, adapter) for wrapper, adapter in active]
        experts = copy.copy(wrappers[-1].base_layer)
        own = experts._parameters
        adapted = {w.parameter_name: _adapted(w, a, own[w.parameter_name]) for w, a in active}
        experts._parameters = {**own, **adapted}
        found = self.rule.of_call(call, experts)
        if found is None:
            return None
        answers = {id(own[name]): factor for name, factor in found.items()}
        for pair in pairs:
            answers |= pair.factors(found[pair.name])
        factors = [answers.get(id(parameter)) for parameter in call.parameters]
        return None if None in factors else [f for f in factors if f is not None]


@dataclass(frozen=True)
class _Pair:
    """One adapted matrix of each expert.

    Attributes:
        name: The matrices' name among the experts' parameters.
        first: PEFT's A, ``(E r, p)``.
        second: PEFT's B, ``(d, r E)``, if matrices are stored as ``(E, d, p)``; else d and p change places.
        scaling: s.
        turned: Whether they do.
        experts: E.
    """

    name: str
    first: Tensor
    second: Tensor
    scaling: float
    turned: bool
    experts: int

    @classmethod
    def of(cls, wrapper: Any, adapter: str) -> _Pair:
        """What a wrapper adds under an adapter."""
        return cls(
            wrapper.parameter_name,
            wrapper.lora_A[adapter].weight,
            wrapper.lora_B[adapter].weight,
            wrapper.scaling[adapter],
            not wrapper._did_swap_in_out_features,
            wrapper.num_experts,
        )

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """L and R."""
        first = self.first.detach().view(self.experts, -1, self.first.shape[1])
        second = self.second.detach().view(len(self.second), -1, self.experts).permute(2, 0, 1)
        return (first.mT, second.mT) if self.turned else (second, first)

    def factors(self, whole: Factor) -> Mapping[int, Factor]:
        """Id of A and of B -> its factor, from that of W."""
        assert isinstance(whole, Routed)
        counts = torch.bincount(whole.places // whole.num_units, minlength=self.experts).tolist()
        left_side, right_side = (side.to(whole.left.dtype) * self.scaling for side in self.sides)

        def through(rows: Tensor, matrices: Tensor) -> Tensor:
            parts = zip(rows.split(counts), matrices, strict=True)
            return torch.cat([some @ matrix for some, matrix in parts])

        of_left = (whole.left, through(whole.right, right_side.mT))  # (S, d), (S, r)
        of_right = (through(whole.left, left_side), whole.right)  # (S, r), (S, p)
        first, second = (of_left, of_right) if self.turned else (of_right, of_left)
        as_first: Layout = ((0, 2, 1) if self.turned else (0, 1, 2), tuple(self.first.shape))
        as_second: Layout = ((2, 1, 0) if self.turned else (1, 2, 0), tuple(self.second.shape))

        def stored(sides: tuple[Tensor, Tensor], layout: Layout) -> Routed:
            return Routed(
                *sides,
                whole.places,
                num_experts=self.experts,
                num_units=whole.num_units,
                layout=layout,
            )

        return {
            id(self.first): stored(first, as_first),
            id(self.second): stored(second, as_second),
        }


def _wrappers(module: Any) -> Iterator[Any]:
    while is_wrapper(module):
        yield module
        module = module.base_layer


def _adapter_of(wrapper: Any) -> str | None:
    """The adapter that is active, if it is the only one and not added to the matrices already."""
    active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    return (
        active[0] if len(active) == 1 and not (wrapper.disable_adapters or wrapper.merged) else None
    )


def _adapted(wrapper: Any, adapter: str, matrices: Tensor) -> nn.Parameter:
    """``W + s L R``, rounded where PEFT rounds."""
    with torch.no_grad(), torch.autocast(matrices.device.type, enabled=False):
        if hasattr(wrapper, "get_delta_factors"):  # since 0.21: L and R are rounded first
            left, right, scaling = wrapper.get_delta_factors(adapter)
            found = torch.baddbmm(matrices, left, right, alpha=scaling)
        else:
            found = matrices + wrapper.get_delta_weight(adapter)
    return nn.Parameter(found, requires_grad=False)


def _is_right(wrapper: Any) -> bool:
    """Whether PEFT adds, for random A and B of small widths, what the formula says."""
    rank, first, second = 2, 3, 5
    generator = torch.Generator().manual_seed(0)  # a public check: nothing private is involved
    adapter = _adapter_of(wrapper)
    if adapter is None or wrapper.num_experts < 2:
        return False
    try:
        twin, own = copy.copy(wrapper), wrapper.get_param().dtype
        ranks = rank * wrapper.num_experts
        small = {"lora_A": (ranks, first), "lora_B": (second, ranks)}
        twin._modules = dict(wrapper._modules)
        for name, (outputs, inputs) in small.items():
            layer = nn.Linear(inputs, outputs, bias=False)
            layer.weight.data = torch.randn(outputs, inputs, generator=generator)
            twin._modules[name] = nn.ModuleDict({adapter: layer})
        pair = _Pair.of(twin, adapter)
        expected = torch.matmul(*pair.sides) * pair.scaling
        found = _adapted(twin, adapter, expected.new_zeros(expected.shape, dtype=own))
        rounding = max(_AGREEMENT, 4 * torch.finfo(own).eps)
        return bool((found - expected).norm() <= rounding * expected.norm())
    except Exception:  # of another version of PEFT
        return False
