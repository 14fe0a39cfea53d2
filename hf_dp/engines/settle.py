"""Finding, by running the first examples, the lowest module at which each parameter can be answered for."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.engines.attach import recording
from hf_dp.engines.attribution import prove
from hf_dp.engines.axes import establish_axes, unexplained
from hf_dp.engines.base import ExampleLoss, checked_losses, is_out_of_memory
from hf_dp.engines.by_content import Graph, Twins
from hf_dp.engines.coverage import Coverage, LayoutUnknownError, NotTappableError, TapPoint
from hf_dp.engines.familiar import is_from_library
from hf_dp.engines.given_losses import refuse_own_draws
from hf_dp.engines.loss_keys import code_of
from hf_dp.engines.mates import check_mates
from hf_dp.engines.precision import full_precision
from hf_dp.engines.probe import mode_of, modes_of, sizes_of
from hf_dp.engines.rows import batch_size, select_rows
from hf_dp.engines.sharded import first_rows, is_sharded
from hf_dp.engines.tap import Call, UsedOutsideError
from hf_dp.engines.whole_tap import NoOutputAxisError, whole_call
from hf_dp.errors import ConfigurationError, HfDpError, UncoveredParameterError, explain
from hf_dp.layers.randomness import kept_randomness
from hf_dp.layers.recognise import is_on_probation, still_computes
from hf_dp.layers.repeats import UnrepeatedError

_TWINS = (2, 3)  # examples
_MOST_LOOKS = 8  # a model that goes more ways than this is proved every time on those
_UNCHANGED = 2e-2  # losses with and without taps: rounding in any dtype


class ChangedLossesError(UncoveredParameterError):
    """A loss or model did not compute the same twice."""

    def __init__(self) -> None:
        """Nothing of a batch is named."""
        super().__init__(
            explain(
                "example_loss",
                "other losses when the same examples are run again",
                "the same losses for the same examples and the same states of the global generators",
                "Nobody can tell then whose gradient is whose.",
                "Draw from the global generators of torch, NumPy or Python only, keep nothing from one "
                "call to the next, or use engine='sequential'.",
            )
        )


def settle(
    model: nn.Module,
    inputs: Mapping[str, Any],
    coverage: Coverage,
    example_loss: ExampleLoss,
    *,
    deep: bool = False,
) -> None:
    """Establish where the examples are, and let parameters climb until every use is under a tap.

    Nothing of it is released, and no generator is left changed.

    Args:
        model: As the engine will call it.
        inputs: A micro-batch.
        coverage: Is changed until it covers the model.
        example_loss: One loss per example.
        deep: Look at every example of the micro-batch, not at the first few.

    Raises:
        UncoveredParameterError: A parameter climbed past the model itself.
        ConfigurationError: That is so since examples influence one another.
    """
    try:
        _settle(model, inputs, coverage, example_loss, deep=deep)
    except ConfigurationError:
        raise
    except Exception as error:
        if batch_size(inputs) > 1 and not (is_sharded(model) or is_out_of_memory(error)):
            if not is_from_library(example_loss):
                refuse_own_draws(model, inputs, example_loss)
            compare_mates(model, inputs, coverage, example_loss)
        raise


def _settle(
    model: nn.Module,
    inputs: Mapping[str, Any],
    coverage: Coverage,
    example_loss: ExampleLoss,
    *,
    deep: bool,
) -> None:
    units = batch_size(inputs)
    few = select_rows(inputs, range(units if deep else min(units, 2)))
    device = next(iter(coverage.parameters.values())).device
    with kept_randomness(device):
        while True:
            if units > 1:
                probes = {"probes": units} if deep else {}
                refused = establish_axes(model, inputs, coverage, example_loss, **probes)
                for point, why in refused:
                    if any(point is p for p in coverage.points):  # another may have taken it along
                        coverage.climb(point, why)
                if refused:
                    continue
            if not _climbed_in_trial(model, few, coverage, example_loss):
                break
        if units > 1 and not coverage.foreign:  # another one is proved every time
            learn_what_grows(model, inputs, coverage, example_loss)
    coverage.settled = True


def looked_at(inputs: Mapping[str, Any], coverage: Coverage, example_loss: ExampleLoss) -> Hashable:
    """The loss, by its code, the modules' modes and the batch's columns."""
    return code_of(example_loss), coverage.flags, tuple(sorted(inputs))


def compare_mates(
    model: nn.Module,
    inputs: Mapping[str, Any],
    coverage: Coverage,
    example_loss: ExampleLoss,
    *,
    again: bool = False,
) -> None:
    """Compare a few examples among others with the same alone, once for each loss, mode and set of columns.

    A loss counts by its code: what it is set to may change from one batch to the next, and shows in each
    (`alone_again`). What was refused once stays refused: that a later batch does not show it proves nothing.

    Args:
        model: As the engine calls it.
        inputs: Two or more examples.
        coverage: Keeps what was compared, and what was refused.
        example_loss: One loss per example.
        again: Whether it was compared before.

    Raises:
        ConfigurationError: An example's loss or gradient among others is not what it is alone.
    """
    key = looked_at(inputs, coverage, example_loss)
    if key in coverage.refused:
        raise ConfigurationError(
            f"{coverage.refused[key]} (Refused before; a new engine looks anew.)"
        )
    if key in coverage.compared and not again:
        return
    device = next(iter(coverage.parameters.values())).device
    try:
        with kept_randomness(device):
            check_mates(model, first_rows(model, inputs), example_loss)
    except ConfigurationError as error:
        coverage.refused[key] = str(error)
        raise
    coverage.compared.add(key)


def _climbed_in_trial(
    model: nn.Module, few: Mapping[str, Any], coverage: Coverage, example_loss: ExampleLoss
) -> bool:
    for training in modes_of(model):
        try:
            with mode_of(model, training=training):
                _trial(model, few, coverage, example_loss)
        except UsedOutsideError as error:
            for name in error.names:
                coverage.climb_outside(
                    coverage.parameters[name], f"Parameter {name!r} is used outside its module."
                )
            return True
        except NotTappableError as error:
            _climb_or_repeat(coverage, error)
            return True
        except Exception as error:
            told = isinstance(error, HfDpError) and not isinstance(error, ChangedLossesError)
            if told or is_out_of_memory(error) or not _climbed_from_shared(coverage):
                raise
            return True
    return False


def learn_what_grows(
    model: nn.Module, inputs: Mapping[str, Any], coverage: Coverage, example_loss: ExampleLoss
) -> None:
    """Add graphs of two and of three examples, alike in all but their number, unless there are many."""
    coverage.untold = False
    if coverage.looks >= _MOST_LOOKS:
        return
    coverage.looks += 1
    rows = [index % batch_size(inputs) for index in range(max(_TWINS))]
    graphs = []
    for units in _TWINS:
        with (
            recording(coverage, units) as record,
            contextlib.suppress(RuntimeError),  # such a batch may be unlike those that were tried
        ):
            few = select_rows(inputs, rows[:units])
            losses = checked_losses(example_loss(model, few), units)
            graphs.append(Graph(losses, units, around=record.around))
    if len(graphs) == len(_TWINS) and graphs[0].is_like(graphs[1]):
        coverage.twins.append(Twins(*graphs))


def _climb_or_repeat(coverage: Coverage, error: NotTappableError) -> None:
    generic = error.point.generic
    if isinstance(error, NoOutputAxisError) and generic is not None and not generic.repeats:
        generic.repeats = True
        coverage.axes = None
    else:
        coverage.climb(error.point, str(error))


def _trial(
    model: nn.Module,
    few: Mapping[str, Any],
    coverage: Coverage,
    example_loss: ExampleLoss,
) -> None:
    units = batch_size(few)

    def try_out(call: Call) -> None:
        if call.point.generic is not None:
            try:
                with full_precision(call.inputs[0].device if call.inputs else anchor.device):
                    call.point.generic.try_out(whole_call(call, units))
            except UnrepeatedError as error:
                if not call.point.name:
                    raise  # nothing above it has put these examples in that order
                raise NotTappableError(call.point, str(error)) from None

    device = next(iter(coverage.parameters.values())).device
    with torch.no_grad(), kept_randomness(device), _on_probation(coverage):
        plain = checked_losses(example_loss(model, few), units)
    with recording(coverage, units) as record:
        anchor = record.anchor
        losses = example_loss(model, few)
        if not _same(losses.detach(), plain):
            raise ChangedLossesError
        prove(record, losses, hidden=False)
        record.backward(losses, try_out)


@contextlib.contextmanager
def _on_probation(coverage: Coverage) -> Iterator[None]:
    """Within it, what was recognised by what it computes must do so on real numbers, too."""

    def check(point: TapPoint, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert point.rule is not None
        if not still_computes(point.module, point.rule, point.sole_input(args, kwargs), output):
            raise NotTappableError(
                point,
                f"{point.described} does not give, on the first examples, what its layer rule assumes.",
            )

    with contextlib.ExitStack() as stack:
        for point in coverage.points:
            whole = not is_sharded(point.module)
            if whole and point.method == "forward" and is_on_probation(point.module, point.rule):

                def hook(
                    _: nn.Module, args: Any, kwargs: Any, output: Any, point: TapPoint = point
                ) -> None:
                    check(point, args, kwargs, output)

                stack.enter_context(point.module.register_forward_hook(hook, with_kwargs=True))
        yield


def _same(found: Tensor, plain: Tensor) -> bool:
    return found.shape == plain.shape and torch.allclose(
        found.double(), plain.double(), rtol=_UNCHANGED, atol=1e-6, equal_nan=True
    )


def _climbed_from_shared(coverage: Coverage) -> bool:
    """Let go of taps that repeat one row for all examples: the model may not expect so many."""
    for suspects in (
        [p for p in coverage.points if p.generic is not None and p.generic.repeats],
        [p for p in coverage.points if _serves_all(p, coverage)],
        [p for p in coverage.points if p.method != "forward"],
    ):
        for point in suspects:
            if any(point is p for p in coverage.points):
                coverage.climb(point, f"{point.described} serves all examples at once.")
        if suspects:
            return True
    return False


def _serves_all(point: TapPoint, coverage: Coverage) -> bool:
    layouts = coverage.layouts(point).values()
    return point.rule is not None and any(layout.shared for layout in layouts)


def check_folds(record: Any, inputs: Mapping[str, Any], num_units: int) -> None:
    """Refuse a pass whose folded rows are not explained by the numbers of positions in it.

    Raises:
        LayoutUnknownError: Rows may belong to another example than their place says.
    """
    if not record.folds or num_units == 1:
        return
    sizes = {**record.sizes, **sizes_of(inputs)}
    point = unexplained(record.folds, sizes, num_units)
    if point is not None:
        raise LayoutUnknownError(
            point,
            f"{point.described} got rows of several examples on one axis: expected as many for each as "
            "the batch has positions. Without that, one example's gradient cannot be told from "
            "another's. Use engine='sequential', or freeze it.",
        )
