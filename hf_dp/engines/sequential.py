"""One unit at a time: slow, obvious, exact for every model. The oracle, and the fall-back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_dp._validate import positive_integer
from hf_dp.clipping.base import ClippingPolicy
from hf_dp.clipping.loss import LossRelease
from hf_dp.engines.base import (
    ExampleLoss,
    GradientEngine,
    checked_losses,
    empty_sum,
    gradient_clipping,
    refuse_without_gradients,
    released_losses,
    trainable_parameters,
)
from hf_dp.engines.given_losses import with_own_batches
from hf_dp.engines.owners import Owners, checked_owners
from hf_dp.engines.powers import norms_of, power_sums
from hf_dp.engines.precision import full_precision
from hf_dp.engines.reentrant import reentrant_refused, refuse_reentrant
from hf_dp.engines.rows import batch_size, rows
from hf_dp.engines.sharded import refuse_sharded
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.factors import dense, wide
from hf_dp.sums import ClippedSum


class SequentialEngine(GradientEngine):
    """Ordinary autograd on each unit alone. Cost: a forward and a backward pass for each.

    A unit of several rows may be larger than memory: its rows are taken `rows_at_once` at a time, and their
    gradients added up before they are clipped as one.
    """

    name: ClassVar[str] = "sequential"

    def __init__(self, rows_at_once: int = 1) -> None:
        """Take at most `rows_at_once` rows of one unit together."""
        positive_integer(
            "SequentialEngine.rows_at_once",
            rows_at_once,
            "It is how many of one user's examples are in memory together.",
            "Use per_device_train_batch_size.",
        )
        self.rows_at_once = rows_at_once

    def clipped_sum(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        example_loss: ExampleLoss,
        clipping: ClippingPolicy,
        loss_release: LossRelease | None = None,
        owners: Owners | None = None,
    ) -> ClippedSum:
        refuse_without_gradients()
        refuse_sharded(model, self.name, "One rank's examples would be run on all of them.")
        checked_owners(owners, inputs)
        example_loss = with_own_batches(example_loss)
        owners = owners or Owners((1,) * batch_size(inputs))
        summed = empty_sum(model, loss_release)
        for unit in _units(inputs, owners):
            loss, grads = self._of_unit(model, unit, example_loss, owners)
            summed = summed + _clipped(loss, grads, clipping, loss_release)
        return summed

    def _of_unit(
        self, model: nn.Module, unit: Mapping[str, Any], example_loss: ExampleLoss, owners: Owners
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a unit's rows, ``(1,)``, and its gradient as its owner's reduction has it."""
        parameters = trainable_parameters(model)
        size = batch_size(unit)
        mine = Owners((size,), owners.reduction)
        losses: list[Tensor] = []
        total: dict[str, Tensor] = {}
        for start in range(0, size, self.rows_at_once):
            stop = min(start + self.rows_at_once, size)
            each = checked_losses(example_loss(model, rows(unit, start, stop)), stop - start)
            grads = gradients_of(each if mine.sums else each / size, parameters)
            losses.append(each.detach())
            for name, grad in grads.items():
                total[name] = total[name] + grad if name in total else grad  # two may be one tensor
        return mine.means(torch.cat(losses)), total


def _units(inputs: Mapping[str, Any], owners: Owners) -> Iterator[dict[str, Any]]:
    start = 0
    for size in owners.sizes:
        yield rows(inputs, start, start + size)
        start += size


def _clipped(
    loss: Tensor,
    grads: Mapping[str, Tensor],
    clipping: ClippingPolicy,
    loss_release: LossRelease | None,
) -> ClippedSum:
    """The clipped sum of one unit, from its loss ``(1,)`` and its gradient."""
    with full_precision(loss.device):
        bad = ~torch.isfinite(loss)
        sums = {
            name: power_sums(grad[None], clipping.norm).masked_fill(bad, torch.inf)
            for name, grad in grads.items()
        }
        total = torch.stack(list(sums.values())).sum(0)  # (1,)
        dropped = ~torch.isfinite(total)
        weights = gradient_clipping(clipping, loss_release).weights(sums)
        summed = {
            name: torch.zeros_like(grad)
            if bool(dropped)
            else grad * weights[name][0].to(grad.dtype)
            for name, grad in grads.items()
        }
    return ClippedSum(
        grads=summed,
        norms=norms_of(total, clipping.norm),
        losses=loss,
        loss_sum=released_losses(loss, dropped, clipping, loss_release),
    )


def gradients_of(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """By plain autograd, of the sum of `loss`, by name; zeros for what took no part.

    Raises:
        UncoveredParameterError: The model runs another backward pass inside.
    """
    found: tuple[Tensor | None, ...] = (None,) * len(parameters)
    before = [parameter.grad for parameter in parameters.values()]
    if loss.requires_grad:
        with reentrant_refused():
            found = torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
        if any(grad is None for grad in found):
            refuse_reentrant(loss)
    for (name, parameter), old in zip(parameters.items(), before, strict=True):
        if parameter.grad is not old:
            for other, own in zip(parameters.values(), before, strict=True):
                other.grad = own
            raise UncoveredParameterError(
                f"parameter {name!r}: expected its gradient from the one backward pass. The model runs "
                "another inside (reversible layers, reentrant checkpoints), which hands it on unclipped. "
                "Use a model, or a setting, that does not."
            )
    return {
        name: torch.zeros_like(wide(p.detach())) if grad is None else dense(grad)
        for (name, p), grad in zip(parameters.items(), found, strict=True)
    }
