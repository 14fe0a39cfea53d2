"""Class weights that a loss loses when it is called for one example: the mean is divided by them again."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_dp.engines.undisturbed import as_it_was
from hf_dp.errors import ConfigurationError, explain
from hf_dp.training.alone import ComputeLoss
from hf_dp.training.made_up import MadeUpRows, each_alone

logger = logging.getLogger(__name__)

_DIVIDED_BY_WEIGHTS = {f: inspect.signature(f) for f in (F.cross_entropy, F.nll_loss)}


def refuse_lost_weights(
    model: nn.Module, rows: MadeUpRows | None, compute_loss: ComputeLoss
) -> None:
    """Call the definition for a made-up example, and look at what it does with class weights.

    Args:
        model: As in training.
        rows: Made-up examples; without them nothing is tried.
        compute_loss: The definition of the loss, called for one example at a time.

    Raises:
        ConfigurationError: Weights have no effect at all: torch's weighted mean over one target is the
            target's own loss, whatever its weight.
    """
    if rows is None:
        return
    watch = _Watch()
    try:
        with as_it_was(model), torch.no_grad(), watch:
            compute_loss(model, dict(next(iter(each_alone(rows)))))
    except Exception as error:  # made up, so a foreign loss may refuse it in any way
        logger.debug("class weights were not looked for: %s", type(error).__name__)
    if watch.lost:
        raise ConfigurationError(
            explain(
                "compute_loss",
                "cross_entropy(weight=..., reduction='mean')",
                "a loss in which a class's weight counts for one example alone",
                "Without example_loss it is called for one example at a time, where the weighted mean is "
                "divided by the example's own weight: the weights would do nothing.",
                "Pass DPTrainer example_loss, (model, inputs) -> losses (B,), with reduction='none'; or use "
                "reduction='sum'.",
            )
        )


class _Watch(TorchFunctionMode):
    """Notes whether a weighted mean was taken over one target."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DIVIDED_BY_WEIGHTS:
            bound = _DIVIDED_BY_WEIGHTS[func].bind(*args, **kwargs)
            bound.apply_defaults()
            self.lost = self.lost or _loses_weights(**bound.arguments)
        return func(*args, **kwargs)


def _loses_weights(
    target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, **_: Any
) -> bool:
    if weight is None or reduction != "mean" or target.is_floating_point():
        return False  # of probabilities the mean is taken over examples
    differ = bool((weight != weight.flatten()[0]).any())
    return differ and int((target != ignore_index).sum()) == 1
