"""What a log line may hold: what was released and what it cost, nothing exact unless asked for.

Lines are looked at where they finally go, the history and the callbacks, so that it does not matter which
class, above this library's or below, has put something into them, nor in which order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import CallbackHandler

from hf_dp.engines.base import gradient_clipping
from hf_dp.sums import ClippedSum
from hf_dp.training.spending import Spending

logger = logging.getLogger(__name__)

_LOSSES = ("loss", "train_loss")
_TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
_PLACE = ("epoch", "step")  # in every line, and nothing by themselves
_PUBLIC = frozenset({"learning_rate", "epsilon", "delta", *_LOSSES, *_TIMES, *_PLACE})
_HOSTS_OWN = frozenset({"grad_norm", "total_flos"})  # in every line, and missed by nobody
_VOUCHED = "public/"
_OF_TRAINING = "_num_tokens"  # TRL's count of what was trained on, in evaluation's lines too
_NO_EXAMPLES = "There seems not to be a single sample in your epoch_iterator"


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


@dataclass
class ReleasedLosses:
    """The mean of what was released as training loss, since the last line and in all."""

    since: Tensor | float = 0.0
    steps: int = 0
    total: float = 0.0
    all_steps: int = 0

    def observe(self, loss: Tensor) -> None:
        """Add the loss that one step released."""
        self.since = self.since + loss.detach()
        self.steps += 1

    def means(self) -> dict[str, float]:
        """Of the steps since the last line, if there are any, and of all."""
        since, steps = float(self.since), self.steps
        self.total, self.all_steps = self.total + since, self.all_steps + steps
        self.since, self.steps = 0.0, 0
        found = {"train_loss": self.total / max(self.all_steps, 1)}
        return found if steps == 0 else {**found, "loss": since / steps}


class Lines:
    """Lets through what may be shown of a run.

    While ``train()`` runs, a line holds the names of `_PUBLIC` and those that begin with ``public/``; losses
    are those that were released, whatever the line said. A line of ``evaluate()`` holds what begins with its
    prefix. Inside a step nothing is logged, for any name may stand for one example's number there.
    """

    def __init__(self, everything: bool) -> None:
        """Leave nothing out where `everything` was asked for."""
        self.everything = everything
        self.exact = NonPrivateMetrics()
        self._spending: Spending | None = None
        self._released = ReleasedLosses()
        self._silent = 0
        self._prefix: str | None = None
        self._given: frozenset[str] = frozenset()
        self._told: set[str] = set()

    def begin(self, spending: Spending) -> None:
        """From now on lines are those of a run."""
        self._spending = spending
        self._released = ReleasedLosses()

    def observe(self, summed: ClippedSum) -> None:
        """Keep what one step's sum shows, where it was asked for."""
        if self.everything:
            self.exact.observe(summed)

    def released(self, loss: Tensor) -> Tensor:
        """Take note of the loss that a step released, and return it."""
        self._released.observe(loss)
        return loss

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, single examples are at hand, and lines are left out altogether."""
        self._silent += 1
        try:
            yield
        finally:
            self._silent -= 1

    @contextmanager
    def evaluation(self, prefix: str) -> Iterator[None]:
        """Inside, lines hold what begins with `prefix`, as those of the host's evaluation do."""
        before, self._prefix = self._prefix, prefix
        try:
            yield
        finally:
            self._prefix = before

    def price(self, logs: dict[str, float]) -> None:
        """Put what was spent into a training line; in place, as hosts expect. Note what the line holds."""
        if self._is_of_training(logs):
            assert self._spending is not None
            logs |= {"epsilon": self._spending.epsilon, "delta": self._spending.claim.delta}
        self._given = frozenset(logs)

    def pass_on(self, logs: dict[str, Any], history: list[dict[str, Any]], training: bool) -> bool:
        """Take out of a line, and of its copy in the history, what may not be shown.

        Args:
            logs: The line; changed in place.
            history: Its last entry is the line's copy, with the step, if the host has put one there.
            training: Whether the model is in training mode, as it is not after a host's own evaluation.

        Returns:
            Whether anything is left.
        """
        copied = bool(history) and all(history[-1].get(name) is logs[name] for name in logs)
        shown = self._shown(logs, training)
        left_out = set(logs) - set(shown)
        empty = bool(left_out) and not set(shown) - set(_PLACE)
        known = _HOSTS_OWN.union(_PLACE, () if self._silent else _LOSSES)
        self._announce(left_out - known)
        logs.clear()
        logs.update(shown)
        if copied:
            step = {name: history[-1][name] for name in ("step",) if name in history[-1]}
            history[-1:] = [] if empty else [{**shown, **step}]
        return not empty

    def _shown(self, logs: dict[str, Any], training: bool) -> dict[str, Any]:
        spending, of_training = self._spending, self._is_of_training(logs)
        if spending is None or (self.everything and not of_training):
            return dict(logs)
        if self._silent:
            return {}
        prefix = self._prefix or (None if training else "eval")
        if (
            not spending.is_open and self._prefix is None
        ):  # the user's own, but not what a host adds
            given = self._given.union(_PLACE)
            return {name: value for name, value in logs.items() if name in given}
        means: dict[str, float] = {}
        if of_training and spending.claim.plan.loss_release is not None:
            means = self._released.means()
        shown = {
            name: means.get(name, value)
            for name, value in logs.items()
            if (name in means if name in _LOSSES else self._may_be_shown(name, prefix))
        }
        return {**shown, **self.exact.drain(spending)} if self.everything else shown

    def _may_be_shown(self, name: str, prefix: str | None) -> bool:
        if name in _PUBLIC or name.startswith(_VOUCHED):
            return True
        if self.everything:
            return name not in _HOSTS_OWN
        of_training = name.endswith(_OF_TRAINING)
        return prefix is not None and name.startswith(f"{prefix}_") and not of_training

    def _is_of_training(self, logs: dict[str, Any]) -> bool:
        """Whether the host logs steps, or the end of training, rather than an evaluation."""
        spending = self._spending
        if spending is None or not spending.is_open or self._silent or self._prefix is not None:
            return False
        return any(name in logs for name in _LOSSES)

    def _announce(self, left_out: set[str]) -> None:
        new = sorted(left_out - self._told)
        if new:
            self._told |= left_out
            logger.warning(
                "hf_dp: left out of the log: %s. They may be exact figures of protected examples. While "
                "train() runs, lines hold what is public: loss (the one that is released), learning_rate, "
                "epsilon and the like, what evaluate() finds, and names that begin with 'public/', by which "
                "you say that no protected example went into them. Inside a step nothing is logged at all. "
                "DPArguments(nonprivate_metrics=True) logs everything, and the ledger and report say so.",
                ", ".join(map(repr, new)),
            )


@contextmanager
def without_talk_of_no_examples() -> Iterator[None]:
    """Inside, the host does not blame the data for a run that its budget ends before the first step."""

    def on_something_else(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_NO_EXAMPLES)

    host = logging.getLogger("transformers.trainer")
    host.addFilter(on_something_else)
    try:
        yield
    finally:
        host.removeFilter(on_something_else)


def guard(handler: CallbackHandler, lines: Lines) -> None:
    """Let `lines` see every line before the callbacks do, whichever there are; once per handler."""
    if getattr(handler.on_log, "lines", None) is lines:
        return
    tell = handler.on_log

    def on_log(args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> Any:
        training = bool(getattr(handler.model, "training", True))
        if not lines.pass_on(logs, state.log_history, training):
            return control
        return tell(args, state, control, logs, **kwargs)

    on_log.lines = lines  # type: ignore[attr-defined]
    handler.on_log = on_log
