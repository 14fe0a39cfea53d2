"""The rule for every module without a formula: run its forward again, unit by unit, and differentiate.

The first way that works is taken: a short one for modules of a certain kind, tables whose forward does
more than look up (`hf_dp.layers.lookup`), fused experts (`hf_dp.layers.experts`) and LoRA on these
(`hf_dp.layers.adapted_experts`); all units at once by ``torch.func.vmap``; one unit after another. Where
the gradients of all units together would be large they are never held at once: norms are taken unit by
unit and the gradients computed again for the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.adapted_experts import adapted_experts_of
from hf_dp.layers.factors import Factor, Vec
from hf_dp.layers.lookup import lookup_of
from hf_dp.layers.packing import Packing
from hf_dp.layers.recognise_experts import experts_of
from hf_dp.layers.whole import WholeCall

# More numbers than this are not held for one call: 64 MB in float32.
MOST_HELD = 1 << 24
# What vectorised and unit by unit may differ by, relative to a parameter's gradient: rounding, in any dtype.
_AGREEMENT = 2e-2
# And to all parameters' together, in float32 and below: that of a key's bias is nothing but rounding.
_OF_ALL = {False: 1e-5, True: 1e-2}

Shortcut = Callable[[WholeCall], Sequence[Factor] | None]
# Name -> the short way for a module, or None.
_SHORTCUTS: dict[str, Callable[[nn.Module], Shortcut | None]] = {
    "lookup": lookup_of,
    "experts": experts_of,
    "adapted experts": adapted_experts_of,
}


class GenericRule:
    """What one tapped module's whole calls add to its parameters' gradients.

    Attributes:
        vectorises: Whether ``vmap`` can run the module; found out when it first cannot.
        repeats: Whether outputs that serve all units alike are repeated, so that gradients come apart.
        shortcut: Name and rule of the short way for it; `try_out` finds out whether it is right.
        forms: The forms that were used: "lookup", "experts", "adapted experts", "vectorised",
            "one by one", "recomputed".
    """

    def __init__(self, module: nn.Module) -> None:
        """Nothing is known of `module` but its type."""
        self.vectorises = not any(getattr(m, "sparse", False) for m in module.modules())
        self.repeats = False
        found = ((name, rule_for(module)) for name, rule_for in _SHORTCUTS.items())
        self.shortcut = next(((name, rule) for name, rule in found if rule is not None), None)
        self.forms: set[str] = set()

    def __call__(self, call: WholeCall) -> Iterator[tuple[nn.Parameter, Factor]]:
        """A factor for each of the call's parameters."""
        factors = self._factors(call)
        yield from zip(call.parameters, factors, strict=True)

    def _factors(self, call: WholeCall) -> Sequence[Factor]:
        if self.shortcut is not None:
            name, rule = self.shortcut
            factors = rule(call)
            if factors is not None:
                self.forms.add(name)
                return factors
        if call.num_units * call.numel > MOST_HELD:
            self.forms.add("recomputed")
            source = _PerUnit(call)
            return [Recomputed(source, index) for index in range(len(call.parameters))]
        if self.vectorises and self.shortcut is None and call.drawn is None:
            vectorised = self._vectorised(call)
            if vectorised is not None:
                self.forms.add("vectorised")
                return [Vec(grad) for grad in vectorised]
        self.forms.add("one by one")
        each = [call.unit_grads(unit) for unit in range(call.num_units)]
        return [Vec(torch.stack(grads)) for grads in zip(*each, strict=True)]

    def _vectorised(self, call: WholeCall) -> list[Tensor] | None:
        try:
            return call.vmapped_grads()
        except UncoveredParameterError:
            raise
        except (
            Exception
        ):  # foreign code under vmap: it may fail in any way, and then goes unit by unit
            self.vectorises = False
            return None

    def try_out(self, call: WholeCall) -> None:
        """Settle which form is right, by computation; `call` is of two or so units.

        Raises:
            UncoveredParameterError: The module reaches a parameter in a way that cannot be followed.
        """
        if call.drawn is not None:
            return
        if call.misses():
            raise UncoveredParameterError(
                f"{type(call.module).__qualname__}: expected it to use its parameters under the names that "
                "they are registered by. A use of the tensor itself, say from a list, has a gradient "
                "that could not be told apart. Use engine='sequential', or register it."
            )
        each = [call.unit_grads(unit) for unit in range(call.num_units)]
        expected = [torch.stack(grads) for grads in zip(*each, strict=True)]
        if self.shortcut is not None and not _answers(self.shortcut[1], call, expected):
            self.shortcut = None
        if self.shortcut is None and call.num_units * call.numel <= MOST_HELD:
            found = self._vectorised(call)
            self.vectorises = found is not None and _agree(found, expected, coarse=call.rounds)


def _answers(rule: Shortcut, call: WholeCall, expected: Sequence[Tensor]) -> bool:
    try:
        factors = rule(call)
        found = None if factors is None else [factor.dense().values for factor in factors]
    except Exception:  # foreign code runs again, and may fail in any way
        return False
    return found is not None and _agree(found, expected, coarse=call.rounds)


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor], *, coarse: bool) -> bool:
    lengths = [float(gradient.norm()) for gradient in expected]
    rounding = _OF_ALL[coarse] * sum(length**2 for length in lengths) ** 0.5 + 1e-30
    return all(
        one.shape == other.shape and float((one - other).norm()) <= _AGREEMENT * length + rounding
        for one, other, length in zip(found, expected, lengths, strict=True)
    )


class _PerUnit:
    """The gradients of one call, computed again whenever they are needed, one unit at a time."""

    def __init__(self, call: WholeCall) -> None:
        self.call = call
        self._squares: list[Tensor] | None = None
        self._weights: Tensor | None = None
        self._sums: dict[int, Tensor] = {}

    @property
    def num_units(self) -> int:
        return self.call.num_units

    def grad(self, unit: int, index: int) -> Tensor:
        with torch.no_grad():
            return self.call.unit_grads(unit)[index]

    def squares(self, index: int) -> Tensor:
        """Squared norm per unit, ``(B,)``; all parameters' are taken in one go."""
        if self._squares is None:
            rows = [
                torch.stack([_square(grad) for grad in self.call.unit_grads(unit)])
                for unit in range(self.num_units)
            ]
            self._squares = list(torch.stack(rows, 1))
        return self._squares[index]

    def weighted_sum(self, weights: Tensor, index: int) -> Tensor:
        """One parameter's sum; all parameters' are taken in one go, as the next ask with these weights."""
        if self._weights is None or not torch.equal(self._weights, weights) or not self._sums:
            self._weights = weights.clone()
            self._sums = dict(enumerate(self._all_sums(weights)))
        return self._sums.pop(index) if index in self._sums else self._all_sums(weights)[index]

    def _all_sums(self, weights: Tensor) -> list[Tensor]:
        sums = [torch.zeros_like(Vec(p.detach()).values) for p in self.call.parameters]
        before = torch.stack([self.squares(index) for index in range(len(sums))])  # (P, B)
        for unit in weights.nonzero().flatten().tolist():
            for total, grad, known in zip(
                sums, self.call.unit_grads(unit), before[:, unit], strict=True
            ):
                total.add_(grad * (weights[unit] * _shrink(grad, known)).to(grad.dtype))
        return sums


class _Added:
    """Several calls of one module, as far as one parameter is concerned."""

    def __init__(self, parts: Sequence[tuple[_PerUnit | _Added, int]]) -> None:
        self.parts = tuple(parts)
        self._known: Tensor | None = None

    @property
    def num_units(self) -> int:
        return self.parts[0][0].num_units

    def grad(self, unit: int, index: int) -> Tensor:
        total = self.parts[0][0].grad(unit, self.parts[0][1])
        for source, place in self.parts[1:]:
            total = total + source.grad(unit, place)
        return total

    def squares(self, index: int) -> Tensor:
        if self._known is None:
            units = range(self.num_units)
            self._known = torch.stack([_square(self.grad(unit, index)) for unit in units])
        return self._known

    def weighted_sum(self, weights: Tensor, index: int) -> Tensor:
        known = self.squares(index)
        total = torch.zeros_like(self.grad(0, index))
        for unit in weights.nonzero().flatten().tolist():
            grad = self.grad(unit, index)
            total.add_(grad * (weights[unit] * _shrink(grad, known[unit])).to(grad.dtype))
        return total


class Recomputed(Factor):
    """Gradients too large to hold for all units at once: norms now, the sum from a second run.

    Guarantees:
        * A unit's share is no longer than the norm it was weighted by, although accelerators may not
          repeat a sum bit by bit.
    """

    def __init__(
        self, source: _PerUnit | _Added, index: int, units: Sequence[int] | None = None
    ) -> None:
        """Parameter `index` of `source`, for some `units`; -1 stands for a unit that was dropped."""
        self.source = source
        self.index = index
        self.units = list(range(source.num_units) if units is None else units)

    def squared_norm(self) -> Tensor:
        known = self.source.squares(self.index)
        kept = torch.tensor(self.units, device=known.device)
        return known[kept].masked_fill(kept < 0, 0)

    def uncancelled(self) -> Tensor:
        return self.squared_norm()

    def cross(self, other: Factor) -> Tensor:
        each = []
        for place in range(len(self.units)):
            one = torch.tensor([place], device=self.source.squares(self.index).device)
            each.append(self.select(one).dense().cross(other.select(one)))
        return torch.cat(each)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        whole = weights.new_zeros(self.source.num_units)
        for unit, weight in zip(self.units, weights, strict=True):
            if unit >= 0:
                whole[unit] += weight
        return self.source.weighted_sum(whole, self.index)

    def without(self, dropped: Tensor) -> Recomputed:
        units = [-1 if gone else u for u, gone in zip(self.units, dropped.tolist(), strict=True)]
        return Recomputed(self.source, self.index, units)

    def select(self, units: Tensor) -> Recomputed:
        return Recomputed(self.source, self.index, [self.units[u] for u in units.tolist()])

    def grouped(self, packing: Packing) -> Factor:
        if packing.is_trivial:
            return self
        first = self.select(torch.tensor([0])).dense().values
        sums = first.new_zeros(packing.num_units, *first.shape[1:])
        for row, unit in enumerate(
            packing.owners.tolist()
        ):  # one row's gradient in memory at a time
            sums[unit] += self.select(torch.tensor([row])).dense().values[0]
        return Vec(sums)

    def dense(self) -> Vec:
        empty = torch.zeros_like(self.source.grad(0, self.index)) if -1 in self.units else None
        rows = [
            empty if unit < 0 and empty is not None else self.source.grad(unit, self.index)
            for unit in self.units
        ]
        return Vec(torch.stack(rows))

    def merged(self, other: Factor) -> Factor | None:
        if not isinstance(other, Recomputed) or self.units != other.units:
            return None
        parts = [(self.source, self.index), (other.source, other.index)]
        return Recomputed(_Added(parts), 0, self.units)


def _square(grad: Tensor) -> Tensor:
    return Vec(grad[None]).squared_norm()[0]


def _shrink(grad: Tensor, known: Tensor) -> Tensor:
    """At most one: by how much `grad` is longer than it was when its norm was taken."""
    now = _square(grad)
    return (known / now.clamp_min(torch.finfo(now.dtype).tiny)).clamp_max(1).sqrt()
