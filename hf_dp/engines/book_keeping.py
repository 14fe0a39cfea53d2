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
from hf_dp.engines.shares import Shares, cancelling
from hf_dp.layers.base import LayerRules
from hf_dp.layers.factors import Factor, sum_of, wide
from hf_dp.layers.recognise import DEFAULT_LAYER_RULES
from hf_dp.sums import ClippedSum


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
            apart = cancelling(
                sum_of(list(squared.values())),
                sum_of(
                    [factor.uncancelled() for factor in factors.values()] or [losses.new_zeros(())]
                ),
                policy.sensitivity,
            ).nonzero()  # (few, 1)
            for unit in apart:
                for name, factor in factors.items():
                    squared[name][unit] = factor.select(unit).dense().squared_norm()
            total = sum_of(list(squared.values()))
            dropped = ~torch.isfinite(total)
            weights = policy.weights(squared)
            share = Shares(dropped, apart)
            summed = empty_sum(model, None).grads
            for name, factor in factors.items():
                share.add(summed[name], name, factor, weights[name])
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
