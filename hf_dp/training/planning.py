"""From arguments to a plan: how many steps, how large a batch, how much noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import TrainingArguments

from hf_dp.accounting.base import Accountant
from hf_dp.clipping.flat import FlatClipping
from hf_dp.clipping.loss import LossRelease
from hf_dp.errors import ConfigurationError, explain
from hf_dp.plan import PrivacyPlan
from hf_dp.sampling import (
    BallsInBinsSampling,
    BatchSampler,
    ContributionSampling,
    FixedSizeSampling,
    PoissonSampling,
    ShuffledSampling,
    TruncatedPoissonSampling,
    Users,
    UserSampling,
)
from hf_dp.training.arguments import DPArguments
from hf_dp.training.chosen_noise import noise_for, with_noise

PASSES = {"balls_in_bins": BallsInBinsSampling, "shuffled": ShuffledSampling}


@dataclass(frozen=True)
class Schedule:
    """How the host's numbers translate.

    Attributes:
        num_units: Examples or users that are protected, as they enter the accounting.
        drawn_from: Examples or users that a sampler draws from; examples also where users are protected
            and their examples drawn.
        expected_batch_size: Mean number of those in a logical batch.
        steps_per_epoch: Draws that the host counts as one epoch; one pass, with samplers that make any.
        num_steps: Optimizer steps of the whole run.
    """

    num_units: int
    drawn_from: int
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
    users: Users | None = None,
) -> Schedule:
    """Fix the batch size and the number of steps in advance.

    Args:
        args: The host's arguments.
        dp_args: What privacy is asked for.
        given: The user's own plan, whose batch size is used and whose number of steps must fit.
        accumulation: The user's gradient_accumulation_steps, which the host's copy no longer holds.
        num_examples: Length of the training data.
        users: Who owns which of them, where users are protected.

    Raises:
        ConfigurationError: The expected batch is larger than the data, its size is not known, there is
            no step to make, or a given plan is for another number of steps or another unit.
    """
    _check_unit(dp_args, given)
    expected = dp_args.expected_batch_size if given is None else given.expected_batch_size
    if expected is None:
        expected = _default_size(args, dp_args, accumulation)
    num_units = num_examples if users is None else users.num_users
    drawn_from, drawn = num_units, "users" if dp_args.draws_users else "examples"
    if users is not None and dp_args.draws_contributions:
        assert dp_args.max_examples_per_user is not None
        drawn_from = users.num_kept(dp_args.max_examples_per_user)
        drawn = "examples that users keep"
    if expected > drawn_from:
        raise ConfigurationError(
            explain(
                "DPArguments.expected_batch_size",
                expected,
                f"at most the number of {drawn} ({drawn_from})",
                "The sampling probability is the quotient of the two, and cannot exceed 1.",
                "Lower it, or per_device_train_batch_size x gradient_accumulation_steps.",
            )
        )
    steps_per_epoch = _steps_per_epoch(dp_args.sampling, given, expected, drawn_from)
    num_steps = (
        args.max_steps
        if args.max_steps >= 0
        else math.ceil(args.num_train_epochs * steps_per_epoch)
    )
    _check_steps(args, num_steps, given)
    return Schedule(num_units, drawn_from, float(expected), steps_per_epoch, num_steps)


def _default_size(args: TrainingArguments, dp_args: DPArguments, accumulation: int) -> float:
    """The expected batch that the host's numbers stand for; they count examples in memory."""
    examples = float(args.per_device_train_batch_size * accumulation * args.world_size)
    if not dp_args.draws_users:
        return examples
    if dp_args.max_examples_per_user is None:
        raise ConfigurationError(
            explain(
                "DPArguments.expected_batch_size",
                None,
                "a number of users, where max_examples_per_user is not set",
                "How many examples a drawn user brings is unknown, so per_device_train_batch_size does not "
                "tell how many users to draw.",
                "Set it to the mean number of users in a logical batch, or set max_examples_per_user.",
            )
        )
    return examples / dp_args.max_examples_per_user


def _check_unit(dp_args: DPArguments, given: PrivacyPlan | None) -> None:
    """Refuse a plan that protects, or draws, something else than the arguments say."""
    if given is None:
        return
    contributions = isinstance(given.sampler, ContributionSampling)
    most = getattr(given.sampler, "max_examples_per_user", None)
    field: str
    value: str
    if given.unit != dp_args.privacy_unit:
        field, value, expected = "unit", given.unit, f"{dp_args.privacy_unit!r}, as privacy_unit"
    elif contributions != dp_args.draws_contributions:
        field, value = "sampler", type(given.sampler).__name__
        expected = f"one that draws {dp_args.user_sampling}, as user_sampling"
    elif contributions and most != dp_args.max_examples_per_user:
        field, value = "sampler.max_examples_per_user", str(most)
        expected = f"{dp_args.max_examples_per_user}, as in DPArguments"
    else:
        return
    raise ConfigurationError(
        explain(
            f"PrivacyPlan.{field}",
            value,
            expected,
            "What is drawn and clipped follows the arguments, and what is claimed the plan.",
            "Let both say the same.",
        )
    )


def _steps_per_epoch(
    sampling: str, given: PrivacyPlan | None, expected: float, drawn_from: int
) -> int:
    if given is not None and given.pass_length > 1:
        return given.pass_length
    if given is None and sampling in PASSES:
        return max(1, round(drawn_from / expected))
    return math.ceil(drawn_from / expected)


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
    """The sampler that `dp_args` names, of as many examples or users and of this batch size.

    Raises:
        ConfigurationError: Batches of a fixed size are asked for, and the size is no whole number.
    """
    if dp_args.draws_contributions:
        assert dp_args.max_examples_per_user is not None
        return ContributionSampling(
            when.expected_batch_size / when.drawn_from, dp_args.max_examples_per_user
        )
    sampler = _sampler(dp_args, when)
    return UserSampling(sampler) if dp_args.draws_users else sampler


def _sampler(dp_args: DPArguments, when: Schedule) -> BatchSampler:
    size, count = when.expected_batch_size, when.drawn_from
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
    dp_args: DPArguments,
    when: Schedule,
    accountant: Accountant,
    default_ceiling: float,
    num_noised: int | None = None,
) -> PrivacyPlan:
    """The plan of a run; with a target epsilon the accountant sizes its noise.

    Args:
        dp_args: What privacy is asked for.
        when: How many steps on how many examples.
        accountant: Bounds epsilon.
        default_ceiling: Of the released loss.
        num_noised: Coordinates of a release, the loss's included; None where the noise is Gaussian.
    """
    ceiling = dp_args.loss_ceiling or default_ceiling
    noise = noise_for(dp_args, num_noised)
    plan = PrivacyPlan(
        sampler=sampler_for(dp_args, when),
        clipping=FlatClipping(dp_args.clipping_norm, noise.norm),
        noise=noise,
        num_steps=when.num_steps,
        expected_batch_size=when.expected_batch_size,
        loss_release=LossRelease(dp_args.loss_share, ceiling) if dp_args.private_loss else None,
    )
    return with_noise(plan, dp_args, accountant, dp_args.delta_for(when.num_units), num_noised)
