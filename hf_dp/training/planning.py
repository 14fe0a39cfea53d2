"""From arguments to a plan: how many steps, how large a batch, how much noise."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from transformers import TrainingArguments

from hf_dp.accounting.base import Accountant
from hf_dp.clipping.flat import FlatClipping
from hf_dp.clipping.loss import LossRelease
from hf_dp.errors import ConfigurationError, explain
from hf_dp.noise.gaussian import GaussianNoise
from hf_dp.plan import PrivacyPlan
from hf_dp.sampling import (
    BallsInBinsSampling,
    BatchSampler,
    FixedSizeSampling,
    PoissonSampling,
    ShuffledSampling,
    TruncatedPoissonSampling,
)
from hf_dp.training.arguments import DPArguments

logger = logging.getLogger(__name__)

PASSES = {"balls_in_bins": BallsInBinsSampling, "shuffled": ShuffledSampling}

_UNSIZED = 1.0  # noise of a plan that an accountant is about to size


@dataclass(frozen=True)
class Schedule:
    """How the host's numbers translate.

    Attributes:
        num_examples: Examples in the training data, as they enter the accounting.
        expected_batch_size: Mean number of examples in a logical batch.
        steps_per_epoch: Draws that the host counts as one epoch; one pass, with samplers that make any.
        num_steps: Optimizer steps of the whole run.
    """

    num_examples: int
    expected_batch_size: float
    steps_per_epoch: int
    num_steps: int


def schedule(
    args: TrainingArguments,
    dp_args: DPArguments,
    *,
    given: PrivacyPlan | None,
    accumulation: int,
    num_examples: int,
) -> Schedule:
    """Fix the batch size and the number of steps in advance.

    Args:
        args: The host's arguments.
        dp_args: What privacy is asked for.
        given: The user's own plan, whose batch size is used and whose number of steps must fit.
        accumulation: The user's gradient_accumulation_steps, which the host's copy no longer holds.
        num_examples: Length of the training data.

    Raises:
        ConfigurationError: The expected batch is larger than the data, there is no step to make, or
            a given plan is for another number of steps.
    """
    expected = dp_args.expected_batch_size if given is None else given.expected_batch_size
    if expected is None:
        expected = args.per_device_train_batch_size * accumulation * args.world_size
    if expected > num_examples:
        raise ConfigurationError(
            explain(
                "DPArguments.expected_batch_size",
                expected,
                f"at most the number of examples ({num_examples})",
                "The sampling probability expected_batch_size / num_examples cannot exceed 1.",
                "Lower it, or per_device_train_batch_size x gradient_accumulation_steps.",
            )
        )
    steps_per_epoch = _steps_per_epoch(dp_args.sampling, given, expected, num_examples)
    num_steps = (
        args.max_steps
        if args.max_steps >= 0
        else math.ceil(args.num_train_epochs * steps_per_epoch)
    )
    _check_steps(args, num_steps, given)
    return Schedule(num_examples, float(expected), steps_per_epoch, num_steps)


def _steps_per_epoch(
    sampling: str, given: PrivacyPlan | None, expected: float, num_examples: int
) -> int:
    if given is not None and given.pass_length > 1:
        return given.pass_length
    if given is None and sampling in PASSES:
        return max(1, round(num_examples / expected))
    return math.ceil(num_examples / expected)


def _check_steps(args: TrainingArguments, num_steps: int, given: PrivacyPlan | None) -> None:
    if num_steps < 1:
        raise ConfigurationError(
            explain(
                "TrainingArguments.(max_steps, num_train_epochs)",
                (args.max_steps, args.num_train_epochs),
                "at least one step",
                "Every step is a release, so their number is fixed before training.",
                "Set num_train_epochs > 0, or max_steps > 0.",
            )
        )
    if given is not None and given.num_steps != num_steps:
        raise ConfigurationError(
            explain(
                "PrivacyPlan.num_steps",
                given.num_steps,
                f"{num_steps}, the steps that the TrainingArguments ask for",
                "The plan would describe another run than the one that is trained.",
                "Set max_steps to the plan's number of steps.",
            )
        )


def sampler_for(dp_args: DPArguments, when: Schedule) -> BatchSampler:
    """The sampler that `dp_args.sampling` names, for this many examples and this batch size.

    Raises:
        ConfigurationError: Batches of a fixed size are asked for, and the size is no whole number.
    """
    size, count = when.expected_batch_size, when.num_examples
    if dp_args.sampling in PASSES:
        return PASSES[dp_args.sampling](when.steps_per_epoch)
    if dp_args.sampling == "truncated_poisson":
        cap = dp_args.max_batch_size or min(count, math.ceil(size + 10 * math.sqrt(size)))
        return TruncatedPoissonSampling(count, size / count, cap)
    if dp_args.sampling == "fixed_size":
        if not size.is_integer():
            raise ConfigurationError(
                explain(
                    "DPArguments.expected_batch_size",
                    size,
                    "a whole number with sampling='fixed_size'",
                    "Every batch has exactly this size.",
                    "Round it.",
                )
            )
        return FixedSizeSampling(count, int(size))
    return PoissonSampling(size / count)


def plan_for(
    dp_args: DPArguments, when: Schedule, accountant: Accountant, default_ceiling: float
) -> PrivacyPlan:
    """The plan of a run; with a target epsilon the accountant sizes its noise."""
    ceiling = dp_args.loss_ceiling or default_ceiling
    plan = PrivacyPlan(
        sampler=sampler_for(dp_args, when),
        clipping=FlatClipping(dp_args.clipping_norm),
        noise=GaussianNoise(dp_args.noise_multiplier or _UNSIZED),
        num_steps=when.num_steps,
        expected_batch_size=when.expected_batch_size,
        loss_release=LossRelease(dp_args.loss_share, ceiling) if dp_args.private_loss else None,
    )
    if dp_args.target_epsilon is None:
        return plan
    delta = dp_args.delta_for(when.num_examples)
    sized = accountant.calibrate(plan, target_epsilon=dp_args.target_epsilon, target_delta=delta)
    logger.info(
        "hf_dp: %s for epsilon <= %s at delta = %.3g", sized.noise, dp_args.target_epsilon, delta
    )
    return sized
