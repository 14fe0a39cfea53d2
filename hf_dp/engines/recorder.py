"""From one micro-batch to its losses and the factored gradient of every trainable parameter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_dp.engines.axes import establish_axes
from hf_dp.engines.base import ExampleLoss, checked_losses
from hf_dp.engines.coverage import Coverage, coverage_of
from hf_dp.engines.precision import full_precision
from hf_dp.engines.rows import batch_size
from hf_dp.engines.tap import Call, recording
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.base import LayerRules
from hf_dp.layers.factors import Factor, combine


class Recorder:
    """One forward and one backward pass under taps; knows the coverage of each model it has seen."""

    def __init__(self, layer_rules: LayerRules) -> None:
        """Use `layer_rules` (module type -> rule); what they lack is recognised by computation."""
        self.layer_rules = layer_rules
        self._coverages: WeakKeyDictionary[nn.Module, Coverage] = WeakKeyDictionary()

    def coverage(self, model: nn.Module) -> Coverage:
        """Tap points of `model`, looked up anew when it trains other parameters than before."""
        known = self._coverages.get(model)
        if known is None or not known.fits(model):
            known = self._coverages[model] = coverage_of(model, self.layer_rules)
        return known

    def record(
        self, model: nn.Module, inputs: Mapping[str, Any], example_loss: ExampleLoss
    ) -> tuple[Tensor, dict[str, Factor]]:
        """Run the micro-batch once.

        Args:
            model: Trainable parameters are those with ``requires_grad``.
            inputs: One or more examples.
            example_loss: One loss per example.

        Returns:
            The losses, ``(B,)``, detached; and parameter name -> factor for each parameter that took
            part.

        Raises:
            UncoveredParameterError: Some gradient cannot be told apart by example.
        """
        num_units = batch_size(inputs)
        coverage = self._checked_coverage(model, inputs, example_loss)
        with recording(coverage, num_units) as record:
            losses = checked_losses(example_loss(model, inputs), num_units)
            found = _Contributions(coverage, record.uses, num_units)
            record.backward(losses, list(coverage.parameters), found.add)
        return losses.detach(), found.factors()

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


class _Contributions:
    """What the calls of a backward pass add to each parameter's factor, taken as they come."""

    def __init__(self, coverage: Coverage, uses: Mapping[int, int], num_units: int) -> None:
        self.coverage = coverage
        self.uses = uses
        self.num_units = num_units
        self._names = {id(p): name for name, p in coverage.parameters.items()}
        self._parts: dict[str, list[Factor]] = defaultdict(list)

    def add(self, call: Call) -> None:
        """Apply the call's rule; a parameter used once can settle on its form at once."""
        with full_precision(call.output_grads.device):
            for parameter, factor in self._answers(call):
                if self.uses[id(parameter)] == 1:
                    factor.settle()
                self._parts[self._names[id(parameter)]].append(factor)

    def factors(self) -> dict[str, Factor]:
        """One factor for each parameter that took part, in the model's order."""
        with torch.no_grad():
            return {
                name: combine(self._parts[name])
                for name in self.coverage.parameters
                if name in self._parts
            }

    def _answers(self, call: Call) -> list[tuple[nn.Parameter, Factor]]:
        point = call.point
        axes = self.coverage.axes or {}
        if self.num_units > 1 and point.method == "forward" and point.name not in axes:
            raise UncoveredParameterError(
                f"module {point.name!r} took part for some examples only: expected every module with "
                "trainable parameters to run for the first examples too, which shows where its input "
                "has the examples. Use engine='sequential', or freeze it."
            )
        answers = list(point.rule(point.module, call.inputs, call.output_grads, self.num_units))
        answered = {id(parameter) for parameter, _ in answers}
        if answered != {id(parameter) for parameter in point.parameters}:
            raise UncoveredParameterError(
                f"the layer rule for {type(point.module).__qualname__} ({point.name!r}) answered for "
                f"{len(answered)} of {len(point.parameters)} trainable parameters: expected all. The "
                "others would not be clipped. Mend the rule, or use engine='sequential'."
            )
        return answers
