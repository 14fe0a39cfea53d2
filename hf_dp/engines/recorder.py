"""One micro-batch under taps: its losses, and the factored gradient of every trainable parameter."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hf_dp.engines.alone_again import Ends
from hf_dp.engines.attach import recording, told_of_own_backward
from hf_dp.engines.attribution import Proof
from hf_dp.engines.base import ExampleLoss, checked_losses
from hf_dp.engines.by_content import Graph, Kinds, hooks_on_gradients
from hf_dp.engines.coverage import Coverage, coverage_of
from hf_dp.engines.familiar import is_from_library, still_familiar
from hf_dp.engines.given_losses import refuse_own_draws, watched_draws
from hf_dp.engines.own_losses import watched
from hf_dp.engines.owners import Owners
from hf_dp.engines.precision import full_precision
from hf_dp.engines.reentrant import refuse_reentrant
from hf_dp.engines.rows import batch_size
from hf_dp.engines.settle import check_folds, compare_mates, learn_what_grows, settle
from hf_dp.engines.sharded import first_rows, is_sharded, left_in_shards
from hf_dp.engines.tap import Call, Recording, UsedOutsideError
from hf_dp.engines.together import Alike, Group, Waiting
from hf_dp.engines.whole_tap import whole_call
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.base import FIRST, LayerRules
from hf_dp.layers.factors import Factor, Vec, combine
from hf_dp.layers.randomness import Randomness, kept_randomness

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

    def last_coverage(self, model: nn.Module) -> Coverage:
        """What the last pass of `model` went by; not looked up anew."""
        return self._coverages[model]

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
            NotTappableError: The examples are not where those of the first micro-batch were; the backward
                pass may find that, too. `look_again` may help.
            UncoveredParameterError: Some gradient cannot be told apart by example.
            ConfigurationError: Examples influence one another; on the way out of the context, too.
        """
        with told_of_own_backward():
            coverage = self._settled(model, inputs, example_loss)
        with recording(coverage, batch_size(inputs)) as record:
            passed, ends, start = _run(record, coverage, model, inputs, example_loss, owners)
            yield passed
        if ends is None:
            return
        with told_of_own_backward(), left_in_shards(model):
            if record.ranks.any(start is not None):
                coverage.called |= refuse_own_draws(model, inputs, example_loss, start=start)
            if record.ranks.any(ends.show()):
                compare_mates(model, inputs, coverage, example_loss, again=True)

    def look_again(
        self, model: nn.Module, inputs: Mapping[str, Any], example_loss: ExampleLoss
    ) -> None:
        """Look at every example of a micro-batch that is not as the first examples were.

        Raises:
            UncoveredParameterError: Some gradient cannot be told apart by example.
        """
        coverage = self.coverage(model)
        coverage.proved.clear()
        settle(model, inputs, coverage, example_loss, deep=True)

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
    record: Recording,
    coverage: Coverage,
    model: nn.Module,
    inputs: Mapping[str, Any],
    example_loss: ExampleLoss,
    owners: Owners | None,
) -> tuple[Pass, Ends | None, Randomness | None]:
    """The last is how generators were, if the loss may have drawn from them itself."""
    num_units = record.num_units
    own = not is_from_library(example_loss)
    device = next(iter(coverage.parameters.values())).device
    watching = watched_draws(device, coverage.called) if own else watched_draws(device)
    with hooks_on_gradients() as hooks, watched(model) as calls, watching as draws:
        losses = checked_losses(example_loss(model, inputs), num_units)
    if record.without:
        refuse_reentrant(losses)
    with record.noting():
        check_folds(record, inputs, num_units)
    record.tell()
    passed = Pass(coverage, record, losses, owners)
    if num_units < 2:
        return passed, None, None
    ends: Ends | None = None
    strange = bool(hooks or coverage.foreign) or not still_familiar(model)
    if record.ranks.any(strange or own):
        known = [] if strange else calls.unchanged()
        ends = Ends(model, inputs, example_loss, losses, known, drawn=draws.any, ranks=record.ranks)
    if losses.requires_grad:
        if own and not strange:
            strange = not calls.prove(losses)
        passed.prepare_proof(losses, strange=strange)
    return passed, ends, draws.start if own and draws.outside else None


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
        self._proof: Proof | None = None
        self._content = False
        self._kinds: Kinds | None = None

    def prepare_proof(self, losses: Tensor, *, strange: bool) -> None:
        """Let the backward pass prove whose row is whose, unless that is known of such a graph.

        It is proved once for a kind of graph, and always where code or content may arrange the rows.

        Args:
            losses: ``(B,)``, with their graph.
            strange: Whether code is involved of which nothing is known.
        """
        coverage, record = self._coverage, self._record
        self._content, self._kinds = strange, None
        if not strange:
            graph = Graph(losses, record.num_units, coverage.twins, record.around)
            coverage.untold = coverage.untold or not graph.known
            self._content, self._kinds = graph.by_content, graph.kinds
        if record.ranks.any(self._content or self._kinds not in coverage.proved):
            backward = functools.partial(self._backward, again=True)
            self._proof = Proof(backward, self._with_graph)

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
            MixedRowsError: Rows belong to other examples than their place says; what was handed over is
                void.
            UnprovedError: That cannot be seen.
            UncoveredParameterError: Some gradient cannot be told apart by example.
        """
        parts: dict[str, list[Factor]] = defaultdict(list)
        left = self._record.uses.copy()
        waiting = Waiting(self._record.uses if on_group is not None else {})
        proof, self._proof = self._proof, None

        def add(call: Call) -> None:
            if proof is not None:
                proof.note(call)
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

        self._backward(self._with_graph, add, again=again)
        if proof is not None:
            self._judge(proof)
        with full_precision(self.losses.device):
            for name in list(parts):  # not every call reached the losses
                complete(name)
            if on_group is not None:
                self._answer_waiting(waiting, on_factor, on_group)

    def _backward(self, losses: Tensor, on_call: Callable[[Call], None], *, again: bool) -> None:
        try:
            self._record.backward(losses, on_call, again=again)
        except UsedOutsideError:
            self._coverage.settled = False  # the next micro-batch is looked at anew
            raise

    def _judge(self, proof: Proof) -> None:
        with self._record.noting():
            if proof.verdict(hidden=self._content) and self._kinds is not None:
                self._coverage.proved.add(self._kinds)
        self._record.tell()

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
