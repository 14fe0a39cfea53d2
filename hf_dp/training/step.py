"""The private side of one optimizer step: from micro-batches to a clipped sum, and what it showed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.engines.base import ExampleLoss, GradientEngine, empty_sum
from hf_dp.errors import PrivacyError
from hf_dp.plan import PrivacyPlan
from hf_dp.sums import ClippedSum, NoisySum


def clipped_sum_of(
    model: nn.Module,
    micro_batches: Iterable[Mapping[str, Any]],
    *,
    engine: GradientEngine,
    example_loss: ExampleLoss,
    plan: PrivacyPlan,
) -> ClippedSum:
    """The clipped sum over all micro-batches of a draw; zeros for an empty draw.

    Raises:
        PrivacyError: The model keeps something of the examples in a buffer.
    """
    before = {name: (buffer, _version(buffer)) for name, buffer in model.named_buffers()}
    summed = empty_sum(model, plan.loss_release)
    for micro_batch in micro_batches:
        summed = summed + engine.clipped_sum(
            model,
            micro_batch,
            example_loss=example_loss,
            clipping=plan.clipping,
            loss_release=plan.loss_release,
        )
    _refuse_changed_buffers(model, before)
    return summed


def _refuse_changed_buffers(model: nn.Module, before: Mapping[str, tuple[Tensor, int]]) -> None:
    """Refuse running statistics: they carry private examples, unnoised, into later steps and the file."""
    for name, buffer in model.named_buffers():
        old, version = before.get(name, (buffer, _version(buffer)))
        if buffer is old:
            changed = version != _version(buffer)
        else:  # put there anew; a table of positions may grow
            changed = buffer.shape == old.shape and not torch.equal(buffer, old.to(buffer.device))
        if changed:
            raise PrivacyError(
                f"model.{name}: expected a buffer that training leaves as it is. It gathers statistics of "
                "private examples, neither clipped nor noised, and is saved with the model. "
                "Switch them off (track_running_stats=False), or replace the layer by LayerNorm."
            )


def _version(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version


def set_gradients(model: nn.Module, released: NoisySum, divisor: float) -> None:
    """Put the noisy sum, divided by a public constant, where the optimizer looks."""
    for name, parameter in model.named_parameters():
        if name in released.grads:
            parameter.grad = (released.grads[name] / divisor).to(parameter.dtype)


def released_loss(released: NoisySum, plan: PrivacyPlan, device: torch.device) -> Tensor:
    """The mean training loss that the release shows, 0-d; zero where none is released."""
    if plan.loss_release is None or released.loss_sum is None:
        return torch.zeros((), device=device)
    loss = plan.loss_release.mean_loss(
        released.loss_sum, sensitivity=plan.clipping.sensitivity, divisor=plan.expected_batch_size
    )
    return loss.to(device, torch.float32)
