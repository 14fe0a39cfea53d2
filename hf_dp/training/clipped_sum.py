"""The clipped sum for people with their own training loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hf_dp.clipping.flat import FlatClipping
from hf_dp.engines import (
    AutomaticEngine,
    ExampleLoss,
    GradientEngine,
    SequentialEngine,
    engine_named,
)
from hf_dp.engines.rows import batch_size, row
from hf_dp.layers import DEFAULT_LAYER_RULES, LayerRules
from hf_dp.sums import ClippedSum
from hf_dp.training.alone import definition_loss
from hf_dp.training.choice import Choice, choose
from hf_dp.training.refused_parts import refuse_model
from hf_dp.training.tasks import unwrapped

logger = logging.getLogger(__name__)

_CHOICES: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], Choice]] = WeakKeyDictionary()


def clipped_sum(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    clipping_norm: float,
    engine: str | GradientEngine = "auto",
    example_loss: ExampleLoss | None = None,
    layer_rules: LayerRules = DEFAULT_LAYER_RULES,
) -> ClippedSum:
    """Sum over a batch of each example's gradient, clipped to L2 norm `clipping_norm`.

    The result is PRIVATE until noise of standard deviation ``noise_multiplier * clipping_norm`` is
    added to every coordinate; accounting, sampling and the ledger are then yours.

    A model under FSDP2 (``fully_shard``) is clipped by the two-pass engine: every rank passes as many
    examples of its own, and gets its shards (``DTensor``) of the sum over all ranks' examples; ``norms``
    and ``losses`` are its own examples'. Each rank then adds noise to its shards (``to_local()``).

    Args:
        model: Trainable parameters are those with ``requires_grad``; its mode is left as it is.
        batch: What the model takes, labels included; tensors have the examples first, ``(B, ...)``.
        clipping_norm: Bound on each example's share, > 0.
        engine: "book_keeping", "two_pass", "sequential", or "auto", which chooses and falls back. In a
            loop pass one ``hf_dp.engines.engine_named("auto")`` to every call: an engine looks a new
            model over by running it a few times, and remembers it.
        example_loss: ``(model, batch) -> (B,)`` losses, each from its own row alone. By default the
            loss that the model itself returns for the example alone.
        layer_rules: Module type -> rule.

    Returns:
        An object with ``grads`` (parameter name -> summed clipped gradient), ``norms`` ``(B,)``
        before clipping, and ``losses`` ``(B,)``.

    Raises:
        ConfigurationError: An argument is out of range, or the model mixes examples.
        UncoveredParameterError: ``engine="book_keeping"`` and a parameter has no layer rule.
    """
    clipping = FlatClipping(clipping_norm)
    refuse_model(model)
    chosen = engine_named(engine, layer_rules) if isinstance(engine, str) else engine
    if example_loss is None:
        example_loss, chosen = _default_loss(model, batch, chosen)
    return chosen.clipped_sum(model, batch, example_loss=example_loss, clipping=clipping)


def _default_loss(
    model: nn.Module, batch: Mapping[str, Any], engine: GradientEngine
) -> tuple[ExampleLoss, GradientEngine]:
    if not isinstance(engine, SequentialEngine) and batch_size(batch) > 0:
        choice = _choice(model, batch)
        if not choice.alone:
            return choice.example_loss, engine
    if isinstance(engine, AutomaticEngine):
        logger.warning(
            "hf_dp: no vectorised loss was found to be the model's own whatever the padding, so examples "
            "are taken one at a time. Pass example_loss for speed."
        )
        engine = SequentialEngine()
    return definition_loss(_own_loss), engine


def _choice(model: nn.Module, batch: Mapping[str, Any]) -> Choice:
    """Made once for a model and a set of columns, on made-up examples."""
    columns = tuple(sorted(batch))
    known = _CHOICES.setdefault(model, {})
    if columns not in known:
        padding = getattr(getattr(unwrapped(model), "config", None), "pad_token_id", None)
        known[columns] = choose(
            model,
            row(batch, 0),
            _own_loss,
            given=None,
            trusted=True,
            padding_id=padding if _pads_with(batch, padding) else None,
        )
    return known[columns]


def _pads_with(batch: Mapping[str, Any], token: object) -> bool:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or ids.shape != mask.shape:
        return False
    return isinstance(token, int) and bool((ids[mask == 0] == token).all())


def _own_loss(model: nn.Module, inputs: dict[str, Any]) -> Any:
    outputs = model(**inputs)
    return outputs["loss"] if isinstance(outputs, dict) else outputs[0]
