"""Sampling where all examples of a user are protected together: of users, or of bounded examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from hf_dp._validate import positive_integer
from hf_dp.coins import Coins
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import (
    NeighboringRelation,
    PoissonSampledContributions,
    PrivacyEvent,
    PrivacyUnit,
)
from hf_dp.sampling.base import BatchSampler
from hf_dp.sampling.poisson import PoissonSampling


@dataclass(frozen=True)
class UserSampling(BatchSampler):
    """Any sampler, over users: who is drawn brings examples, whose gradients are clipped as one.

    Attributes:
        users: Draws users as it would draw examples.

    Relation, pass and event are those of `users`. How many examples a user brings does not enter: a
    user's share of the sum is bounded as a whole.
    """

    users: BatchSampler

    unit: ClassVar[PrivacyUnit] = "user"

    def __post_init__(self) -> None:
        if not isinstance(self.users, BatchSampler) or self.users.unit == "user":
            raise ConfigurationError(
                explain(
                    "UserSampling.users",
                    type(self.users).__name__,
                    "a sampler of examples, which will draw users",
                    "It decides who is in a batch, and is what is accounted for.",
                    "Use PoissonSampling(expected number of users / number of users).",
                )
            )

    @property
    def relation(self) -> NeighboringRelation:
        """Which datasets count as neighbours."""
        return self.users.relation

    @property
    def pass_length(self) -> int:
        return self.users.pass_length

    def batches(self, num_units: int, coins: Coins) -> Iterator[list[int]]:
        """Logical batches without end, each a list of users."""
        return self.users.batches(num_units, coins)

    def event(self, inner: PrivacyEvent) -> PrivacyEvent:
        return self.users.event(inner)


@dataclass(frozen=True)
class ContributionSampling(BatchSampler):
    """Poisson sampling of examples, of which each user owns at most `max_examples_per_user`.

    Attributes:
        sampling_probability: Chance that an example is in a batch, in (0, 1].
        max_examples_per_user: Examples of one user among those that are drawn from, > 0.

    Gradients are clipped example by example, so a user moves the sum by as many clipping norms as
    examples were drawn of them: a binomial number. That mixture is what is accounted for (Charles et
    al. 2024, arXiv 2407.07737). The relation is REPLACE_SPECIAL: numbers of users and of kept examples
    are public.
    """

    sampling_probability: float
    max_examples_per_user: int

    unit: ClassVar[PrivacyUnit] = "user"
    relation: ClassVar[NeighboringRelation] = NeighboringRelation.REPLACE_SPECIAL

    def __post_init__(self) -> None:
        PoissonSampling(self.sampling_probability)  # refuses what is no probability
        positive_integer(
            "ContributionSampling.max_examples_per_user",
            self.max_examples_per_user,
            "It bounds how far one user can move a sum.",
            "Use a small number, such as 4.",
        )

    def batches(self, num_units: int, coins: Coins) -> Iterator[list[int]]:
        """Logical batches without end, each a list of places among the `num_units` kept examples."""
        return PoissonSampling(self.sampling_probability).batches(num_units, coins)

    def event(self, inner: PrivacyEvent) -> PrivacyEvent:
        return PoissonSampledContributions(
            self.sampling_probability, self.max_examples_per_user, inner
        )
