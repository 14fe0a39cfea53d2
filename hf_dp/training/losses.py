"""One loss per example: which computation is used, and how it earns its place.

The definition (`definition_loss`) is one ``compute_loss`` per example. A candidate that does a
whole micro-batch at once (`VectorisedLoss`) replaces it only where both give the same numbers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_dp.engines.rows import batch_size, select_rows
from hf_dp.training.alone import ComputeLoss, ExampleLoss, alone, definition_loss
from hf_dp.training.reductions import IGNORED
from hf_dp.training.tasks import (
    Task,
    default_loss_ceiling,
    is_encoder_decoder,
    propose_tasks,
    recognise_task,
    unwrapped,
)
from hf_dp.training.vectorised import (
    VectorisedLoss,
    logits_of,
    vectorised_loss,
    without_targets,
)

__all__ = [
    "ComputeLoss",
    "ExampleLoss",
    "Task",
    "VectorisedLoss",
    "choose_example_loss",
    "default_loss_ceiling",
    "definition_loss",
    "recognise_task",
    "vectorised_loss",
]

logger = logging.getLogger(__name__)

_PROBES = 4
_TOLERANCE = 1e-4
# Rounding of a loss that was itself computed in half precision.
_HALF_LOSS_TOLERANCE = 2e-2
# Rounding of a whole forward pass in half precision or TF32, between batches of different shapes.
_COARSE_FORWARD_TOLERANCE = 5e-2
# Losses below the first are compared absolutely; below the second they tell nothing.
_SMALL_LOSS = 0.1
_TELLING_LOSS = 1e-3
_HALF = (torch.float16, torch.bfloat16)


def choose_example_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    compute_loss: ComputeLoss,
    label_smoothing: float = 0.0,
) -> tuple[ExampleLoss, str] | None:
    """Find a fast loss that gives the definition's numbers on this micro-batch.

    Up to four rows are compared in evaluation mode, without gradients: each row alone against
    `compute_loss`, and all of them together against each alone. So an overridden ``compute_loss``
    or a ``compute_loss_func`` needs no special case. What this cannot see: a ``compute_loss`` that
    differs in training mode only, or in its gradient only; pass ``example_loss`` for those.

    Where no row tells anything (every label ignored), only a class of transformers' own under the
    Trainer's unchanged ``compute_loss`` is accepted, by its name.

    Args:
        model: As the engine will call it. Its training flags are restored module by module.
        inputs: A real micro-batch with labels, on the model's device.
        compute_loss: The definition: a Trainer's bound method.
        label_smoothing: ``TrainingArguments.label_smoothing_factor``.

    Returns:
        The loss and a line for the log, or None where nothing agrees and the definition must be
        used one example at a time.
    """
    probe = select_rows(inputs, _telling_rows(inputs))
    types: set[torch.dtype] = set()

    def recorded(model: nn.Module, one: dict[str, Any]) -> Any:
        loss = compute_loss(model, one)
        types.add(getattr(loss, "dtype", torch.float32))
        return loss

    with _evaluating(model), torch.no_grad():
        wanted = definition_loss(recorded)(model, probe)
        if not bool((wanted.isfinite() & (wanted.abs() > _TELLING_LOSS)).any()):
            return _by_name_alone(model, inputs, compute_loss, label_smoothing)
        # The label smoother widens its result, but not the logarithms in it.
        rounded = types.intersection(_HALF) or (label_smoothing > 0 and _has_half(model))
        tolerance = _HALF_LOSS_TOLERANCE if rounded else _TOLERANCE
        found = _the_one_that_agrees(model, probe, label_smoothing, wanted, tolerance)
    if found is None:
        return None
    return found, f"{found.describe()}; checked against compute_loss"


def _telling_rows(inputs: Mapping[str, Any]) -> list[int]:
    """Rows with something to predict first, and among those the widest spread of lengths."""
    size = batch_size(inputs)
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    telling = list(range(size))
    if isinstance(labels, Tensor) and labels.dim() > 0:
        targets = (labels != IGNORED).reshape(size, -1)
        # A causal model predicts nothing in the first column.
        telling = [i for i in telling if targets[i, -max(1, targets.shape[1] - 1) :].any()]
    telling = telling or list(range(size))
    if isinstance(mask, Tensor) and mask.dim() == 2:
        lengths = mask.sum(dim=1).tolist()
        telling.sort(key=lambda i: lengths[i])
    count = min(_PROBES, len(telling))
    return [telling[i * (len(telling) - 1) // max(1, count - 1)] for i in range(count)]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    # Flags are set directly, since eval() and train() may be overridden and do more than that.
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training


def _by_name_alone(
    model: nn.Module,
    inputs: Mapping[str, Any],
    compute_loss: ComputeLoss,
    label_smoothing: float,
) -> tuple[ExampleLoss, str] | None:
    task = recognise_task(model, inputs)
    trainer = getattr(compute_loss, "__self__", None)
    unchanged = (
        isinstance(trainer, Trainer)
        and getattr(compute_loss, "__func__", None) is Trainer.compute_loss
        and trainer.compute_loss_func is None
    )
    base = unwrapped(model)
    own_class = type(base).__module__.startswith("transformers.")
    if task is None or not (unchanged and own_class) or hasattr(base, "_loss_function"):
        return None
    candidate = VectorisedLoss(task, label_smoothing)
    return candidate, f"{candidate.describe()}; by its name, as every label was ignored"


def _the_one_that_agrees(
    model: nn.Module,
    probe: Mapping[str, Any],
    label_smoothing: float,
    wanted: Tensor,
    tolerance: float,
) -> VectorisedLoss | None:
    task = recognise_task(model, probe)
    if task is not None:
        named = VectorisedLoss(task, label_smoothing)
        if _agreeing_losses(named, model, probe, wanted, tolerance) is not None:
            return named
    agreeing: list[tuple[VectorisedLoss, Tensor]] = []
    for candidate in _fitting_candidates(model, probe, label_smoothing):
        losses = _agreeing_losses(candidate, model, probe, wanted, tolerance)
        if losses is not None:
            agreeing.append((candidate, losses))
    # With a coarse tolerance a wrong one may pass too, and then none can be trusted.
    alike = all(_close(losses, agreeing[0][1], wanted, _TOLERANCE) for _, losses in agreeing)
    return agreeing[0][0] if agreeing and alike else None


def _fitting_candidates(
    model: nn.Module, probe: Mapping[str, Any], label_smoothing: float
) -> Iterator[VectorisedLoss]:
    labels = probe.get("labels")
    if not isinstance(labels, Tensor):
        return
    try:
        logits = logits_of(model(**without_targets(model, probe)))
    except Exception as error:  # foreign code, tried without labels: it may fail in any way
        kind_of_error = type(error).__name__  # its text may quote the data
        logger.debug("no logits without labels from %s: %s", type(model).__name__, kind_of_error)
        return
    for proposed, kind in propose_tasks(logits, labels):
        # A decoder's labels have a length of their own, which the attention mask does not tell.
        if proposed is Task.SEQUENCE_CLASSIFICATION or not is_encoder_decoder(model):
            yield VectorisedLoss(proposed, label_smoothing, kind)


def _agreeing_losses(
    candidate: ExampleLoss,
    model: nn.Module,
    probe: Mapping[str, Any],
    wanted: Tensor,
    tolerance: float,
) -> Tensor | None:
    rows = range(batch_size(probe))
    try:
        single = torch.cat([candidate(model, alone(model, probe, i)) for i in rows])
        together = candidate(model, probe)
    except Exception as error:  # a wrong guess may fail in any way, and then it is only not used
        logger.debug("candidate %r failed: %s", candidate, type(error).__name__)
        return None
    # Alone, the forward pass is the definition's own, so only the reduction can differ; together,
    # rounding depends on the shape of the batch.
    forward = max(tolerance, _COARSE_FORWARD_TOLERANCE if is_coarse(model) else _TOLERANCE)
    agrees = _close(single, wanted, wanted, tolerance)
    return single if agrees and _close(together, single, wanted, forward) else None


def _close(found: Tensor, wanted: Tensor, definition: Tensor, tolerance: float) -> bool:
    judged = definition.isfinite()
    found, wanted = found.double()[judged], wanted.double()[judged]
    if found.shape != wanted.shape:
        return False
    return bool(((found - wanted).abs() <= tolerance * wanted.abs().clamp(min=_SMALL_LOSS)).all())


def _has_half(model: nn.Module) -> bool:
    return any(parameter.dtype in _HALF for parameter in model.parameters())


def is_coarse(model: nn.Module) -> bool:
    """Whether the model's forward pass rounds to half precision or TF32."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    return (
        _has_half(model)
        or torch.is_autocast_enabled(device)
        # accelerate's mixed precision lives in the forward it puts in the place of this one, adapters'
        # too.
        or any("_original_forward" in vars(module) for module in model.modules())
        or (device == "cuda" and torch.get_float32_matmul_precision() != "highest")
    )
