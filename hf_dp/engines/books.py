"""The books of one backward pass: factors with their norms, taken as they come, in few kernels.

A layer's own pieces are small: a bias, a norm's gain, an adapter, a Gram matrix. Reduced one by one they
would cost more kernels than the layer's forward and backward. So Gram matrices wait in a buffer and are
summed together, and gradients of the same small size are stacked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_dp.engines.shares import Shares, checked_shape
from hf_dp.engines.together import Group
from hf_dp.layers.factors import Factor, Mat, Vec
from hf_dp.layers.gram import GramBatch
from hf_dp.layers.per_unit import squares_of_rows
from hf_dp.layers.scaled import ScaledProducts

SMALL = 2**16
"""Numbers per unit up to which a gradient written out is stacked with others of its size."""
SquaresOfSome = tuple[Sequence[str], Tensor, Tensor]
"""Names of k parameters, and ``(k, B)`` each: squared norms, and what they would be if positions were
orthogonal."""
_PATIENCE = 4  # layers whose last positions are in use, until the others' are believed to be, too


class Books:
    """Factors by parameter name, and their squared norms."""

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._factors: dict[str, Factor] = {}
        self._groups: list[Group] = []
        self._small: dict[int, dict[str, Vec]] = defaultdict(dict)
        self._stacks: list[_Stack] = []
        self._squares: list[SquaresOfSome] = []
        self._grams = GramBatch()
        self._patience = _PATIENCE

    def add(self, name: str, factor: Factor) -> None:
        """Keep the gradient of one parameter in its cheapest form, and take its norm."""
        if isinstance(factor, Mat) and self._patience:
            self._patience -= not factor.trimmed()
        factor.settle()
        written = factor.written()
        if written is not None:
            numbers = written.values.numel() // max(1, len(written.values))
            if numbers <= SMALL:
                self._small[numbers][name] = written
                return
        self._factors[name] = factor
        if written is None and type(factor) is Mat:
            self._grams.add(name, factor.left, factor.right)
        else:
            self._note([name], factor)

    def add_group(self, group: Group) -> None:
        """Keep the gradients of several parameters, and take their norms together."""
        factor = group.factor
        factor.settle()
        self._groups.append(group)
        self._note(group.names, factor)

    def _note(self, names: Sequence[str], factor: Factor) -> None:
        """The norms of a factor that has the units of each of these parameters in turn."""
        squared = factor.squared_norm().view(len(names), -1)
        settled = factor.written() is not None
        uncancelled = squared if settled else factor.uncancelled().view(len(names), -1)
        self._squares.append((names, squared, uncancelled))

    def norms(self, losses: Tensor) -> Norms:
        """Squared norms of all parameters; inf where the loss, ``(B,)``, is not finite."""
        for group in self._small.values():
            stack = _Stack(group)
            squared = stack.squared_norms()
            self._squares.append((list(stack.shapes), squared, squared))
            self._stacks.append(stack)
        self._small.clear()
        for name, squares in self._grams.results().items():
            self._squares.append(([name], squares.squared[None], squares.uncancelled[None]))
        return Norms(self._squares, losses)

    def take_apart(self, norms: Norms, units: Tensor) -> None:
        """Norms of some units, ``(few, 1)``, anew from their gradients written out."""
        while self._groups:
            self._factors.update(self._groups.pop().factors())
        for unit in units:
            for name, factor in self._factors.items():
                norms.squared[name][unit] = factor.select(unit).dense().squared_norm()

    def sums(
        self,
        weights: Mapping[str, Tensor],
        shapes: Mapping[str, torch.Size],
        shares: Shares | None,
    ) -> dict[str, Tensor]:
        """``sum_i weights[i] * gradient_i`` per parameter; factors are let go as they are used.

        Args:
            weights: Per parameter, ``(B,)``.
            shapes: The parameters' shapes.
            shares: Which units are left out or added one by one; None if every unit is as usual.
        """
        found: dict[str, Tensor] = {}
        products = ScaledProducts()
        while self._factors:
            name = next(iter(self._factors))
            factor = self._factors.pop(name)
            if shares is not None:
                found[name] = shares.of(factor, weights[name])
            elif type(factor) is Mat and factor.written() is None:
                found[name] = products.weighted_sum(factor.left, factor.right, weights[name])
            else:
                found[name] = factor.weighted_sum(weights[name])
            checked_shape(name, found[name], shapes[name])
        while self._groups:
            summed = self._groups.pop().weighted_sums(weights)
            for name, share in summed.items():
                checked_shape(name, share, shapes[name])
            found.update(summed)
        for stack in self._stacks:
            found.update(stack.sums(weights, shapes, None if shares is None else shares.dropped))
        self._stacks.clear()
        return found


class Norms:
    """Squared norms per parameter and unit.

    Attributes:
        squared: Parameter name -> ``(B,)``, at least zero; inf where the loss is not finite.
        uncancelled: What their sum would be if positions were orthogonal, ``(B,)``.
    """

    def __init__(self, squares: Sequence[SquaresOfSome], losses: Tensor) -> None:
        """Made by `Books.norms`."""
        none = torch.zeros_like(losses)[None]
        names = [name for some, _, _ in squares for name in some] or [""]
        self._all = torch.cat([squared for _, squared, _ in squares] or [none])  # (P, B)
        self.uncancelled = torch.cat([other for _, _, other in squares] or [none]).sum(0)
        self._all.clamp_(min=0).masked_fill_(~torch.isfinite(losses), torch.inf)
        self.squared = dict(zip(names, self._all.unbind(), strict=True))

    def total(self) -> Tensor:
        """Squared norm of each unit's whole gradient, ``(B,)``."""
        return self._all.sum(0)


class _Stack:
    """Gradients written out, of one size, as one tensor."""

    def __init__(self, group: Mapping[str, Vec]) -> None:
        self.shapes = {name: vec.values.shape[1:] for name, vec in group.items()}
        self.values = torch.stack(
            [vec.values.reshape(len(vec.values), -1) for vec in group.values()], 1
        )  # (B, k, n)

    def squared_norms(self) -> Tensor:
        """``(k, B)``."""
        return squares_of_rows(self.values.flatten(0, 1)).view(self.values.shape[:2]).mT

    def sums(
        self,
        weights: Mapping[str, Tensor],
        shapes: Mapping[str, torch.Size],
        dropped: Tensor | None,
    ) -> dict[str, Tensor]:
        values = self.values
        if dropped is not None:
            values = values.masked_fill(dropped[:, None, None], 0)
        mine = [weights[name].to(values.dtype) for name in self.shapes]
        if all(other is mine[0] for other in mine):
            summed = torch.mv(values.flatten(1).mT, mine[0]).view(values.shape[1:])
        else:
            scale = torch.stack(mine)[:, None, :]  # (k, 1, B)
            summed = torch.bmm(scale, values.transpose(0, 1)).squeeze(1)
        found: dict[str, Tensor] = {}
        for (name, shape), row in zip(self.shapes.items(), summed.unbind(), strict=True):
            checked_shape(name, found.setdefault(name, row.view(shape)), shapes[name])
        return found
