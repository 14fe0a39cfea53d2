"""Runs that protect users, as the command line describes them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from hf_dp._validate import one_of, positive_integer
from hf_dp.cli.run import PoissonRun
from hf_dp.cli.sampled import SampledRun
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import (
    Gaussian,
    Laplace,
    NeighboringRelation,
    PoissonSampledContributions,
    PrivacyEvent,
    PrivacyUnit,
    SelfComposed,
)

UserSampling = Literal["users", "examples"]
_USER_SAMPLINGS = ("users", "examples")
_UNITS = ("example", "user")


@dataclass(frozen=True)
class UserRun:
    """A run about users: they are drawn as `drawn` says, or examples are, of which a user owns several.

    Attributes:
        drawn: The sampling of users, or of examples.
        user_sampling: Which of them is drawn.
        max_examples_per_user: Of every user, > 0; where users are drawn it changes nothing, and may be
            None.
    """

    drawn: PoissonRun | SampledRun
    user_sampling: UserSampling
    max_examples_per_user: int | None

    unit: ClassVar[PrivacyUnit] = "user"

    @property
    def sampling(self) -> str:
        """How batches are drawn."""
        return self.drawn.sampling

    @property
    def sampling_probability(self) -> float:
        """Chance of a user, or of an example, to be in a batch."""
        return self.drawn.sampling_probability

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return self.drawn.num_steps

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise / clipping norm of what is drawn."""
        return self.drawn.noise_multiplier

    @property
    def kind(self) -> Gaussian | Laplace:
        """The noise; its own multiplier is not used."""
        return self.drawn.kind

    @property
    def relation(self) -> NeighboringRelation:
        """Which datasets count as neighbours."""
        return self.drawn.relation

    def event(self) -> PrivacyEvent:
        """What the whole run releases."""
        if self.user_sampling == "users":
            return self.drawn.event()
        most = _checked_most(self.max_examples_per_user)
        noise = dataclasses.replace(self.kind, noise_multiplier=self.noise_multiplier)
        step = PoissonSampledContributions(self.sampling_probability, most, noise)
        return SelfComposed(step, self.num_steps)

    def with_noise_multiplier(self, noise_multiplier: float) -> UserRun:
        """The same run with other noise."""
        drawn = self.drawn.with_noise_multiplier(noise_multiplier)
        return dataclasses.replace(self, drawn=drawn)


def protecting(
    run: PoissonRun | SampledRun,
    privacy_unit: str,
    *,
    user_sampling: str | None = None,
    max_examples_per_user: int | None = None,
) -> PoissonRun | SampledRun | UserRun:
    """The run as one about `privacy_unit`; see `UserRun` for the arguments.

    Raises:
        ConfigurationError: No unit or way of drawing users has that name, or the options do not fit.
    """
    one_of("hf-dp.privacy_unit", privacy_unit, _UNITS, "It is whose data is protected together.")
    if privacy_unit == "example":
        given = {"user_sampling": user_sampling, "max_examples_per_user": max_examples_per_user}
        for option, value in given.items():
            if value is not None:
                raise _misfit(
                    option,
                    value,
                    "nothing with privacy unit 'example'",
                    "Each example is protected for itself, whoever owns it.",
                    "Give --privacy-unit user.",
                )
        return run
    drawn = user_sampling or "users"
    one_of("hf-dp.user_sampling", drawn, _USER_SAMPLINGS, "It decides what a user moves.")
    if drawn == "examples" and run.sampling != "poisson":
        raise _misfit(
            "sampling",
            run.sampling,
            "'poisson' with user sampling 'examples'",
            "What several examples of one user cost is only proven for Poisson sampling.",
            "Give --sampling poisson, or --user-sampling users.",
        )
    if drawn == "examples" or max_examples_per_user is not None:
        _checked_most(max_examples_per_user)
    return UserRun(run, cast(UserSampling, drawn), max_examples_per_user)


def _checked_most(max_examples_per_user: int | None) -> int:
    return positive_integer(
        "hf-dp.max_examples_per_user",
        max_examples_per_user,
        "Where examples are drawn, a user is protected with all of them that may be drawn.",
        "Give --max-examples-per-user, or --user-sampling users without it.",
    )


def _misfit(option: str, value: object, expected: str, why: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(explain(f"hf-dp.{option}", value, expected, why, remedy))
