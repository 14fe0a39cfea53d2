"""Is a model clipped example by example: the engine against one example at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_dp.clipping.flat import FlatClipping
from hf_dp.engines import engine_named
from hf_dp.engines.base import ExampleLoss
from hf_dp.engines.preflight import TOLERANCE, preflight
from hf_dp.engines.rows import batch_size, row
from hf_dp.errors import ConfigurationError, PrivacyError, explain
from hf_dp.layers.base import LayerRules
from hf_dp.layers.recognise import DEFAULT_LAYER_RULES
from hf_dp.testing.disagreement import DisagreementError


def check_model(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    example_loss: ExampleLoss | None = None,
    engine: str = "book_keeping",
    layer_rules: LayerRules = DEFAULT_LAYER_RULES,
    tolerance: float = TOLERANCE,
) -> None:
    """Check on a made-up batch that the engine clips this model's gradients as it promises.

    Checked are: every trainable parameter is covered; no example's loss or gradient depends on the
    others; norms and clipped sums are those of plain autograd on one example after the other; taking
    any example out moves the clipped sum by at most the clipping norm.

    Args:
        model: Trainable parameters are those with ``requires_grad``; afterwards it is as it was.
        batch: Two to four different made-up examples, as the model takes them.
        example_loss: ``(model, batch) -> (B,)`` losses. By default a random projection of everything
            that the model returns, so that no output is left out.
        engine: "book_keeping", "two_pass", "sequential" or "auto".
        layer_rules: Module type -> rule.
        tolerance: Relative, for float32; ``model.double()`` allows 1e-8.

    Raises:
        DisagreementError: A check failed; the message says which, and the parameter or module at fault.
        ConfigurationError: The batch holds fewer than two examples.
    """
    units = batch_size(batch)
    if units < 2:
        raise ConfigurationError(
            explain(
                "batch",
                units,
                "two or more examples",
                "With one example no mix-up of examples can show.",
                "Pass a batch of different rows.",
            )
        )
    try:
        preflight(
            model,
            [row(batch, index) for index in range(units)],
            batch,
            engine=engine_named(engine, layer_rules),
            example_loss=example_loss or projected,
            clipping=FlatClipping(1.0),
            tolerance=tolerance,
        )
    except (PrivacyError, ConfigurationError) as error:
        raise DisagreementError(str(error)) from error


def projected(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """One number per example, ``(B,)``: all that the model returns, under fixed random weights."""
    units = batch_size(inputs)
    losses: Tensor | None = None
    for place, leaf in enumerate(tree_leaves(model(**inputs))):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape[:1] == (units,):
            generator = torch.Generator().manual_seed(place)  # public: a check on made-up examples
            weights = torch.randn(leaf.shape[1:], generator=generator).to(leaf)
            part = (leaf * weights).flatten(1).sum(1) if leaf.dim() > 1 else leaf * weights
            losses = part if losses is None else losses + part
    if losses is None:
        raise ConfigurationError(
            explain(
                "model",
                type(model).__name__,
                "an output with the examples on its first axis",
                "There is nothing that could be differentiated for each example.",
                "Pass example_loss.",
            )
        )
    return losses
