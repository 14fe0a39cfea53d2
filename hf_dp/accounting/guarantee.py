"""What an accountant answers: numbers, and what they are a statement about."""

from __future__ import annotations

from dataclasses import dataclass

from hf_dp.errors import PrivacyError, explain
from hf_dp.events import NeighboringRelation, PrivacyUnit


@dataclass(frozen=True)
class Guarantee:
    """(epsilon, delta)-differential privacy, and what it is a statement about.

    Attributes:
        epsilon: In nats, >= 0; inf when nothing is guaranteed.
        delta: In (0, 1).
        is_upper_bound: Whether `epsilon` is proven never to be too small.
        accountant: Name of the accountant that computed it.
        unit: Whose data is protected together.
        relation: Which pairs of datasets are hard to tell apart.
        lower: An epsilon that provably does not hold, where the accountant knows one.
        estimate: An approximation without proof, where the accountant has one.
    """

    epsilon: float
    delta: float
    is_upper_bound: bool
    accountant: str
    unit: PrivacyUnit = "example"
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE
    lower: float | None = None
    estimate: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is not a number: it would pass every comparison with a budget."""
        for name in ("epsilon", "lower", "estimate"):
            value = getattr(self, name)
            if value is None or value >= 0:
                continue
            raise PrivacyError(
                explain(
                    f"Guarantee.{name}",
                    value,
                    "a number >= 0, or inf",
                    "The accountant's arithmetic failed, so nothing is proven.",
                    "Use the other accountant, and report this event as a bug.",
                )
            )
