"""From a micro-batch's logits to one loss per example: pure functions of tensors.

Each equals what transformers computes for a batch of one, in float32 or wider. An ignored target
adds exactly nothing to the loss and to its gradient, even where its logits are not finite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hf_dp.errors import ConfigurationError, explain

IGNORED = -100


def own_labels(
    labels: Tensor, attention_mask: Tensor | None, *, shifted: bool, prompt: int = 0
) -> Tensor:
    """The label that each position must predict, if it is one of the example's own.

    What stands in the padding before the first and after the last token is ignored: how much there
    is depends on the other examples. So is the first token where labels are shifted, since only
    padding precedes it; a trained prompt's last position predicts it.

    Args:
        labels: ``(B, T)``.
        attention_mask: ``(B, T)``, not zero at own tokens; None or another shape for no padding.
        shifted: Whether a position predicts the next one's label, as in causal models.
        prompt: How many positions the model puts before the example's own: virtual tokens, P.

    Returns:
        ``(B, P + T)``.
    """
    own = _own_span(attention_mask, labels)
    labels = labels.where(own, IGNORED)
    if shifted and prompt > 0:
        return F.pad(labels, (prompt - 1, 1), value=IGNORED)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).where(own, IGNORED) if shifted else labels


def token_losses(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy over each example's own tokens.

    Args:
        logits: ``(B, T, V)``.
        labels: ``(B, T)`` of class indices; -100 is ignored.
        label_smoothing: Share of the target spread evenly over all V classes, in [0, 1].

    Returns:
        ``(B,)``; zero where an example has nothing to predict.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise _shape_error(logits, labels, "logits (B, T, V) with labels (B, T)")
    labels = labels.to(logits.device)
    active = labels != IGNORED
    # Gathering first keeps NaN at ignored positions out of the gradient, and spares the upcast of
    # prompts and padding.
    per_token = F.cross_entropy(
        _wide(_taken(logits, active)),
        labels[active].long(),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return _put_back(per_token, active).sum(dim=1) / active.sum(dim=1).clamp(min=1)


class _Taken(torch.autograd.Function):
    """``tensor[mask]``, which the engine need not look at: `_PutBack` returns all to its place."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.shape = tensor.shape
        return tensor[mask]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        [mask] = ctx.saved_tensors
        whole = grad.new_zeros(ctx.shape)
        whole[mask] = grad
        return whole, None


class _PutBack(torch.autograd.Function):
    """Zeros of the mask's shape, with the numbers where it is true."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return numbers.new_zeros(mask.shape).masked_scatter(mask, numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        [mask] = ctx.saved_tensors
        return grad[mask], None


def _taken(tensor: Tensor, mask: Tensor) -> Tensor:
    taken: Tensor = _Taken.apply(tensor, mask)  # type: ignore[no-untyped-call]
    return taken


def _put_back(numbers: Tensor, mask: Tensor) -> Tensor:
    whole: Tensor = _PutBack.apply(numbers, mask)  # type: ignore[no-untyped-call]
    return whole


def class_losses(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of one label per example.

    Args:
        logits: ``(B, K)``.
        labels: ``(B,)`` or ``(B, 1)`` of class indices; -100 is ignored.
        label_smoothing: As in `token_losses`.

    Returns:
        ``(B,)``.
    """
    if logits.dim() != 2 or labels.numel() != len(logits):
        raise _shape_error(logits, labels, "logits (B, K) with labels (B,)")
    return token_losses(logits.unsqueeze(1), labels.reshape(-1, 1), label_smoothing=label_smoothing)


def squared_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error over each example's own targets.

    Args:
        logits: ``(B, K)``, or ``(B,)`` for one target.
        labels: As many numbers.

    Returns:
        ``(B,)``.
    """
    predicted, target = _paired(logits, labels)
    return (predicted - target).square().mean(dim=1)


def binary_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross entropy over each example's own labels.

    Args:
        logits: ``(B, K)``.
        labels: ``(B, K)`` of probabilities.

    Returns:
        ``(B,)``.
    """
    predicted, target = _paired(logits, labels)
    losses = F.binary_cross_entropy_with_logits(predicted, target, reduction="none")
    return losses.mean(dim=1)


def span_losses(
    start_logits: Tensor,
    end_logits: Tensor,
    start_positions: Tensor,
    end_positions: Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Mean of the cross entropies of an answer's two ends.

    Padding after an example's last token is not offered as an answer: how much of it there is
    depends on the other examples of the batch, and so would the loss.

    Args:
        start_logits: ``(B, T)``.
        end_logits: ``(B, T)``.
        start_positions: ``(B,)`` or ``(B, 1)``; below 0 counts as 0.
        end_positions: Likewise.
        attention_mask: ``(B, T)``, not zero at an example's own tokens; None for no padding.

    Returns:
        ``(B,)``; zero where an end lies outside the example.
    """
    if start_logits.dim() != 2 or start_logits.shape != end_logits.shape:
        raise _shape_error(start_logits, end_logits, "start and end logits (B, T)")
    columns = torch.arange(start_logits.shape[1], device=start_logits.device)
    own = _own_span(attention_mask, start_logits)
    lengths = (own * (columns + 1)).amax(dim=1)
    padding = columns >= lengths[:, None]
    ends = []
    inside = torch.ones_like(lengths, dtype=torch.bool)
    for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
        target = positions.reshape(-1).to(logits.device).clamp(min=0)
        inside = inside & (target < lengths)
        ends.append((logits.masked_fill(padding, -torch.inf), target))
    start, end = (
        class_losses(logits, torch.where(inside, target, IGNORED)) for logits, target in ends
    )
    return (start + end) / 2


def _own_span(attention_mask: Tensor | None, like: Tensor) -> Tensor:
    """From the first to the last attended position, ``(B, T)``; nothing where none is."""
    if attention_mask is None or attention_mask.shape != like.shape:
        return torch.ones(like.shape, dtype=torch.bool, device=like.device)
    attended = (attention_mask.to(like.device) != 0).long()
    begun = attended.cumsum(dim=1) > 0
    not_ended = attended.flip(1).cumsum(dim=1).flip(1) > 0
    return begun & not_ended


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype is torch.float64 else values.float()


def _paired(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if logits.dim() > 2 or logits.numel() != labels.numel():
        raise _shape_error(logits, labels, "logits (B, K) with as many labels")
    predicted = _wide(logits.reshape(len(logits), -1))
    return predicted, labels.to(predicted).reshape(predicted.shape)


def _shape_error(first: Tensor, second: Tensor, expected: str) -> ConfigurationError:
    return ConfigurationError(
        explain(
            "example_loss.shapes",
            (tuple(first.shape), tuple(second.shape)),
            expected,
            "Each example's loss is read off its own row.",
            "Check the task, or pass example_loss.",
        )
    )
