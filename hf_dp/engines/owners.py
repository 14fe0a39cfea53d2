"""Whose the rows of a micro-batch are: several of them make one unit, clipped as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_dp._validate import one_of, positive_integer
from hf_dp.engines.rows import batch_size
from hf_dp.errors import ConfigurationError, explain
from hf_dp.layers.packing import Packing

UserReduction = Literal["mean", "sum"]
USER_REDUCTIONS: tuple[UserReduction, ...] = ("mean", "sum")


@dataclass(frozen=True)
class Owners:
    """The rows of a micro-batch by unit: the first ``sizes[0]`` rows are the first unit's, and so on.

    Attributes:
        sizes: Rows of each unit, ``(U,)``, all positive.
        reduction: What of its rows' losses is differentiated: their "mean", or their "sum".
    """

    sizes: tuple[int, ...]
    reduction: UserReduction = "mean"

    def __post_init__(self) -> None:
        for size in self.sizes:
            positive_integer(
                "Owners.sizes", size, "A unit without rows has no gradient.", "Leave it out."
            )
        one_of("Owners.reduction", self.reduction, USER_REDUCTIONS, "It is what a user's loss is.")

    @property
    def num_units(self) -> int:
        """U."""
        return len(self.sizes)

    @property
    def num_rows(self) -> int:
        """B."""
        return sum(self.sizes)

    @property
    def sums(self) -> bool:
        """Whether a unit's loss is the sum of its rows', not their mean."""
        return self.reduction == "sum"

    def packing(self) -> Packing:
        """How rows make units, for the factors of one pass."""
        return Packing(self.sizes)

    def weighted(self, losses: Tensor) -> Tensor:
        """Each row's part in its unit's loss, ``(B,)`` to ``(B,)``."""
        return losses if self.sums else losses / self._sizes_of_rows(losses)

    def means(self, losses: Tensor) -> Tensor:
        """The mean loss of each unit's rows, ``(B,)`` to ``(U,)``; not finite if one of them is not."""
        return self.packing().added(losses / self._sizes_of_rows(losses))

    def _sizes_of_rows(self, losses: Tensor) -> Tensor:
        sizes = torch.tensor(self.sizes)
        return torch.repeat_interleave(sizes, sizes).to(losses)


def checked_owners(owners: Owners | None, inputs: Mapping[str, Any]) -> Owners | None:
    """`owners`, if they own just the rows of `inputs`.

    Raises:
        ConfigurationError: Some row has no owner, or there are too few rows.
    """
    if owners is not None and owners.num_rows != batch_size(inputs):
        raise ConfigurationError(
            explain(
                "Owners.sizes",
                "of another batch",
                "as many rows, in all, as the batch has",
                "A row without an owner would be nobody's, and clipped with nobody.",
                "Count the rows of each user.",
            )
        )
    return owners
