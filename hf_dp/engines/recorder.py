"""One micro-batch under taps: its losses, and the factored gradient of every trainable parameter."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hf_dp.engines.axes import establish_axes
from hf_dp.engines.base import ExampleLoss, checked_losses
from hf_dp.engines.coverage import Coverage, coverage_of
from hf_dp.engines.precision import full_precision
from hf_dp.engines.rows import batch_size
from hf_dp.engines.tap import Call, Recording, recording
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.base import LayerRules
from hf_dp.layers.factors import Factor, combine

OnFactor = Callable[[str, Factor], None]
"""``on_factor(name, factor)`` takes the whole gradient of one parameter, for every unit."""


class Recorder:
    """Runs models under taps; knows the coverage of each model that it has seen."""

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

    @contextlib.contextmanager
    def forward(
        self, model: nn.Module, inputs: Mapping[str, Any], example_loss: ExampleLoss
    ) -> Iterator[Pass]:
        """One forward pass of a micro-batch, whose backward pass may be run within the context.

        Args:
            model: Trainable parameters are those with ``requires_grad``.
            inputs: One or more examples.
            example_loss: One loss per example.

        Raises:
            UncoveredParameterError: Some gradient cannot be told apart by example.
        """
        num_units = batch_size(inputs)
        coverage = self._checked_coverage(model, inputs, example_loss)
        with recording(coverage, num_units) as record:
            losses = checked_losses(example_loss(model, inputs), num_units)
            yield Pass(coverage, record, losses, num_units)

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


class Pass:
    """A forward pass that was run under taps.

    Attributes:
        losses: One loss per unit, ``(B,)``, detached.
    """

    def __init__(
        self, coverage: Coverage, record: Recording, losses: Tensor, num_units: int
    ) -> None:
        """Made by `Recorder.forward`."""
        self.losses = losses.detach()
        self._with_graph = losses
        self._coverage = coverage
        self._record = record
        self._num_units = num_units
        self._names = {id(p): name for name, p in coverage.parameters.items()}

    def backward(self, on_factor: OnFactor, *, again: bool = False) -> None:
        """Run the backward pass; parameter names and factors reach `on_factor` as they are complete.

        Args:
            on_factor: Called once for each trainable parameter that took part, gradients off and in
                full precision.
            again: Keep the graph, for one more backward pass with the same dropout masks.

        Raises:
            UncoveredParameterError: Some gradient cannot be told apart by example.
        """
        parts: dict[str, list[Factor]] = defaultdict(list)
        left = self._record.uses.copy()

        def add(call: Call) -> None:
            with full_precision(call.output_grads.device):
                for parameter, factor in self._answers(call):
                    parts[self._names[id(parameter)]].append(factor)
                for parameter in call.point.parameters:
                    left[id(parameter)] -= 1
                    if left[id(parameter)] == 0:
                        complete(self._names[id(parameter)])
                    elif left[id(parameter)] < 0:  # its norm was taken without this part
                        raise _used_again(self._names[id(parameter)])

        def complete(name: str) -> None:
            on_factor(name, combine(parts.pop(name)))

        self._record.backward(self._with_graph, list(self._coverage.parameters), add, again=again)
        with full_precision(self.losses.device):
            for name in list(parts):  # not every call reached the losses
                complete(name)

    def _answers(self, call: Call) -> list[tuple[nn.Parameter, Factor]]:
        point = call.point
        axes = self._coverage.axes or {}
        if self._num_units > 1 and point.method == "forward" and point.name not in axes:
            raise UncoveredParameterError(
                f"module {point.name!r} took part for some examples only: expected every module with "
                "trainable parameters to run for the first examples too, which shows where its input "
                "has the examples. Use engine='sequential', or freeze it."
            )
        answers = list(point.rule(point.module, call.inputs, call.output_grads, self._num_units))
        answered = {id(parameter) for parameter, _ in answers}
        if answered != {id(parameter) for parameter in point.parameters}:
            raise UncoveredParameterError(
                f"the layer rule for {type(point.module).__qualname__} ({point.name!r}) answered for "
                f"{len(answered)} of {len(point.parameters)} trainable parameters: expected all. The "
                "others would not be clipped. Mend the rule, or use engine='sequential'."
            )
        return answers


def _used_again(name: str) -> UncoveredParameterError:
    return UncoveredParameterError(
        f"parameter {name!r}: expected every use of it in the forward pass. One came up in the backward "
        "pass only, so the gradient's norm would be taken without it. Use "
        "gradient_checkpointing_kwargs={'use_reentrant': False}, or engine='sequential'."
    )
