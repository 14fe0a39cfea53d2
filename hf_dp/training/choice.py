"""How each example's loss is computed, decided before any example is looked at."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_dp.engines.undisturbed import as_it_was
from hf_dp.training.alone import ComputeLoss, ExampleLoss, definition_loss
from hf_dp.training.joining import MASK, Tried
from hf_dp.training.losses import choose_example_loss
from hf_dp.training.made_up import MadeUpRows, attempts, each_alone
from hf_dp.training.own_forward import has_library_loss
from hf_dp.training.padding import padded_up_to, padding_matters
from hf_dp.training.positions import axis_of
from hf_dp.training.tasks import closing_token, is_encoder_decoder, unwrapped

logger = logging.getLogger(__name__)

_SPEC_AUGMENT_SHARES = ("mask_time_prob", "mask_feature_prob")
_SPEC_AUGMENT = (
    " One cause here: this model's SpecAugment masks by the lengths of a whole batch. "
    "model.config.apply_spec_augment = False switches it off."
)


@dataclass(frozen=True)
class Choice:
    """A loss and how examples must be brought to it.

    Attributes:
        example_loss: One loss per example.
        is_definition: Whether it is `compute_loss`, called for one example at a time.
        alone: Whether each example must be collated by itself, since padding changes its loss.
        description: For the log.
        rows: The made-up examples on which it was tried, as one batch; None where there are none.
        most: Positions of the longest text that may share its padding; None for any.
    """

    example_loss: ExampleLoss
    is_definition: bool
    alone: bool
    description: str
    rows: MadeUpRows | None = None
    most: int | None = None

    @property
    def padded(self) -> frozenset[str]:
        """Columns that were tried with padding at the end of their positions; no others may get any."""
        rows = self.rows
        spans = {} if rows is None else rows.spans
        return frozenset(n for n, span in spans.items() if rows and axis_of(rows) in span.axes)

    def tried(self, model: nn.Module) -> Tried:
        """What examples that are to be filled up must be like."""
        span = None if self.rows is None else self.rows.spans.get(MASK)
        least = 1 if span is None else min(span.lengths)
        return Tried(least, is_encoder_decoder(model), closing_token(model), self.most)

    @property
    def longest(self) -> int:
        """Positions of the longest made-up example."""
        return 1 if self.rows is None else self.rows.longest


def choose(
    model: nn.Module,
    columns: Mapping[str, Any],
    compute_loss: ComputeLoss,
    *,
    given: ExampleLoss | None,
    trusted: bool,
    label_smoothing: float = 0.0,
    padding_id: int | None = None,
) -> Choice:
    """Choose on made-up examples; whatever cannot be tried on them is done one example at a time.

    Args:
        model: As the engine will call it.
        columns: A collated batch of one real example, for the names and shapes of its columns.
        compute_loss: The definition.
        given: The user's own loss of each example, or None.
        trusted: Whether `compute_loss` is the host's own. Where the model's loss is a library's, too, a
            vectorised form that agrees with it on made-up examples agrees everywhere.
        label_smoothing: ``TrainingArguments.label_smoothing_factor``.
        padding_id: The token that the collator pads with; None if that is not known.
    """
    with as_it_was(model):
        tried = given or (definition_loss(compute_loss) if trusted else None)
        rows = _rows(model, columns, tried)
        trusted = trusted and has_library_loss(model)
        choice = _chosen(model, rows, compute_loss, given, trusted, label_smoothing, padding_id)
        if choice.alone:
            return choice
        most = padded_up_to(choice.example_loss, model, columns, padding_id)
        return replace(choice, alone=most == 0, most=most)


def _chosen(
    model: nn.Module,
    rows: MadeUpRows | None,
    compute_loss: ComputeLoss,
    given: ExampleLoss | None,
    trusted: bool,
    label_smoothing: float,
    padding_id: int | None,
) -> Choice:
    if given is not None:
        return Choice(
            given, False, padding_matters(given, model, rows, padding_id), "given by the user", rows
        )
    found = None
    if trusted and rows is not None:
        found = _vectorised(model, rows, compute_loss, label_smoothing)
    if found is None:
        definition = definition_loss(compute_loss)
        return Choice(definition, True, True, "compute_loss, one example at a time", rows)
    loss, description = found
    return Choice(loss, False, padding_matters(loss, model, rows, padding_id), description, rows)


def announce(choice: Choice, model: nn.Module) -> None:
    """Say which loss of `model` is used, and aloud where it makes training slow."""
    logger.info("hf_dp: loss of each example: %s", choice.description)
    if choice.most:
        logger.info(
            "hf_dp: texts of more than %d tokens share a micro-batch with others of their own length only: "
            "this model looks at longer ones in another way, so padding might matter to them",
            choice.most,
        )
    if choice.is_definition:
        logger.warning(
            "hf_dp: compute_loss, or the loss in the model's own forward, has no vectorised form here, so it "
            "is called for one example at a time (engine='sequential'): exact, but as slow as training "
            "with batches of one. For speed pass DPTrainer an example_loss, (model, inputs) -> losses (B,)."
        )
    elif choice.alone:
        logger.warning(
            "hf_dp: on made-up examples the loss of one changes with its neighbours or their padding (or "
            "it could not be tried), so every example is collated by itself: exact, but as slow as "
            "training with batches of one. For speed let the model use attention_mask, and the collator "
            "the model's padding token.%s",
            _SPEC_AUGMENT if _masks_sound(model) else "",
        )


def _masks_sound(model: nn.Module) -> bool:
    """Whether SpecAugment is on, as in most speech models of transformers."""
    config: Any = getattr(unwrapped(model), "config", None)
    asked_for = getattr(config, "apply_spec_augment", False)
    return asked_for and any(getattr(config, name, 0) > 0 for name in _SPEC_AUGMENT_SHARES)


def _rows(
    model: nn.Module, columns: Mapping[str, Any], loss: ExampleLoss | None
) -> MadeUpRows | None:
    """Made-up rows of which the model takes each by itself, and makes a finite loss if it can.

    Args:
        model: Run in training mode, which may ask for longer examples than evaluation does.
        columns: Of a real example.
        loss: What is tried; None for code that should not see made-up examples.
    """
    infinite: MadeUpRows | None = None
    try:
        for rows in attempts(model, columns):
            finite = True if loss is None else _makes_finite_losses(loss, model, rows)
            if finite:
                return rows
            infinite = rows if infinite is None and finite is False else infinite
    except Exception as error:  # a foreign model or collator may want anything
        logger.debug("no made-up examples: %s", type(error).__name__)
    return infinite


@torch.no_grad()
def _makes_finite_losses(loss: ExampleLoss, model: nn.Module, rows: MadeUpRows) -> bool | None:
    """None where the model does not take the examples."""
    try:
        with as_it_was(model):
            for module in model.modules():
                module.training = True
            return all(bool(loss(model, one).isfinite().all()) for one in each_alone(rows))
    except Exception as error:  # likewise
        logger.debug("made-up examples refused: %s", type(error).__name__)
        return None


def _vectorised(
    model: nn.Module, rows: MadeUpRows, compute_loss: ComputeLoss, label_smoothing: float
) -> tuple[ExampleLoss, str] | None:
    try:
        return choose_example_loss(model, rows, compute_loss, label_smoothing)
    except Exception as error:  # the made-up examples do not suit this model
        logger.debug("made-up examples refused: %s", type(error).__name__)
        return None
