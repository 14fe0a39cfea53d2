"""One micro-batch under taps: its losses, and the factored gradient of every trainable parameter."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hf_dp.engines.attach import recording
from hf_dp.engines.attribution import prove
from hf_dp.engines.base import ExampleLoss, checked_losses
from hf_dp.engines.by_content import Graph, hooks_on_gradients
from hf_dp.engines.coverage import Coverage, NotTappableError, coverage_of
from hf_dp.engines.familiar import is_from_library, still_familiar
from hf_dp.engines.own_losses import watched
from hf_dp.engines.owners import Owners
from hf_dp.engines.precision import full_precision
from hf_dp.engines.rows import batch_size
from hf_dp.engines.settle import check_folds, compare_mates, learn_what_grows, settle
from hf_dp.engines.sharded import first_rows, is_sharded
from hf_dp.engines.tap import Call, Recording, UsedOutsideError
from hf_dp.engines.together import Alike, Group, Waiting
from hf_dp.engines.whole_tap import whole_call
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.base import FIRST, LayerRules
from hf_dp.layers.factors import Factor, Vec, combine
from hf_dp.layers.randomness import kept_randomness

OnFactor = Callable[[str, Factor], None]
"""``on_factor(name, factor)`` takes the whole gradient of one parameter, for every unit."""
OnGroup = Callable[[Group], None]
"""``on_group(group)`` takes the whole gradients of several parameters, for every unit."""


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
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        example_loss: ExampleLoss,
        owners: Owners | None = None,
    ) -> Iterator[Pass]:
        """One forward pass of a micro-batch, whose backward pass may be run within the context.

        Args:
            model: Trainable parameters are those with ``requires_grad``.
            inputs: One or more examples.
            example_loss: One loss per example.
            owners: Which examples make a unit; None if each is one.

        Raises:
            UncoveredParameterError: Some gradient cannot be told apart by example.
        """
        coverage = self._settled(model, inputs, example_loss)
        with contextlib.ExitStack() as stack:
            try:
                passed = _run(stack, coverage, model, inputs, example_loss, owners)
            except NotTappableError:  # not as the first examples were
                if is_sharded(model):
                    raise  # the other ranks do not run it again
                stack.close()
                coverage.proved.clear()
                settle(model, inputs, coverage, example_loss, deep=True)
                passed = _run(stack, coverage, model, inputs, example_loss, owners)
            yield passed

    def _settled(
        self, model: nn.Module, inputs: Mapping[str, Any], example_loss: ExampleLoss
    ) -> Coverage:
        coverage = self.coverage(model)
        if coverage.uncovered:
            raise UncoveredParameterError(next(iter(coverage.uncovered.values())))
        # all of a batch of one is the one's, so it does not show where the examples are
        if not coverage.settled or (coverage.axes is None and batch_size(inputs) > 1):
            settle(model, first_rows(model, inputs), coverage, example_loss)
        elif coverage.untold and not is_sharded(model):  # the other ranks do not run it again
            with kept_randomness(next(iter(coverage.parameters.values())).device):
                learn_what_grows(model, inputs, coverage, example_loss)
        if batch_size(inputs) > 1:
            compare_mates(model, inputs, coverage, example_loss)
        return coverage


def _run(
    stack: contextlib.ExitStack,
    coverage: Coverage,
    model: nn.Module,
    inputs: Mapping[str, Any],
    example_loss: ExampleLoss,
    owners: Owners | None,
) -> Pass:
    num_units = batch_size(inputs)
    record = stack.enter_context(recording(coverage, num_units))
    with hooks_on_gradients() as hooks, watched(model) as outputs:
        losses = checked_losses(example_loss(model, inputs), num_units)
    with record.noting():
        check_folds(record, inputs, num_units)
    record.tell()
    if num_units > 1 and losses.requires_grad:
        strange = bool(hooks) or not (coverage.familiar and still_familiar(model))
        if not (strange or is_from_library(example_loss)):
            strange = not outputs.prove(losses)
        _prove(coverage, record, losses, strange=strange)
    return Pass(coverage, record, losses, owners)


def _prove(coverage: Coverage, record: Recording, losses: Tensor, *, strange: bool) -> None:
    """Prove whose row is whose: once for a kind of graph, always where code or content may arrange them."""
    always, kinds = strange, None
    if not strange:
        graph = Graph(losses, record.num_units, coverage.twins)
        coverage.untold = coverage.untold or not graph.known
        always, kinds = graph.by_content, graph.kinds
    if not record.ranks.any(always or kinds not in coverage.proved):
        return
    with record.noting():
        try:
            if prove(record, losses, hidden=always) and kinds is not None:
                coverage.proved.add(kinds)
        except UsedOutsideError:
            coverage.settled = False  # the next micro-batch is looked at anew
            raise
    record.tell()


class Pass:
    """A forward pass that was run under taps.

    Attributes:
        losses: One loss per unit, ``(U,)``, detached.
        parameters: Name -> trainable parameter.
    """

    def __init__(
        self, coverage: Coverage, record: Recording, losses: Tensor, owners: Owners | None
    ) -> None:
        """Made by `Recorder.forward` of losses ``(B,)``, one for each row."""
        rows = losses.detach()
        self.losses = rows if owners is None else owners.means(rows)
        self.parameters = coverage.parameters
        self._with_graph = losses if owners is None else owners.weighted(losses)
        self._packing = None if owners is None else owners.packing()
        self._coverage = coverage
        self._record = record
        self._num_rows = len(rows)
        self._names = {id(p): name for name, p in coverage.parameters.items()}

    @property
    def recomputed(self) -> bool:
        """Whether a backward pass ran tapped modules again, as checkpoints do."""
        return self._record.recomputed

    def backward(
        self, on_factor: OnFactor, *, on_group: OnGroup | None = None, again: bool = False
    ) -> None:
        """Run the backward pass; parameter names and factors reach `on_factor` as they are complete.

        Args:
            on_factor: Called once for each trainable parameter that took part, gradients off and in
                full precision.
            on_group: Takes small parameters of layers that are alike together, after the pass; without
                it they reach `on_factor`, too.
            again: Keep the graph, for one more backward pass with the same dropout masks.

        Raises:
            UncoveredParameterError: Some gradient cannot be told apart by example.
        """
        parts: dict[str, list[Factor]] = defaultdict(list)
        left = self._record.uses.copy()
        waiting = Waiting(self._record.uses if on_group is not None else {})

        def add(call: Call) -> None:
            if waiting.takes(call):
                self._count_down(call, left)
                return
            with full_precision(self.losses.device):
                for parameter, factor in self._answers(call):
                    _take(parts[self._names[id(parameter)]], self._of_units(factor))
                for name in self._count_down(call, left):
                    complete(name)

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
            if on_group is not None:
                self._answer_waiting(waiting, on_factor, on_group)

    def _answer_waiting(self, waiting: Waiting, on_factor: OnFactor, on_group: OnGroup) -> None:
        for found in waiting.alike():
            if isinstance(found, Alike):
                for group in self._answers_together(found):
                    on_group(group)
            else:
                for parameter, factor in self._answers(found):
                    on_factor(self._names[id(parameter)], self._of_units(factor))

    def _count_down(self, call: Call, left: Counter[int]) -> list[str]:
        """The parameters whose last use this was."""
        complete = []
        for parameter in call.point.parameters:
            key = id(parameter)
            left[key] -= 1
            if left[key] < 0:  # its norm was taken without this part
                raise _used_again(self._names[key])
            if left[key] == 0:
                complete.append(self._names[key])
        return complete

    def _answers_together(self, alike: Alike) -> Iterator[Group]:
        count = len(next(iter(alike.parameters.values())))
        rule, module = alike.point.rule, alike.point.module
        assert rule is not None
        answers = rule(module, alike.inputs, alike.output_grads, count * self._num_rows)
        factors = {id(p): factor for p, factor in answers}
        for key, parameters in alike.parameters.items():
            factor = self._of_units(factors[key], times=count)
            yield Group([self._names[id(p)] for p in parameters], factor)

    def _of_units(self, factor: Factor, *, times: int = 1) -> Factor:
        """A factor of so many times the micro-batch's rows as one of the units that own them."""
        if self._packing is None:
            return factor
        return factor.grouped(self._packing if times == 1 else self._packing.times(times))

    def _answers(self, call: Call) -> list[tuple[nn.Parameter, Factor]]:
        point = call.point
        if point.rule is None:
            assert point.generic is not None
            return list(point.generic(whole_call(call, self._num_rows)))
        inputs, [output_grads], axis = call.inputs[0], call.output_grads, call.context
        assert output_grads is not None  # calls without any are not handed on
        if axis != FIRST:
            inputs, output_grads = (
                axis.units_first(tensor, self._num_rows) for tensor in (inputs, output_grads)
            )
        answers = list(point.rule(point.module, inputs, output_grads, self._num_rows))
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
