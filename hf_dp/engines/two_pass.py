"""Two backward passes over one graph: the first for norms, the second for sums; nothing is kept between.

Book-keeping keeps every layer's input and output gradient until the norms are known. Under gradient
checkpointing that is most of what checkpointing saved. Here each layer's factor is dropped as soon as
it was used, at the price of a second backward pass without weight gradients.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_dp.clipping.base import ClippingPolicy
from hf_dp.clipping.loss import LossRelease
from hf_dp.engines.base import (
    ExampleLoss,
    gradient_clipping,
    released_losses,
    sums_of_all,
)
from hf_dp.engines.owners import Owners
from hf_dp.engines.powers import norms_of, power_sums
from hf_dp.engines.precision import full_precision
from hf_dp.engines.recorder import Pass
from hf_dp.engines.rows import batch_size
from hf_dp.engines.sharded import Ranks, refuse_sharded
from hf_dp.engines.shares import Shares, cancelling, checked_shape
from hf_dp.engines.vectorised import VectorisedEngine
from hf_dp.events import Norm
from hf_dp.layers.factors import Factor, Mat, wide
from hf_dp.sums import ClippedSum


class TwoPassEngine(VectorisedEngine):
    """Vectorised per-example clipping in little memory.

    Cost: with F the forward pass, 4 F plus norms where plain training takes 3 F; with gradient
    checkpointing 6 F where it takes 4 F.
    """

    name: ClassVar[str] = "two_pass"

    def _written_at_once(self, sizes: Sequence[int]) -> int:
        return max(sizes)

    def _check(self, model: nn.Module, inputs: Mapping[str, Any], owners: Owners | None) -> None:
        if owners is not None:
            why = "A user with rows on several ranks would be clipped once on each of them."
            refuse_sharded(model, "two_pass with users", why, remedy="Protect examples.")
        Ranks(model).check_equal(batch_size(inputs))

    def _clipped_sum(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        example_loss: ExampleLoss,
        clipping: ClippingPolicy,
        loss_release: LossRelease | None,
        owners: Owners | None,
    ) -> tuple[ClippedSum, bool]:
        ranks = Ranks(model)
        policy = gradient_clipping(clipping, loss_release)
        found: dict[str, Tensor] = {}
        with self.recorder.forward(model, inputs, example_loss, owners) as passed:
            parameters = passed.parameters
            norms = _Norms(passed, clipping.norm)
            passed.backward(norms.measure, again=True)
            with full_precision(passed.losses.device):
                apart = cancelling(norms.total(), norms.uncancelled, policy.sensitivity).nonzero()
            if ranks.any(len(apart) > 0):
                norms.apart = apart
                passed.backward(norms.measure_apart, again=True)
            with full_precision(passed.losses.device):
                total = norms.total()
                dropped = ~torch.isfinite(total)
                weights = policy.weights(norms.of_all())
                shares = Shares(dropped, apart)
            at_once = ranks.agree(tuple(norms.squared))  # on the order in which sums come

            def add(name: str, factor: Factor) -> None:
                factor, shrunk = norms.no_longer(name, factor, weights[name])
                found[name] = shares.of(factor, shrunk)
                checked_shape(name, found[name], parameters[name].shape)
                if at_once:
                    found.update(ranks.own_parts({name: found[name]}))

            passed.backward(add)
        summed = ClippedSum(
            grads=ranks.own_parts(sums_of_all(parameters, found)),
            norms=norms_of(total, clipping.norm),
            losses=passed.losses,
            loss_sum=released_losses(passed.losses, dropped, clipping, loss_release),
        )
        # the ranks of a sharded model run it together, and as often
        return summed, not ranks.together and bool(dropped.any())


class _Norms:
    """Squared norms per parameter, or L1 norms of gradients written out, as factors come and go."""

    def __init__(self, passed: Pass, norm: Norm) -> None:
        self._norm = norm
        self._passed = passed
        self._marks: dict[str, tuple[Tensor, Tensor]] = {}
        self._vectors: dict[int, Tensor] = {}
        self.bad = ~torch.isfinite(passed.losses)
        zeros = torch.zeros_like(wide(passed.losses))
        self.squared: dict[str, Tensor] = {}
        self._nothing = {"": zeros.masked_fill(self.bad, torch.inf)}
        self.uncancelled = zeros
        self.apart = zeros.new_zeros(0, 1, dtype=torch.long)

    def measure(self, name: str, factor: Factor) -> None:
        if self._norm == "l1":
            sums = power_sums(factor.dense().values, "l1")
            self.squared[name] = sums.masked_fill(self.bad, torch.inf)
            return
        self.squared[name] = factor.squared_norm().clamp_min(0).masked_fill(self.bad, torch.inf)
        self.uncancelled = self.uncancelled + factor.uncancelled()
        if isinstance(factor, Mat) and self._passed.recomputed:
            self._marks[name] = self._mark(factor)

    def measure_apart(self, name: str, factor: Factor) -> None:
        """Norms of the units whose positions cancel, from their gradients written out."""
        for unit in self.apart:
            self.squared[name][unit] = factor.select(unit).dense().squared_norm()

    def no_longer(self, name: str, factor: Factor, weights: Tensor) -> tuple[Factor, Tensor]:
        """Factor and weights such that no share is longer than the norm it was weighted by.

        A matrix product is made of what the one forward pass saved, unless a checkpoint computed that
        again; then it shows by random sums of its rows whether it is the same. Other factors may come
        from a module that was run again, and may not have repeated itself.
        """
        if self._norm == "l2" and isinstance(factor, Mat) and self._repeated(name, factor):
            return factor, weights
        if self._norm == "l1":
            factor = written = factor.dense()
            again = power_sums(written.values, "l1")
        else:
            again = factor.squared_norm()
        for unit in self.apart:
            again[unit] = factor.select(unit).dense().squared_norm()
        lost = ~torch.isfinite(again)
        least = torch.finfo(again.dtype).tiny
        ratio = norms_of((self.squared[name] / again.clamp_min(least)).clamp_max(1), self._norm)
        ratio = torch.where(again > least, ratio, torch.ones_like(ratio)).masked_fill(lost, 0)
        return (factor.without(lost) if bool(lost.any()) else factor), weights * ratio

    def _repeated(self, name: str, factor: Mat) -> bool:
        if not self._passed.recomputed:
            return True
        return name in self._marks and all(map(torch.equal, self._marks[name], self._mark(factor)))

    def _mark(self, factor: Mat) -> tuple[Tensor, Tensor]:
        left, right = (side @ self._vector(side) for side in (factor.left, factor.right))
        return left, right

    def _vector(self, side: Tensor) -> Tensor:
        """The same for all sides of that width; from a generator of its own."""
        width = side.shape[-1]
        if width not in self._vectors:
            generator = torch.Generator().manual_seed(secrets.randbits(63))
            self._vectors[width] = torch.randn(width, generator=generator)
        return self._vectors[width].to(side)

    def of_all(self) -> Mapping[str, Tensor]:
        """For each parameter that took part; of no parameter where none did."""
        return self.squared or self._nothing

    def total(self) -> Tensor:
        return torch.stack(list(self.of_all().values())).sum(0)
