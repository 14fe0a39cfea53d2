"""The interface of a gradient engine: from one micro-batch to its clipped sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_dp.clipping.base import ClippingPolicy
from hf_dp.clipping.loss import LossRelease
from hf_dp.engines.owners import Owners
from hf_dp.engines.sharded import whole_parameters
from hf_dp.errors import ConfigurationError, explain
from hf_dp.layers.factors import wide
from hf_dp.sums import ClippedSum

ExampleLoss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
"""``example_loss(model, inputs)`` gives one loss per example, ``(B,)``, each from its own row alone."""

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


class GradientEngine(ABC):
    """Computes clipped sums. Engines agree with one another up to rounding."""

    name: ClassVar[str]

    def prepare(self, model: nn.Module) -> None:
        """Look `model` up as it is now, before somebody tries it without its dropout."""
        return

    @abstractmethod
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
        """The sum over a micro-batch of clipped per-unit gradients.

        Args:
            model: Trainable parameters are those with ``requires_grad``.
            inputs: Tensors with the examples on their first axis, ``(B, ...)``, and other values.
            example_loss: One loss per example.
            clipping: Bounds gradient and loss coordinate together.
            loss_release: How the loss enters the release; None leaves it out.
            owners: Which rows make a unit, clipped as one; None if each row is a unit. ``norms`` and
                ``losses`` (means over a unit's rows) of the result are then ``(U,)``.

        Guarantees:
            * One unit moves the result by at most ``clipping.sensitivity``, whatever it holds; a unit
              whose gradient or loss is not finite adds nothing.
        """


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, each once, in the model's order.

    Raises:
        ConfigurationError: There is none, hooks on one of them would see private gradients, or one is
            complex.
    """
    found = {name: p for name, p in whole_parameters(model).items() if p.requires_grad}
    if not found:
        raise ConfigurationError(
            f"model={type(model).__name__}: expected at least one parameter with requires_grad=True. "
            "There is nothing to train. Unfreeze a layer, or add an adapter."
        )
    for name, parameter in found.items():
        if parameter._backward_hooks or parameter.dtype.is_complex:
            raise _refused(name, parameter)
    return found


def _refused(name: str, parameter: nn.Parameter) -> ConfigurationError:
    if parameter.dtype.is_complex:
        return ConfigurationError(
            explain(
                f"model.{name}.dtype",
                parameter.dtype,
                "trainable parameters of real numbers",
                "Norms and noise are those of real numbers: half of its gradient would be lost.",
                "Keep its real and imaginary part in a real parameter, for torch.view_as_complex in the "
                "forward pass, or freeze it.",
            )
        )
    hooks = [getattr(hook, "func", hook) for hook in (parameter._backward_hooks or {}).values()]
    whose = sorted({str(getattr(h, "__module__", type(h).__module__)) for h in hooks})
    watching = any(module.split(".")[0] == "wandb" for module in whose)
    return ConfigurationError(
        explain(
            f"model.{name}",
            f"hooks of {', '.join(whose)}",
            "no gradient hooks on trainable parameters",
            "They would see, or change, single examples' gradients before they are clipped.",
            "Leave WANDB_WATCH unset." if watching else "Use a model, or an adapter, without them.",
        )
    )


def refuse_without_gradients() -> None:
    """Refuse to run where torch records no gradients: every sum would be zero, and look right.

    Raises:
        ConfigurationError: They are off.
    """
    if not torch.is_grad_enabled():
        raise ConfigurationError(
            "clipped_sum: expected gradients to be on. Within torch.no_grad() or torch.inference_mode() "
            "every sum is zero. Call it outside, or within torch.enable_grad()."
        )


def checked_losses(losses: Tensor, num_units: int) -> Tensor:
    """`losses`, if there is one per unit; a mean over the batch would be clipped as a whole."""
    if losses.shape != (num_units,):
        raise ConfigurationError(
            explain(
                "example_loss",
                tuple(losses.shape),
                f"one loss per example, of shape ({num_units},)",
                "A loss over several examples has one gradient for all of them, so none is clipped alone.",
                "Reduce over each example's own positions only, as with reduction='none'.",
            )
        )
    return losses


def empty_sum(model: nn.Module, loss_release: LossRelease | None) -> ClippedSum:
    """The clipped sum of no examples: zeros. An empty draw is still a release."""
    grads = sums_of_all(trainable_parameters(model), {})
    none = next(iter(grads.values())).new_zeros(0)
    loss_sum = None if loss_release is None else none.sum()
    return ClippedSum(grads=grads, norms=none, losses=none, loss_sum=loss_sum)


def sums_of_all(
    parameters: Mapping[str, nn.Parameter], found: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The sums in the model's order; zeros, float32 or wider, for parameters that took no part."""
    return {
        name: found[name] if name in found else torch.zeros_like(wide(parameter.detach()))
        for name, parameter in parameters.items()
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY)


def gradient_clipping(clipping: ClippingPolicy, loss_release: LossRelease | None) -> ClippingPolicy:
    """The policy for the gradient alone: what the loss's coordinate leaves of the sensitivity."""
    if loss_release is None:
        return clipping
    return clipping.scaled(loss_release.gradient_share(clipping.norm))


def released_losses(
    losses: Tensor, dropped: Tensor, clipping: ClippingPolicy, loss_release: LossRelease | None
) -> Tensor | None:
    """The loss coordinate's sum, 0-d, over the units that were not dropped."""
    if loss_release is None:
        return None
    coordinates = loss_release.coordinates(wide(losses), sensitivity=clipping.sensitivity)
    return coordinates.masked_fill(dropped, 0).sum()
