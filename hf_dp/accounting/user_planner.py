"""Users or examples: which way of protecting users gives the least noise for the same compute."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_dp._validate import open_unit_interval, positive, positive_integer
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import (
    Gaussian,
    NeighboringRelation,
    PoissonSampled,
    PoissonSampledContributions,
    PrivacyEvent,
    PrivacyUnit,
    SelfComposed,
)

_ENOUGH_USERS = (
    64.0  # drawn per step, below which their own differences drown what the noise leaves
)
_SAME = 1.02  # ratio of noises that nobody would notice

CAVEATS = (
    "The users' sizes are taken as public or assumed: finding them in private data is a release of its "
    "own, for example of a noisy quantile, to be paid from the same budget.",
    "The mean cosine between gradients inside a user, and with it the norm of a user's average, is "
    "assumed; privacy does not depend on it, only this comparison does. Measure it on public data, or pay "
    "for a noisy quantile of norms.",
    "The average of a user with fewer examples than the cap is longer than assumed, and is clipped more: "
    "where many users are that small, prefer a smaller cap.",
    "The noise compared is that of the mean gradient; how much drawn examples differ is not in it.",
)


@dataclass(frozen=True)
class UserRow:
    """One way to train, at the same number of examples per step.

    Attributes:
        user_sampling: Whether "users" are drawn and clipped, or "examples".
        max_examples_per_user: The cap: kept for good of each user, or drawn anew whenever it is drawn.
        sampling_probability: Of a user, or of an example.
        kept_examples: min(size, cap), summed over users.
        coverage: Share of all examples that the run may see.
        filled: Mean over users of min(1, size / cap).
        clipping_norm: Norm of what is clipped, in units of one example's.
        expected_users: Drawn per step where users are drawn, else None.
        noise_multiplier: What the target takes; None where the row is impossible.
        noise: Standard deviation of each coordinate of the released mean gradient, in units of one
            example's norm.
        why_not: What makes the row impossible, or None.
    """

    user_sampling: Literal["users", "examples"]
    max_examples_per_user: int
    sampling_probability: float
    kept_examples: int
    coverage: float
    filled: float
    clipping_norm: float
    expected_users: float | None
    noise_multiplier: float | None = None
    noise: float | None = None
    why_not: str | None = None


@dataclass(frozen=True)
class UserPlan:
    """All rows, the recommended one, and why.

    Attributes:
        rows: By cap, users before examples.
        best: The recommended row, or None if all are impossible.
        reasons: Sentences.
        caveats: What the comparison takes for granted, in sentences.
        num_users: Users.
        target_epsilon: For users.
        target_delta: For users.
    """

    rows: tuple[UserRow, ...]
    best: UserRow | None
    reasons: tuple[str, ...]
    caveats: tuple[str, ...]
    num_users: int
    target_epsilon: float
    target_delta: float


def plan_users(
    sizes: Sequence[int],
    *,
    examples_per_step: float,
    num_steps: int,
    target_epsilon: float,
    target_delta: float | None = None,
    caps: Iterable[int] | None = None,
    cosine: float = 0.0,
    accountant: str = "pld",
) -> UserPlan:
    """Compare drawing users with drawing examples, for several caps on the examples of a user.

    With a cap G, examples per step B and k(G) examples kept, either unit is drawn with probability
    B / k(G), so that all rows compute the same number of gradients. Where examples are drawn, the mean
    gradient carries noise sigma C / B; where users are, sigma C_G / (users per step), and the norm of an
    average of G gradients of norm C is taken to be C_G = C sqrt((1 + (G - 1) cosine) / G).

    Args:
        sizes: Examples of each user, all > 0; public or assumed.
        examples_per_step: Expected number of gradients per step, > 0.
        num_steps: > 0.
        target_epsilon: For users, > 0.
        target_delta: In (0, 1 / users); None for users ** -1.1.
        caps: The caps to try; None for 1, 2, 4, ... and the largest size.
        cosine: Mean cosine between gradients of one user's examples, in [0, 1]; assumed.
        accountant: Who certifies.

    Raises:
        ConfigurationError: A number is out of range.

    Source:
        Charles et al. (2024), arXiv 2407.07737, for both ways and the comparison at equal compute.
    """
    from hf_dp.accounting import (  # that package offers this function, too
        check_delta,
        default_delta,
    )

    sizes = _checked_sizes(sizes)
    budget = positive("plan_users.examples_per_step", examples_per_step, _WHY_BUDGET, _REMEDY)
    steps = positive_integer("plan_users.num_steps", num_steps, "Each is a release.", _REMEDY)
    positive("plan_users.target_epsilon", target_epsilon, "It is what may be spent.", _REMEDY)
    if not 0 <= cosine <= 1:
        raise ConfigurationError(
            explain("plan_users.cosine", cosine, "a number in [0, 1]", _WHY_COSINE, "Use 0 or 0.1.")
        )
    delta = default_delta(len(sizes)) if target_delta is None else target_delta
    open_unit_interval("plan_users.target_delta", delta, "It is a chance.", _REMEDY)
    check_delta(delta, len(sizes))
    rows = []
    for cap in _caps(sizes) if caps is None else sorted(set(caps)):
        positive_integer("plan_users.caps", cap, "It counts examples.", _REMEDY)
        for row in _rows(sizes, cap, budget, cosine):
            rows.append(_with_noise(row, steps, budget, target_epsilon, delta, accountant))
    best = _recommended(rows)
    reasons = _reasons(best, rows)
    return UserPlan(tuple(rows), best, reasons, CAVEATS, len(sizes), target_epsilon, delta)


def _checked_sizes(sizes: Sequence[int]) -> Sequence[int]:
    if len(sizes) < 2:
        expected = "at least two users"
        raise ConfigurationError(
            explain("plan_users.sizes", list(sizes), expected, _WHY_SIZES, _REMEDY)
        )
    for size in set(sizes):
        positive_integer("plan_users.sizes", size, _WHY_SIZES, "Leave users without examples out.")
    return sizes


def _caps(sizes: Sequence[int]) -> list[int]:
    """Powers of two below the largest size, and that."""
    largest = max(sizes)
    return sorted({2**power for power in range(largest.bit_length())} | {largest})


def _rows(sizes: Sequence[int], cap: int, budget: float, cosine: float) -> list[UserRow]:
    counts = Counter(sizes)
    kept = sum(min(size, cap) * users for size, users in counts.items())
    total = sum(size * users for size, users in counts.items())
    filled = math.fsum(min(1.0, size / cap) * n for size, n in counts.items()) / len(sizes)
    chance = budget / kept
    cohort = chance * len(sizes)
    why_not = None
    if chance > 1:
        why_not = f"{budget:g} examples per step are more than the {kept} that are kept."
    of_users = UserRow(
        user_sampling="users",
        max_examples_per_user=cap,
        sampling_probability=chance,
        kept_examples=kept,
        coverage=1.0,  # fresh ones every time
        filled=filled,
        clipping_norm=math.sqrt((1 + (cap - 1) * cosine) / cap),
        expected_users=cohort,
        why_not=why_not,
    )
    if why_not is None and cohort < 1:
        few = f"only {cohort:.2g} users would be drawn per step."
        of_users = dataclasses.replace(of_users, why_not=few)
    of_examples = dataclasses.replace(
        of_users,
        user_sampling="examples",
        coverage=kept / total,
        clipping_norm=1.0,
        expected_users=None,
        why_not=why_not,
    )
    return [of_users, of_examples]


@dataclass(frozen=True)
class _Run:
    """What an accountant calibrates."""

    row: UserRow
    num_steps: int
    noise_multiplier: float = 1.0

    unit: PrivacyUnit = "user"
    relation: NeighboringRelation = NeighboringRelation.REPLACE_SPECIAL

    def event(self) -> PrivacyEvent:
        chance, noise = self.row.sampling_probability, Gaussian(self.noise_multiplier)
        if self.row.user_sampling == "users":
            return SelfComposed(PoissonSampled(chance, noise), self.num_steps)
        most = self.row.max_examples_per_user
        return SelfComposed(PoissonSampledContributions(chance, most, noise), self.num_steps)

    def with_noise_multiplier(self, noise_multiplier: float) -> _Run:
        return dataclasses.replace(self, noise_multiplier=noise_multiplier)


def _with_noise(
    row: UserRow, steps: int, budget: float, epsilon: float, delta: float, accountant: str
) -> UserRow:
    if row.why_not is not None:
        return row
    from hf_dp.accounting import accountant_named

    run = accountant_named(accountant).calibrate(
        _Run(row, steps), target_epsilon=epsilon, target_delta=delta
    )
    divisor = budget if row.expected_users is None else row.expected_users
    noise = run.noise_multiplier * row.clipping_norm / divisor
    return dataclasses.replace(row, noise_multiplier=run.noise_multiplier, noise=noise)


def _recommended(rows: Sequence[UserRow]) -> UserRow | None:
    """The least noise; where it is nearly the same, users rather than examples, then a smaller cap.

    Examples first come into question with a larger cap, which sees more of the data at hardly more noise.
    """
    possible = [row for row in rows if row.noise is not None]
    # With a cap of 1 as many users are drawn as the compute allows.
    enough = [row for row in possible if row.max_examples_per_user == 1 or _draws_enough(row)]
    enough = enough or possible
    if not enough:
        return None
    least = min(row.noise or math.inf for row in enough)
    close = [row for row in enough if (row.noise or math.inf) <= least * _SAME]
    users = [row for row in close if row.user_sampling == "users"]
    if users:
        return min(users, key=lambda row: row.max_examples_per_user)
    return max(close, key=lambda row: row.coverage)


def _draws_enough(row: UserRow) -> bool:
    return row.expected_users is None or row.expected_users >= _ENOUGH_USERS


def _reasons(best: UserRow | None, rows: Sequence[UserRow]) -> tuple[str, ...]:
    if best is None:
        return ("No row is possible; each says why.",)
    cap = best.max_examples_per_user
    reasons = [f"Draw {best.user_sampling}, with at most {cap} examples of each user."]
    other = [
        row.noise
        for row in rows
        if row.noise is not None and row.user_sampling != best.user_sampling
    ]
    if other and best.noise is not None:
        reasons.append(
            f"Its noise per coordinate is {best.noise:.3g} of an example's norm; the least the other way "
            f"is {min(other):.3g}."
        )
    if best.user_sampling == "users":
        reasons.append(
            "Every user's examples are seen over time, whatever the cap; the cap does not enter epsilon."
        )
        if not _draws_enough(best):
            reasons.append(
                f"Only {best.expected_users:.3g} users are drawn per step: with more examples per step "
                "they would differ less from all users."
            )
    else:
        reasons.append(
            f"{best.coverage:.0%} of all examples are ever seen; a larger cap sees more."
        )
    return tuple(reasons)


_WHY_BUDGET = "It is the compute of a step, the same in all rows."
_WHY_SIZES = "How many examples users own decides who is drawn how often."
_WHY_COSINE = "It says how much of a user's gradient averages out."
_REMEDY = "Use what the training run would."
