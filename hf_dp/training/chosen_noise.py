"""The noise of a run: built from the arguments, sized by the accountant, or found by a search."""

from __future__ import annotations

import dataclasses
import logging

from torch import nn

from hf_dp.accounting import ACCOUNTANTS
from hf_dp.accounting.base import Accountant
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import Norm
from hf_dp.noise import (
    GaussianNoise,
    LaplaceNoise,
    NoiseMechanism,
    ScaleMixtureNoise,
    search_noise,
)
from hf_dp.noise.candidates import FAMILIES
from hf_dp.plan import PrivacyPlan
from hf_dp.reports.of_noise import dear_in_high_dimension
from hf_dp.scale_law import ScaleLaw
from hf_dp.training.arguments import DPArguments
from hf_dp.training.noise_options import SEARCHED

logger = logging.getLogger(__name__)

_OF_THE_WINNER = 2  # sentences that a search says of it; behind them where others would win
_UNSIZED = 1.0  # noise of a plan that an accountant is about to size


def num_noised(model: nn.Module, dp_args: DPArguments) -> int | None:
    """Coordinates of a release, the loss's included; None where its noise does not depend on them."""
    if dp_args.noise == "gaussian":
        return None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained + dp_args.private_loss


def norm_of(dp_args: DPArguments) -> Norm:
    """In which each example is clipped."""
    return "l1" if dp_args.clipping_norm_type == "l1" else "l2"


def noise_for(dp_args: DPArguments, dimension: int | None) -> NoiseMechanism:
    """The mechanism that `dp_args` names, not sized yet if there is a target; any that is searched for.

    Args:
        dp_args: What is asked for.
        dimension: Coordinates of a release; None where the noise is Gaussian.
    """
    size = dp_args.noise_multiplier or _UNSIZED
    norm = norm_of(dp_args)
    if dp_args.noise == "laplace":
        return LaplaceNoise(size, norm=norm, dimension=dimension)
    return GaussianNoise(size, norm=norm)


def with_noise(
    plan: PrivacyPlan,
    dp_args: DPArguments,
    accountant: Accountant,
    delta: float,
    dimension: int | None,
) -> PrivacyPlan:
    """The plan with noise of the size, and of the shape, that was asked for.

    Raises:
        ConfigurationError: No proof bounds what this noise costs in this plan.
    """
    _refuse_unproved(plan, dp_args, accountant, dimension)
    target = dp_args.target_epsilon
    if target is None:
        return plan
    if dp_args.noise in SEARCHED:
        assert dimension is not None
        sized = _searched(plan, dp_args, accountant, (target, delta), dimension)
    else:
        sized = accountant.calibrate(plan, target_epsilon=target, target_delta=delta)
    logger.info("hf_dp: %s for epsilon <= %s at delta = %.3g", sized.noise, target, delta)
    return sized


def warn_of_dear_noise(plan: PrivacyPlan) -> None:
    """Say so where Gaussian noise would be less."""
    warning = dear_in_high_dimension(plan.noise.event())
    if warning is not None:
        logger.warning("hf_dp: %s", warning)


def _searched(
    plan: PrivacyPlan,
    dp_args: DPArguments,
    accountant: Accountant,
    target: tuple[float, float],
    dimension: int,
) -> PrivacyPlan:
    """The plan with the least noise of the families that were asked for, for epsilon and delta."""
    logger.info("hf_dp: searching for the least noise (up to a minute; the result is kept)")
    try:
        found = search_noise(
            target_epsilon=target[0],
            target_delta=target[1],
            step=plan.sampler.event,
            num_steps=plan.num_passes,
            norm=plan.clipping.norm,
            dimension=dimension,
            accountant=accountant,
            families=("lmo",) if dp_args.noise == "lmo" else FAMILIES,
            clipping_norm=plan.clipping.sensitivity,
            unit=plan.unit,
            relation=plan.relation,
        )
    except ConfigurationError as error:
        raise ConfigurationError(
            explain(
                "DPArguments.noise",
                dp_args.noise,
                "noise that reaches the target_epsilon",
                f"None was found. {error}",
                "Ask for a larger epsilon, or use noise='gaussian'.",
            )
        ) from error
    told = len(found.refused) + _OF_THE_WINNER
    for place, sentence in enumerate(found.why()):
        logger.log(logging.INFO if place < told else logging.DEBUG, "hf_dp: %s", sentence)
    return dataclasses.replace(plan, noise=found.mechanism)


def _refuse_unproved(
    plan: PrivacyPlan, dp_args: DPArguments, accountant: Accountant, dimension: int | None
) -> None:
    """Refuse noise whose cost has no proof in this plan; "auto" takes another then."""
    if dp_args.noise == "lmo":
        one_scale = ScaleLaw(uniform_low=1.0, uniform_high=1.0)
        mixture = ScaleMixtureNoise(one_scale, norm=plan.clipping.norm, dimension=dimension)
        plan = dataclasses.replace(plan, noise=mixture)
    event, relation = plan.event(), plan.relation
    if dp_args.noise in ("gaussian", "auto") or accountant.can_cost(event, relation):
        return
    able = [name for name, make in ACCOUNTANTS.items() if make().can_cost(event, relation)]
    if able:
        beside, remedy = f"accountant={accountant.name!r}", f"Use accountant={able[0]!r}"
    elif dp_args.draws_contributions:
        beside, remedy = "user_sampling='examples'", "Use user_sampling='users'"
    else:
        beside, remedy = f"sampling={dp_args.sampling!r}", "Use sampling='poisson'"
    raise ConfigurationError(
        explain(
            "DPArguments.noise",
            dp_args.noise,
            f"'gaussian' with {beside}",
            "What other noise costs there has no proven bound, and what cannot be bounded must not be "
            "counted as nothing.",
            f"{remedy}, or noise='gaussian'.",
        )
    )
