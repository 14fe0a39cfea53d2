"""The private side of one optimizer step: from micro-batches to a clipped sum, and what it showed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.engines.base import ExampleLoss, GradientEngine, empty_sum
from hf_dp.engines.owners import Owners
from hf_dp.engines.rows import OneExample, batch_size
from hf_dp.engines.sequential import SequentialEngine
from hf_dp.errors import HfDpError
from hf_dp.plan import PrivacyPlan
from hf_dp.sums import ClippedSum, NoisySum
from hf_dp.training.batches import OwnedRows
from hf_dp.training.dropped import Batches, Units
from hf_dp.training.held import holding_nothing
from hf_dp.training.memory import MemoryLimit
from hf_dp.training.packing import APART, apart

_RAISED = (
    "hf_dp: raised on drawn examples; nothing of this step was released or counted. A micro-batch may be "
    "as short as one example without its padding. If the model asks for more positions than a short example "
    "has, leave such examples out of the dataset."
)


def clipped_sum_of(
    model: nn.Module,
    micro_batches: Iterable[Mapping[str, Any]],
    *,
    engine: GradientEngine,
    example_loss: ExampleLoss,
    plan: PrivacyPlan,
    limit: MemoryLimit | None = None,
    owned: Sequence[OwnedRows] | None = None,
    alone: Callable[[int], Iterable[Mapping[str, Any]]] = lambda _: (),
) -> ClippedSum:
    """The clipped sum over all micro-batches of a draw; zeros for an empty draw.

    Args:
        model: Trainable parameters are those with ``requires_grad``.
        micro_batches: The draw.
        engine: Computes the sum over one micro-batch.
        example_loss: One loss per example.
        plan: Its clipping and its loss release.
        limit: What is known of the memory; a micro-batch that does not fit is halved.
        owned: Whose the rows of each micro-batch are; None where each is a unit by itself.
        alone: Place of a micro-batch -> the batches of one example each of which it was made, without the
            padding that others brought; nothing where there was none.

    Raises:
        PrivacyError: The model keeps something of the examples in a parameter or a buffer.
        ConfigurationError: An example does not fit in memory even by itself.
    """
    limit = limit or MemoryLimit()

    def sum_over(inputs: Mapping[str, Any], whose: OwnedRows | None = None) -> ClippedSum:
        able = engine
        if whose is not None and not (whose.fit and apart(inputs) is None):
            able = SequentialEngine(1 if apart(inputs) else whose.at_once)
        return able.clipped_sum(
            model,
            inputs,
            example_loss=example_loss,
            clipping=plan.clipping,
            loss_release=plan.loss_release,
            owners=None if whose is None or max(whose.owners.sizes) == 1 else whose.owners,
        )

    def parts_of(place: int, micro_batch: Mapping[str, Any]) -> Iterator[ClippedSum]:
        whose = None if owned is None else owned[place]
        reduction = "mean" if whose is None else whose.owners.reduction

        def again(batches: Batches) -> ClippedSum:
            one = Owners((len(batches),), reduction)
            return sum_over({APART: batches}, OwnedRows(one, 1))

        sizes = [1] * batch_size(micro_batch) if whose is None else list(whose.owners.sizes)
        units = Units(sizes, functools.partial(alone, place), again)
        parts = (
            limit.each_part(micro_batch, sum_over)
            if whose is None
            else limit.each_part_of_users(micro_batch, whose, sum_over)
        )
        return map(units.with_dropped_again, parts)

    summed: ClippedSum | None = None
    with holding_nothing(model):
        for place, micro_batch in enumerate(micro_batches):
            with _explained():
                for part in parts_of(place, micro_batch):
                    summed = part if summed is None else summed + part
    return empty_sum(model, plan.loss_release) if summed is None else summed


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Say below an error of the model's, or of the loss's, what is special about its input."""
    try:
        yield
    except HfDpError:
        raise
    except Exception as error:
        error.add_note(_RAISED)
        raise


def tracked(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """`inputs` with tensors that a backward pass may save: copies of what inference mode made."""
    pieces = apart(inputs)
    if pieces is not None:
        return {APART: [tracked(piece) for piece in pieces]}
    made = {n: v.clone() for n, v in inputs.items() if isinstance(v, Tensor) and v.is_inference()}
    if isinstance(inputs, OneExample):
        return OneExample({**inputs, **made})
    return {**inputs, **made} if made else inputs


def set_gradients(model: nn.Module, released: NoisySum, divisor: float) -> None:
    """Put the noisy sum, divided by a public constant, where the optimizer looks; it is used up."""
    for name, parameter in model.named_parameters():
        parameter.grad = None  # whatever somebody else's backward pass may have left there
        if name in released.grads:
            parameter.grad = released.grads[name].div_(divisor).to(parameter.dtype)


def released_loss(released: NoisySum, plan: PrivacyPlan, device: torch.device) -> Tensor:
    """The mean training loss that the release shows, 0-d; zero where none is released."""
    if plan.loss_release is None or released.loss_sum is None:
        return torch.zeros((), device=device)
    loss = plan.loss_release.mean_loss(
        released.loss_sum, sensitivity=plan.clipping.sensitivity, divisor=plan.expected_batch_size
    )
    return loss.to(device, torch.float32)
