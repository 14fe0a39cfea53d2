"""One micro-batch under taps: its losses, and the factored gradient of every trainable parameter."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hf_dp.engines.attach import recording
from hf_dp.engines.base import ExampleLoss, checked_losses
from hf_dp.engines.coverage import Coverage, NotTappableError, coverage_of
from hf_dp.engines.precision import full_precision
from hf_dp.engines.rows import batch_size
from hf_dp.engines.settle import check_folds, settle
from hf_dp.engines.tap import Call, Recording, UsedOutsideError
from hf_dp.engines.whole_tap import whole_call
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.base import FIRST, LayerRules
from hf_dp.layers.factors import Factor, Vec, combine

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
        coverage = self._settled(model, inputs, example_loss)
        with contextlib.ExitStack() as stack:
            try:
                passed = _run(stack, coverage, model, inputs, example_loss)
            except NotTappableError:  # not as the first examples were
                stack.close()
                settle(model, inputs, coverage, example_loss, deep=True)
                passed = _run(stack, coverage, model, inputs, example_loss)
            yield passed

    def _settled(
        self, model: nn.Module, inputs: Mapping[str, Any], example_loss: ExampleLoss
    ) -> Coverage:
        coverage = self.coverage(model)
        if coverage.uncovered:
            raise UncoveredParameterError(next(iter(coverage.uncovered.values())))
        # all of a batch of one is the one's, so it does not show where the examples are
        if not coverage.settled or (coverage.axes is None and batch_size(inputs) > 1):
            settle(model, inputs, coverage, example_loss)
        return coverage


def _run(
    stack: contextlib.ExitStack,
    coverage: Coverage,
    model: nn.Module,
    inputs: Mapping[str, Any],
    example_loss: ExampleLoss,
) -> Pass:
    num_units = batch_size(inputs)
    record = stack.enter_context(recording(coverage, num_units))
    losses = checked_losses(example_loss(model, inputs), num_units)
    check_folds(record, inputs, num_units)
    return Pass(coverage, record, losses, num_units)


class Pass:
    """A forward pass that was run under taps.

    Attributes:
        losses: One loss per unit, ``(B,)``, detached.
        parameters: Name -> trainable parameter.
    """

    def __init__(
        self, coverage: Coverage, record: Recording, losses: Tensor, num_units: int
    ) -> None:
        """Made by `Recorder.forward`."""
        self.losses = losses.detach()
        self.parameters = coverage.parameters
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
            with full_precision(self.losses.device):
                for parameter, factor in self._answers(call):
                    _take(parts[self._names[id(parameter)]], factor)
                for parameter in call.point.parameters:
                    left[id(parameter)] -= 1
                    if left[id(parameter)] == 0:
                        complete(self._names[id(parameter)])
                    elif left[id(parameter)] < 0:  # its norm was taken without this part
                        raise _used_again(self._names[id(parameter)])

        def complete(name: str) -> None:
            on_factor(name, combine(parts.pop(name)))

        try:
            self._record.backward(self._with_graph, add, again=again)
        except UsedOutsideError:
            self._coverage.settled = False  # the next micro-batch is looked at anew
            raise
        with full_precision(self.losses.device):
            for name in list(parts):  # not every call reached the losses
                complete(name)

    def _answers(self, call: Call) -> list[tuple[nn.Parameter, Factor]]:
        point = call.point
        if point.rule is None:
            assert point.generic is not None
            return list(point.generic(whole_call(call, self._num_units)))
        inputs, [output_grads], axis = call.inputs[0], call.output_grads, call.context
        assert output_grads is not None  # calls without any are not handed on
        if axis != FIRST:
            inputs, output_grads = (
                axis.units_first(tensor, self._num_units) for tensor in (inputs, output_grads)
            )
        answers = list(point.rule(point.module, inputs, output_grads, self._num_units))
        answered = {id(parameter) for parameter, _ in answers}
        wanted = {id(parameter) for parameter in point.parameters}
        if not wanted <= answered:
            raise UncoveredParameterError(
                f"the layer rule for {type(point.module).__qualname__} ({point.name!r}) answered for "
                f"{len(answered)} of {len(point.parameters)} trainable parameters: expected all. The "
                "others would not be clipped. Mend the rule, or use engine='sequential'."
            )
        # a parameter that a module further up answers for has left this one
        return [(p, factor) for p, factor in answers if id(p) in wanted]


def _take(parts: list[Factor], factor: Factor) -> None:
    """Add to what is there already; gradients written out at once, so that one of them is kept."""
    if isinstance(factor, Vec) and parts and isinstance(parts[-1], Vec):
        parts[-1] = combine([parts[-1], factor])
    else:
        parts.append(factor)


def _used_again(name: str) -> UncoveredParameterError:
    return UncoveredParameterError(
        f"parameter {name!r}: expected every use of it in the forward pass. One came up in the backward "
        "pass only, so the gradient's norm would be taken without it. Use "
        "gradient_checkpointing_kwargs={'use_reentrant': False}, or engine='sequential'."
    )
