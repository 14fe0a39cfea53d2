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
    empty_sum,
    gradient_clipping,
    released_losses,
)
from hf_dp.engines.coverage import Coverage, coverage_of
from hf_dp.engines.rows import batch_size
from hf_dp.engines.tap import Call, recording
from hf_dp.errors import PrivacyError, UncoveredParameterError
from hf_dp.layers.base import LayerRules
from hf_dp.layers.factors import Factor, combine, sum_of, wide
from hf_dp.layers.recognise import DEFAULT_LAYER_RULES
from hf_dp.sums import ClippedSum

# Above this relative error of a Gram-form norm, positions cancel so much that it is recomputed.
_TRUSTED_NORM_ERROR = 1e-3
# An example whose share of the sum cannot be computed to this part of the sensitivity is dropped.
_TRUSTED_SHARE_ERROR = 1e-2


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
            losses = example_loss(model, inputs)
            record.backward(losses, list(coverage.parameters))
        losses = losses.detach()
        with torch.no_grad():
            factors = _factors(coverage, record.calls, num_units)
            squared = _squared_norms(factors, losses)
            total = sum_of(list(squared.values()))
            policy = gradient_clipping(clipping, loss_release)
            weights = policy.weights(squared)
            dropped = ~torch.isfinite(total) | _imprecise(factors, weights, policy)
            if bool(dropped.any()):
                factors = {name: factor.without(dropped) for name, factor in factors.items()}
            summed = empty_sum(model, None).grads
            for name, factor in factors.items():
                summed[name].copy_(factor.weighted_sum(weights[name]))
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
        if not coverage.axes:
            establish_axes(model, inputs, coverage, example_loss)
        return coverage


def _factors(coverage: Coverage, calls: list[Call], num_units: int) -> dict[str, Factor]:
    names = {id(p): name for name, p in coverage.parameters.items()}
    contributions: dict[str, list[Factor]] = defaultdict(list)
    for call in calls:
        point = call.point
        if point.method == "forward" and point.name not in coverage.axes:
            raise PrivacyError(
                f"module {point.name!r} took part for some examples only: expected every module with "
                "trainable parameters to run for the first example too, which shows where its input "
                "has the examples. Use engine='sequential', or freeze it."
            )
        answered = {
            p: f for p, f in point.rule(point.module, call.inputs, call.output_grads, num_units)
        }
        if {id(p) for p in answered} != {id(p) for p in point.parameters}:
            raise UncoveredParameterError(
                f"the layer rule for {type(point.module).__qualname__} ({point.name!r}) answered for "
                f"{len(answered)} of {len(point.parameters)} trainable parameters: expected all. The "
                "others would not be clipped. Mend the rule, or use engine='sequential'."
            )
        for parameter, factor in answered.items():
            contributions[names[id(parameter)]].append(factor)
    return {
        name: combine(contributions[name]) for name in coverage.parameters if name in contributions
    }


def _squared_norms(factors: Mapping[str, Factor], losses: Tensor) -> dict[str, Tensor]:
    """Squared norms per parameter; inf where the loss is not finite, so that the unit is dropped."""
    if not factors:
        zeros = torch.zeros_like(wide(losses))
        return {"": torch.where(torch.isfinite(losses), zeros, torch.inf)}
    squared = {name: factor.squared_norm() for name, factor in factors.items()}
    total = sum_of(list(squared.values()))
    eps = torch.finfo(total.dtype).eps
    doubtful = eps * _squared_magnitude(factors) > _TRUSTED_NORM_ERROR * total
    doubtful &= torch.isfinite(total)
    if bool(doubtful.any()):
        units = doubtful.nonzero().flatten()
        for name, factor in factors.items():
            squared[name][units] = factor.select(units).dense().squared_norm()
    bad = ~torch.isfinite(losses)
    return {
        name: values.clamp_min(0).masked_fill(bad, torch.inf) for name, values in squared.items()
    }


def _squared_magnitude(factors: Mapping[str, Factor]) -> Tensor:
    return sum_of([factor.magnitude().square() for factor in factors.values()])


def _imprecise(
    factors: Mapping[str, Factor], weights: Mapping[str, Tensor], policy: ClippingPolicy
) -> Tensor:
    """Units whose weighted share of the sum is lost in rounding, ``(B,)`` bool."""
    shares = [weights[name] * factor.magnitude() for name, factor in factors.items()]
    if not shares:
        return torch.zeros_like(next(iter(weights.values())), dtype=torch.bool)
    error = torch.stack(shares).square().sum(0).sqrt() * torch.finfo(shares[0].dtype).eps
    return error > _TRUSTED_SHARE_ERROR * policy.sensitivity
