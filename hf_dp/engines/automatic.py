"""The engine that fits the model: one pass, two under gradient checkpointing, one by one if need be."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from hf_dp.clipping.base import ClippingPolicy
from hf_dp.clipping.loss import LossRelease
from hf_dp.engines.base import ExampleLoss, GradientEngine, empty_sum, is_out_of_memory
from hf_dp.engines.book_keeping import BookKeepingEngine
from hf_dp.engines.owners import Owners
from hf_dp.engines.rows import OneExample, batch_size
from hf_dp.engines.sequential import SequentialEngine
from hf_dp.engines.sharded import is_sharded
from hf_dp.engines.two_pass import TwoPassEngine
from hf_dp.errors import HfDpError, UncoveredParameterError
from hf_dp.layers.base import LayerRules
from hf_dp.layers.recognise import DEFAULT_LAYER_RULES
from hf_dp.sums import ClippedSum

logger = logging.getLogger(__name__)

# With fewer trainable parameters, as with adapters, book-keeping keeps next to nothing.
_MOSTLY_TRAINED = 0.1
_NAMED = 3  # parameters in a message


class AutomaticEngine(GradientEngine):
    """Chooses at the first batch, which a preflight makes a made-up one.

    A later batch that the choice does not cover is taken one example at a time without a word: which
    examples take what way through a model is private, and all engines compute the same sum.
    """

    name: ClassVar[str] = "auto"

    def __init__(self, layer_rules: LayerRules = DEFAULT_LAYER_RULES) -> None:
        """Pass `layer_rules` on to the engine chosen."""
        self.layer_rules = layer_rules
        self.chosen: GradientEngine | None = None
        self._proved = False

    def prepare(self, model: nn.Module) -> None:
        self._chosen_for(model).prepare(model)

    def clipped_sum(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        example_loss: ExampleLoss,
        clipping: ClippingPolicy,
        loss_release: LossRelease | None = None,
        owners: Owners | None = None,
    ) -> ClippedSum:
        if batch_size(inputs) == 0 and not is_sharded(model):
            return empty_sum(model, loss_release)

        def summed_by(engine: GradientEngine) -> ClippedSum:
            return engine.clipped_sum(
                model,
                inputs,
                example_loss=example_loss,
                clipping=clipping,
                loss_release=loss_release,
                owners=owners,
            )

        if isinstance(inputs, OneExample):
            return summed_by(SequentialEngine())
        engine = self._chosen_for(model)
        summed, refused = None, ""
        try:
            summed = summed_by(engine)
        except Exception as reason:  # under taps foreign code may fail in any way
            if is_sharded(model):
                raise  # the other ranks go on as they are
            if not isinstance(reason, UncoveredParameterError) and (
                isinstance(reason, HfDpError) or is_out_of_memory(reason)
            ):
                raise
            refused = _told(reason)  # if foreign code failed for another reason, it will fail again
        if summed is None:  # and the error is gone, whose traceback held the graph
            one_by_one = SequentialEngine()
            summed = summed_by(one_by_one)  # what fails here, too, is no reason to go on like this
            if not self._proved:
                self._take(one_by_one, refused)
        if not self._proved and (names := _whole_model_s(engine, model)):
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            self._take(
                SequentialEngine(),
                f"parameters {names[:_NAMED]}{more}, which only the whole model answers for: it cannot be "
                "vectorised. For speed freeze them, or use them in a small module of their own, whose "
                "forward is given tensors with one row for each example.",
            )
        self._proved = True
        return summed

    def _chosen_for(self, model: nn.Module) -> GradientEngine:
        if self.chosen is None:
            little = keeps_too_much(model) or is_sharded(model)
            vectorised = TwoPassEngine if little else BookKeepingEngine
            self.chosen = vectorised(self.layer_rules)
        return self.chosen

    def _take(self, engine: SequentialEngine, reason: str) -> None:
        self.chosen = engine
        logger.warning(
            "hf_dp: one example at a time (engine='sequential'): exact, but as slow as training "
            "with batches of one. Reason: %s",
            reason,
        )


def _told(reason: Exception) -> str:
    """What may be logged of an error: foreign code may quote what an example holds."""
    if isinstance(reason, HfDpError):
        return str(reason)
    return f"the model, or what it calls, raised a {type(reason).__name__} under taps"


def _whole_model_s(engine: GradientEngine, model: nn.Module) -> list[str]:
    """Parameters that make the whole model run again, example by example, in each backward."""
    if not isinstance(engine, BookKeepingEngine | TwoPassEngine):
        return []
    coverage = engine.recorder.coverage(model)
    again = [
        point
        for point in coverage.points
        if not point.name
        and point.generic is not None
        and point.generic.forms & {"one by one", "recomputed"}
    ]
    return coverage.names_of(p for point in again for p in point.parameters)


def keeps_too_much(model: nn.Module) -> bool:
    """Whether book-keeping would keep most of what gradient checkpointing frees."""
    checkpoints = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return checkpoints and trained > _MOSTLY_TRAINED * sum(p.numel() for p in model.parameters())
