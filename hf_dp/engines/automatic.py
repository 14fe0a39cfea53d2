"""Book-keeping where every trainable parameter has a rule, else one example at a time, said aloud."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from hf_dp.clipping.base import ClippingPolicy
from hf_dp.clipping.loss import LossRelease
from hf_dp.engines.base import ExampleLoss, GradientEngine
from hf_dp.engines.book_keeping import BookKeepingEngine
from hf_dp.engines.sequential import SequentialEngine
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.base import LayerRules
from hf_dp.layers.recognise import DEFAULT_LAYER_RULES
from hf_dp.sums import ClippedSum

logger = logging.getLogger(__name__)


class AutomaticEngine(GradientEngine):
    """Book-keeping until it meets what it does not cover, from then on the sequential engine.

    The switch comes before anything of that micro-batch is released, and both engines compute the
    same sum, so it may happen at any step.
    """

    name: ClassVar[str] = "auto"

    def __init__(self, layer_rules: LayerRules = DEFAULT_LAYER_RULES) -> None:
        """Pass `layer_rules` on to the book-keeping engine."""
        self.chosen: GradientEngine = BookKeepingEngine(layer_rules)

    def clipped_sum(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        example_loss: ExampleLoss,
        clipping: ClippingPolicy,
        loss_release: LossRelease | None = None,
    ) -> ClippedSum:
        def with_chosen() -> ClippedSum:
            return self.chosen.clipped_sum(
                model,
                inputs,
                example_loss=example_loss,
                clipping=clipping,
                loss_release=loss_release,
            )

        try:
            return with_chosen()
        except UncoveredParameterError as reason:
            self.chosen = SequentialEngine()
            logger.warning(
                "hf_dp: one example at a time (engine='sequential'): exact, but as slow as training "
                "with batches of one. Reason: %s",
                reason,
            )
        return with_chosen()
