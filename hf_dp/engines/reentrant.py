"""Checkpoints that recompute in a backward pass of their own, "reentrant" ones: refused.

What they compute again hands its gradients to the parameters unclipped, and ``torch.autograd.grad`` either
refuses them or, where nothing before them is trained (adapters on a frozen table), passes them by: the sum
would be zero and look right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node

from hf_dp.errors import ConfigurationError, HfDpError, explain

_NODE = "CheckpointFunctionBackward"
_TOLD = "use_reentrant"  # in what torch says of them


def reentrant_error() -> ConfigurationError:
    """What to raise."""
    return ConfigurationError(
        explain(
            "model.gradient_checkpointing_enable",
            {"use_reentrant": True},
            "use_reentrant=False",
            "Reentrant checkpointing hides gradients from the per-example clipping.",
            "Call model.gradient_checkpointing_enable({'use_reentrant': False}), pass use_reentrant=False to "
            "torch.utils.checkpoint, or set gradient_checkpointing in the TrainingArguments.",
        )
    )


@contextlib.contextmanager
def reentrant_refused() -> Iterator[None]:
    """Say in our words what torch says of them.

    Raises:
        ConfigurationError: A backward pass came upon one.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, HfDpError) or _TOLD not in str(error):
            raise
        raise reentrant_error() from error


def refuse_reentrant(losses: Tensor) -> None:
    """Look for them in the graph of `losses`, before or after a backward pass.

    Raises:
        ConfigurationError: There is one.
    """
    seen: set[Node] = set()
    waiting = [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == _NODE:
            raise reentrant_error()
        waiting += [before for before, _ in node.next_functions]
