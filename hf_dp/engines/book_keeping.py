"""One backward pass: taps record, rules turn records into factors, factors give norms and sums.

Source:
    Bu et al. (2023), arXiv:2210.00038 (book-keeping).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_dp.clipping.base import ClippingPolicy
from hf_dp.clipping.loss import LossRelease
from hf_dp.engines.axes import establish_axes
from hf_dp.engines.base import (
    ExampleLoss,
    GradientEngine,
    checked_losses,
    empty_sum,
    gradient_clipping,
    released_losses,
)
from hf_dp.engines.coverage import Coverage, coverage_of
from hf_dp.engines.precision import full_precision
from hf_dp.engines.rows import batch_size
from hf_dp.engines.tap import Call, recording
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.base import LayerRules
from hf_dp.layers.factors import Factor, combine, sum_of, wide
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
        self.layer_rules = layer_rules
        self._coverages: WeakKeyDictionary[nn.Module, Coverage] = WeakKeyDictionary()

    def coverage(self, model: nn.Module) -> Coverage:
        """Tap points of `model`, looked up anew when it trains other parameters than before."""
        known = self._coverages.get(model)
        if known is None or not known.fits(model):
            known = self._coverages[model] = coverage_of(model, self.layer_rules)
        return known

    def clipped_sum(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        example_loss: ExampleLoss,
        clipping: ClippingPolicy,
        loss_release: LossRelease | None = None,
    ) -> ClippedSum:
        num_units = batch_size(inputs)
        if num_units == 0:
            return empty_sum(model, loss_release)
        coverage = self._checked_coverage(model, inputs, example_loss)
        with recording(coverage, num_units) as record:
            losses = checked_losses(example_loss(model, inputs), num_units)
            record.backward(losses, list(coverage.parameters))
        losses = losses.detach()
        policy = gradient_clipping(clipping, loss_release)
        with full_precision(losses.device):
            factors = _factors(coverage, record.calls, num_units)
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

    def _checked_coverage(
        self, model: nn.Module, inputs: Mapping[str, Any], example_loss: ExampleLoss
    ) -> Coverage:
        coverage = self.coverage(model)
        if coverage.uncovered:
            first = next(iter(coverage.uncovered.items()))
            raise UncoveredParameterError(
                f"{len(coverage.uncovered)} trainable parameters, among them {first[0]!r} "
                f"({first[1]}): expected a layer rule for each. Their gradients could not be clipped. "
                "Freeze them, pass layer_rules={**DEFAULT_LAYER_RULES, TheModule: your_rule}, or use "
                "engine='sequential'."
            )
        if coverage.axes is None and batch_size(inputs) > 1:  # all of a batch of one is the one's
            establish_axes(model, inputs, coverage, example_loss)
        return coverage


def _factors(coverage: Coverage, calls: list[Call], num_units: int) -> dict[str, Factor]:
    names = {id(p): name for name, p in coverage.parameters.items()}
    contributions: dict[str, list[Factor]] = defaultdict(list)
    for call in calls:
        point = call.point
        if num_units > 1 and point.method == "forward" and point.name not in (coverage.axes or {}):
            raise UncoveredParameterError(
                f"module {point.name!r} took part for some examples only: expected every module with "
                "trainable parameters to run for the first examples too, which shows where its input "
                "has the examples. Use engine='sequential', or freeze it."
            )
        answers = list(point.rule(point.module, call.inputs, call.output_grads, num_units))
        answered = {id(parameter) for parameter, _ in answers}
        if answered != {id(parameter) for parameter in point.parameters}:
            raise UncoveredParameterError(
                f"the layer rule for {type(point.module).__qualname__} ({point.name!r}) answered for "
                f"{len(answered)} of {len(point.parameters)} trainable parameters: expected all. The "
                "others would not be clipped. Mend the rule, or use engine='sequential'."
            )
        for parameter, factor in answers:
            contributions[names[id(parameter)]].append(factor)
    return {
        name: combine(contributions[name]) for name in coverage.parameters if name in contributions
    }


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
