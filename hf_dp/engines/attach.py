"""Taps at every point of a model, for one micro-batch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from weakref import WeakSet

import torch
from torch import nn

from hf_dp.engines.coverage import Coverage
from hf_dp.engines.formula_tap import FormulaTap
from hf_dp.engines.rows import tensors_in
from hf_dp.engines.sharded import Ranks
from hf_dp.engines.tap import OwnBackwardError, PointTap, Recording, set_requires_grad
from hf_dp.engines.whole_tap import WholeTap
from hf_dp.errors import ConfigurationError

_NO_GRADIENT = "does not require grad"  # as torch words it

_TAPPED: WeakSet[nn.Module] = WeakSet()  # models whose forward pass is being recorded


@contextlib.contextmanager
def recording(coverage: Coverage, num_units: int) -> Iterator[Recording]:
    """Tap every point of `coverage`; hooks and ``requires_grad`` are put back on the way out.

    Raises:
        ConfigurationError: The model is tapped already: this is a clipped sum within a clipped sum.
    """
    if coverage.model in _TAPPED:
        raise ConfigurationError(
            f"model={type(coverage.model).__name__}: expected no clipped sum of it within its own forward "
            "pass or loss. Two would see each other's gradients. Compute one after the other."
        )
    parameters = coverage.parameters
    anchor = torch.zeros((), device=next(iter(parameters.values())).device, requires_grad=True)
    ranks = Ranks(coverage.model)
    record = Recording(parameters, anchor, num_units, counts=coverage.counts, ranks=ranks)
    with contextlib.ExitStack() as stack:
        _TAPPED.add(coverage.model)
        stack.callback(_TAPPED.discard, coverage.model)
        stack.callback(set_requires_grad, parameters.values(), True)
        for point in coverage.points:
            if point.rule is None and _is_checkpointed(point.module):
                record.held += point.parameters
            kind: type[PointTap] = FormulaTap if point.rule is not None else WholeTap
            kind(record, point, coverage).attach(stack)
        for module in coverage.apart:  # behind the taps
            around = functools.partial(_note_way_around, record)
            stack.enter_context(module.register_forward_hook(around, with_kwargs=True))
        yield record


def _note_way_around(
    record: Recording, module: nn.Module, args: object, kwargs: object, output: object
) -> None:
    """A forward hook."""
    if record.on_call is not None:
        return  # a checkpoint, in a backward pass
    before = [given.grad_fn for given in tensors_in((args, kwargs))]
    for made in tensors_in(output):
        if made.grad_fn is not None and made.grad_fn not in before:
            record.around[made.grad_fn] = before


def _is_checkpointed(module: nn.Module) -> bool:
    """Whether the module's own forward is a checkpoint, as that of transformers' layers can be."""
    return module.training and getattr(module, "gradient_checkpointing", False) is True


@contextlib.contextmanager
def told_of_own_backward() -> Iterator[None]:
    """A model is looked over without gradients, too, and foreign code may want some."""
    try:
        yield
    except RuntimeError as error:
        if _NO_GRADIENT not in str(error):
            raise
        raise OwnBackwardError from None
