"""The preflight of a training run: on the made-up examples on which its loss was chosen.

Real examples would show more, and show it to everybody: whether training stops is seen, so the check
itself would be a release. The made-up ones have the columns, types and widths of the data and the
vocabulary of the model, and nothing of anybody.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from hf_dp.engines.base import ExampleLoss, GradientEngine
from hf_dp.engines.owners import Owners, UserReduction
from hf_dp.engines.preflight import TOLERANCE, preflight
from hf_dp.engines.rows import batch_size
from hf_dp.engines.undisturbed import undisturbed
from hf_dp.plan import PrivacyPlan
from hf_dp.training.choice import Choice
from hf_dp.training.losses import is_coarse
from hf_dp.training.made_up import each_alone
from hf_dp.training.remembered import refuse_remembering

logger = logging.getLogger(__name__)

_COARSE_TOLERANCE = 5e-2  # rounding of half precision, between shapes of batches


def rehearse(
    model: nn.Module,
    choice: Choice,
    *,
    engine: GradientEngine,
    example_loss: ExampleLoss,
    plan: PrivacyPlan,
    one_by_one: bool,
    width: int = 0,
    user_reduction: UserReduction | None = None,
) -> None:
    """Stop training before its first step where it would not do what is claimed.

    Args:
        model: As it is about to be trained.
        choice: The loss, and the made-up examples on which it was chosen.
        engine: The one that will train.
        example_loss: The chosen loss, in the host's context.
        plan: Its clipping and its loss release.
        one_by_one: Whether every micro-batch is one example.
        width: How many examples a micro-batch has.
        user_reduction: How a user's losses make one, where users are clipped as one; else None.

    Raises:
        PrivacyError: See `preflight`.
        ConfigurationError: Likewise.
    """
    if choice.rows is None or not _runs(model, choice, example_loss):
        logger.warning(
            "hf_dp: preflight not possible: the model cannot be tried on made-up examples, so its engine "
            "and its loss were not checked. hf_dp.engines.preflight takes examples of your own making."
        )
        return
    together = None if one_by_one or choice.alone else choice.rows
    refuse_remembering(
        model,
        choice.rows,
        engine=engine,
        example_loss=example_loss,
        plan=plan,
        together=together is not None,
        owner="compute_loss" if choice.is_definition else "example_loss",
    )
    if choice.is_definition:
        logger.info("hf_dp: preflight: nothing to compare, as each example is computed alone")
        return
    owners = None
    if user_reduction is not None and together is not None:  # the first two examples are one user's
        owners = Owners((2, *(1,) * (batch_size(together) - 2)), user_reduction)
    preflight(
        model,
        each_alone(choice.rows),
        together,
        engine=engine,
        example_loss=example_loss,
        clipping=plan.clipping,
        loss_release=plan.loss_release,
        tolerance=_COARSE_TOLERANCE if is_coarse(model) else TOLERANCE,
        width=width,
        owners=owners,
    )
    logger.info("hf_dp: preflight passed")


@torch.no_grad()
def _runs(model: nn.Module, choice: Choice, example_loss: ExampleLoss) -> bool:
    assert choice.rows is not None
    try:
        with undisturbed(model):
            for batch in (choice.rows, *each_alone(choice.rows)):
                example_loss(model, batch)
    except Exception as error:  # a foreign model may want anything of its data
        logger.debug("made-up examples refused: %s", type(error).__name__)
        return False
    return True
