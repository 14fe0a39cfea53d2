"""One backward pass: taps record, rules turn records into factors, factors give norms and sums.

Source:
    Bu et al. (2023), arXiv:2210.00038 (book-keeping).
"""

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
    empty_sum,
    gradient_clipping,
    released_losses,
)
from hf_dp.engines.precision import full_precision
from hf_dp.engines.recorder import Recorder
from hf_dp.engines.rows import batch_size
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.base import LayerRules
from hf_dp.layers.factors import Factor, sum_of, wide
from hf_dp.layers.recognise import DEFAULT_LAYER_RULES
from hf_dp.sums import ClippedSum

# Positions are said to cancel where the squared norm is below this part of what it would be if they
# were orthogonal. The Gram form then loses digits in proportion, to the example's advantage. Above it
# T positions, contrived so that all their roundings agree, can gain about 5e-7 * T of the norm.
_CANCELLING = 0.5
# Gradients shorter than this part of the sensitivity need no exact norm.
_NEGLIGIBLE = 1e-6


class BookKeepingEngine(GradientEngine):
    """Vectorised per-example clipping in one backward pass, for layers that have a rule."""

    name: ClassVar[str] = "book_keeping"

    def __init__(self, layer_rules: LayerRules = DEFAULT_LAYER_RULES) -> None:
        """Use `layer_rules` (module type -> rule); what they lack is recognised by computation."""
        self.recorder = Recorder(layer_rules)

    def clipped_sum(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        example_loss: ExampleLoss,
        clipping: ClippingPolicy,
        loss_release: LossRelease | None = None,
    ) -> ClippedSum:
        if batch_size(inputs) == 0:
            return empty_sum(model, loss_release)
        factors: dict[str, Factor] = {}

        def keep(name: str, factor: Factor) -> None:
            factor.settle()
            factors[name] = factor

        with self.recorder.forward(model, inputs, example_loss) as passed:
            passed.backward(keep)
        losses = passed.losses
        policy = gradient_clipping(clipping, loss_release)
        with full_precision(losses.device):
            squared = _squared_norms(factors, losses)
            apart = _cancelling(factors, squared, policy.sensitivity).nonzero()  # (few, 1)
            for unit in apart:
                for name, factor in factors.items():
                    squared[name][unit] = factor.select(unit).dense().squared_norm()
            total = sum_of(list(squared.values()))
            dropped = ~torch.isfinite(total)
            summed = empty_sum(model, None).grads
            _add_weighted(summed, factors, policy.weights(squared), dropped, apart)
        return ClippedSum(
            grads=summed,
            norms=total.sqrt(),
            losses=losses,
            loss_sum=released_losses(losses, dropped, clipping, loss_release),
        )


def _squared_norms(factors: Mapping[str, Factor], losses: Tensor) -> dict[str, Tensor]:
    """Squared norms per parameter; inf where the loss is not finite, so that the unit is dropped."""
    bad = ~torch.isfinite(losses)
    squared = {name: factor.squared_norm().clamp_min(0) for name, factor in factors.items()}
    return {
        name: values.masked_fill(bad, torch.inf)
        for name, values in (squared or {"": torch.zeros_like(wide(losses))}).items()
    }


def _cancelling(
    factors: Mapping[str, Factor], squared: Mapping[str, Tensor], sensitivity: float
) -> Tensor:
    """Units whose positions cancel so much that norm and share are lost in rounding, ``(B,)`` bool.

    They are taken apart: their gradients are written out, and both norm and share come from the same
    numbers, so that what is added is bounded however far those are from the truth.
    """
    total = sum_of(list(squared.values()))
    if not factors:
        return torch.zeros_like(total, dtype=torch.bool)
    uncancelled = sum_of([factor.uncancelled() for factor in factors.values()])
    matters = uncancelled > (_NEGLIGIBLE * sensitivity) ** 2
    return matters & (total < _CANCELLING * uncancelled)


def _add_weighted(
    summed: Mapping[str, Tensor],
    factors: Mapping[str, Factor],
    weights: Mapping[str, Tensor],
    dropped: Tensor,
    apart: Tensor,
) -> None:
    """Add each unit's weighted share to `summed`; units `apart`, ``(few, 1)``, one by one."""
    elsewhere = dropped.clone()
    elsewhere[apart.flatten()] = True
    kept = [unit for unit in apart if not bool(dropped[unit])]
    clean = bool(elsewhere.any())
    for name, factor in factors.items():
        together = factor.without(elsewhere) if clean else factor
        share = together.weighted_sum(weights[name])
        # copying another shape would repeat it, and its norm would not hold
        if share.shape != summed[name].shape:
            raise UncoveredParameterError(
                f"the layer rule for parameter {name!r} gave gradients of shape {tuple(share.shape)}: "
                f"expected {tuple(summed[name].shape)}. Its norms are not those of the gradient. Mend "
                "the rule, or use engine='sequential'."
            )
        summed[name].copy_(share)
        for unit in kept:
            summed[name].add_(factor.select(unit).dense().weighted_sum(weights[name][unit]))
