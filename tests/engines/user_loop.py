"""The loop that per-user clipping is compared with, written without hf_dp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from engine_zoo import Batch, OneLoss, own_losses
from torch import Tensor, nn

from hf_dp.sums import ClippedSum


def cut(inputs: Batch, sizes: Sequence[int]) -> list[Batch]:
    """The rows of each user."""
    parts, start = [], 0
    for size in sizes:
        parts.append({name: value[start : start + size] for name, value in inputs.items()})
        start += size
    return parts


def by_users(
    model: nn.Module,
    inputs: Batch,
    sizes: Sequence[int],
    clipping_norm: float,
    *,
    reduction: str = "mean",
    loss_of: OneLoss = own_losses,
    order: int = 2,
) -> ClippedSum:
    """One user, each of its rows alone, one gradient of their mean or sum, one clip, one addition."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
    norms, means = [], []
    for mine in cut(inputs, sizes):
        rows = cut(mine, [1] * len(next(iter(mine.values()))))
        losses = torch.cat([loss_of(model, row).reshape(1) for row in rows])
        loss = losses.mean() if reduction == "mean" else losses.sum()
        grads: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        written = [g.double().reshape(-1) for g in grads if g is not None]
        norm = torch.cat(written or [torch.zeros(1).double()]).norm(order)
        weight = min(1.0, clipping_norm / float(norm)) if norm > 0 else 1.0
        for total, grad in zip(sums.values(), grads, strict=True):
            if grad is not None:
                total += weight * grad.double()
        norms.append(norm)
        means.append(losses.detach().double().mean())
    return ClippedSum(grads=sums, norms=torch.stack(norms), losses=torch.stack(means))
