"""What a training log line may hold: what was released and what it cost, nothing exact unless asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_dp.engines.base import gradient_clipping
from hf_dp.sums import ClippedSum
from hf_dp.training.spending import Spending

_EXACT = ("grad_norm", "total_flos")  # the host's own, computed from private data
_LOSSES = ("loss", "train_loss")  # zero where no loss is released


def is_training_line(logs: dict[str, float]) -> bool:
    """Whether the host logs a step or the end of training, rather than an evaluation."""
    return any(name in logs for name in _LOSSES)


def make_private(logs: dict[str, float], spending: Spending) -> None:
    """Take out of a training line what is exact, and put in what was spent; in place, as hosts expect."""
    for name in _EXACT if spending.claim.plan.loss_release is not None else (*_EXACT, *_LOSSES):
        logs.pop(name, None)
    logs |= {"epsilon": spending.epsilon, "delta": spending.claim.delta}


@dataclass
class NonPrivateMetrics:
    """Exact quantities since the last log line, kept only where the user asked for them."""

    steps: int = 0
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    users_cut: int | None = None

    def observe(self, summed: ClippedSum) -> None:
        """Keep what one step's sum shows."""
        self.steps += 1
        self.losses.append(summed.losses.detach())
        self.norms.append(summed.norms.detach())

    def drain(self, spending: Spending) -> dict[str, float]:
        """The figures for one log line, under ``nonprivate/``; then forget them."""
        plan = spending.claim.plan
        clipping_norm = gradient_clipping(plan.clipping, plan.loss_release).sensitivity
        steps, self.steps = self.steps, 0
        losses = torch.cat(self.losses) if self.losses else torch.zeros(0)
        norms = torch.cat(self.norms) if self.norms else torch.zeros(0)
        self.losses, self.norms = [], []
        if steps == 0:
            return {}
        finite = torch.isfinite(norms)
        figures: dict[str, Callable[[], Tensor]] = {
            "loss": lambda: losses[finite].mean(),
            "gradient_norm": lambda: norms[finite].mean(),
            "clipped_fraction": lambda: (norms[finite] > clipping_norm).float().mean(),
            "dropped_fraction": lambda: (~finite).float().mean(),
        }
        shown = {"nonprivate/batch_size": len(norms) / steps}
        if self.users_cut is not None:
            shown["nonprivate/users_cut"] = self.users_cut
        if bool(finite.any()):
            shown |= {f"nonprivate/{name}": float(figure()) for name, figure in figures.items()}
        return shown


def forget_exact_metrics(trainer: object) -> None:
    """Clear what TRL's trainers gather in ``compute_loss`` and add to a line in their own ``log``."""
    gathered = getattr(trainer, "_metrics", None)
    if isinstance(gathered, dict) and "train" in gathered:
        gathered["train"].clear()
