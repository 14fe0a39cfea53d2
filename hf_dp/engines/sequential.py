"""One example at a time: slow, obvious, exact for every model. The oracle, and the fall-back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_dp.clipping.base import ClippingPolicy
from hf_dp.clipping.loss import LossRelease
from hf_dp.engines.base import (
    ExampleLoss,
    GradientEngine,
    checked_losses,
    empty_sum,
    gradient_clipping,
    released_losses,
    trainable_parameters,
)
from hf_dp.engines.precision import full_precision
from hf_dp.engines.rows import batch_size, row
from hf_dp.engines.sharded import refuse_sharded
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.factors import Vec, wide
from hf_dp.sums import ClippedSum


class SequentialEngine(GradientEngine):
    """Ordinary autograd on each example alone. Cost: B forward and backward passes of batch size 1."""

    name: ClassVar[str] = "sequential"

    def clipped_sum(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        example_loss: ExampleLoss,
        clipping: ClippingPolicy,
        loss_release: LossRelease | None = None,
    ) -> ClippedSum:
        refuse_sharded(model, self.name, "One rank's examples would be run on all of them.")
        summed = empty_sum(model, loss_release)
        for index in range(batch_size(inputs)):
            one = _one(model, row(inputs, index), example_loss, clipping, loss_release)
            summed = summed + one
        return summed


def _one(
    model: nn.Module,
    example: Mapping[str, Any],
    example_loss: ExampleLoss,
    clipping: ClippingPolicy,
    loss_release: LossRelease | None,
) -> ClippedSum:
    parameters = trainable_parameters(model)
    loss = checked_losses(example_loss(model, example), 1)
    grads = _gradients(loss, parameters)
    with full_precision(loss.device):
        loss = loss.detach()
        squared = {name: Vec(grad[None]).squared_norm() for name, grad in grads.items()}
        squared = {
            name: values.masked_fill(~torch.isfinite(loss), torch.inf)
            for name, values in squared.items()
        }
        total = torch.stack(list(squared.values())).sum(0)  # (1,)
        dropped = ~torch.isfinite(total)
        weights = gradient_clipping(clipping, loss_release).weights(squared)
        summed = {
            name: torch.zeros_like(grad)
            if bool(dropped)
            else grad * weights[name][0].to(grad.dtype)
            for name, grad in grads.items()
        }
    return ClippedSum(
        grads=summed,
        norms=total.sqrt(),
        losses=loss,
        loss_sum=released_losses(loss, dropped, clipping, loss_release),
    )


def _gradients(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    found: tuple[Tensor | None, ...] = (None,) * len(parameters)
    before = [parameter.grad for parameter in parameters.values()]
    if loss.requires_grad:
        found = torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
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
        name: torch.zeros_like(wide(p.detach())) if grad is None else wide(grad)
        for (name, p), grad in zip(parameters.items(), found, strict=True)
    }
