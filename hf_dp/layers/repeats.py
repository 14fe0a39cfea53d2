"""Whether a module gives a unit alone what it gave it among others: else a rerun is not the unit's.

A module that was given its units in one order, sorted perhaps, and gives them back in another would be run
again with one unit's numbers and another's gradient. What it gave in the forward pass is marked by a few
secret random sums of each unit's numbers, which a rerun must give again.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.base import UnitAxis

_SUMS = 4
_CLOSE, _COARSE = 1e-3, 5e-2  # relative to a unit's length; rounding in float32 and below it
_LARGEST = 1e15  # of the numbers that are compared as they are
_NAN = 3.0


class UnrepeatedError(UncoveredParameterError):
    """A module that is run again for one unit alone does not give what it gave."""

    def __init__(self, described: str) -> None:
        """Name the module."""
        super().__init__(
            f"{described}: expected it to give an example alone what it gives it among others. It did "
            "not, so its gradient cannot be told apart by running it again: it may sort examples, or "
            "let them influence one another. Use engine='sequential', or freeze it."
        )


@dataclass(frozen=True)
class _Mark:
    """One output's random sums and lengths, unit by unit.

    Attributes:
        over_last: Weights of the last axis, ``(W, 4)``.
        over_rest: Weights of the others, ``(R, 4)``.
        sums: ``(B, 5)``, the last being a length.
    """

    over_last: Tensor
    over_rest: Tensor
    sums: Tensor

    @classmethod
    def of(cls, output: Tensor, axis: UnitAxis, num_units: int) -> _Mark:
        rows = axis.units_first(output.detach(), num_units)
        width = rows.shape[-1] if rows.dim() > 1 else 1
        rows = (
            rows.reshape(num_units, -1, width) if rows.numel() else rows.new_zeros(num_units, 0, 1)
        )
        generator = torch.Generator().manual_seed(secrets.randbits(63))
        over_last, over_rest = (
            torch.randn(length, _SUMS, generator=generator).to(rows.device)
            for length in (rows.shape[2], rows.shape[1])
        )
        return cls(over_last, over_rest, _sums(rows, over_last, over_rest))

    def again(self, output: Tensor, num_units: int) -> Tensor:
        """The same of units that come first, ``(n, 5)``; not a number where they have not as many."""
        length, width = len(self.over_rest), len(self.over_last)
        if output.numel() != num_units * length * width:
            return self.sums.new_full((num_units, _SUMS + 1), torch.nan)
        rows = output.detach().reshape(num_units, length, width)
        return _sums(rows, self.over_last, self.over_rest)

    def differs(self, found: Tensor, unit: int | None, tolerance: float) -> Tensor:
        """Whether any unit's, or that one's, are not what was noted; 0-d."""
        noted = self.sums if unit is None else self.sums[unit]
        gap = (noted - found)[..., :_SUMS].abs().amax(-1)
        allowed = tolerance * noted[..., _SUMS] + torch.finfo(noted.dtype).tiny ** 0.5
        differs: Tensor = ~(gap <= allowed).all()
        return differs


class Marks:
    """What a module gave each unit among others, as far as a rerun must show it.

    Guarantees:
        * A unit whose output differs from that noted by as much as its own length is found out, whatever
          other units hold, but for a chance below one in a million, or one in a thousand if `coarse`.
        * A difference below 0.1 % of that length passes as rounding, or below 5 % if `coarse`; so does
          what has no influence on the outputs yet, say behind a gate that is zero.
    """

    def __init__(self, outputs: Sequence[Tensor], axes: Sequence[UnitAxis], num_units: int) -> None:
        """Note `outputs`; where `axes` have no units nothing can be told apart, and nothing is."""
        self._marks = [
            None if axis.dim is None else _Mark.of(output, axis, num_units)
            for output, axis in zip(outputs, axes, strict=True)
        ]

    def of_unit(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """What one unit's outputs show, in the same way; may be vectorised over units."""
        return [
            mark.again(output, 1)[0]
            for mark, output in zip(self._marks, outputs, strict=True)
            if mark is not None
        ]

    def of_all(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The same of outputs of all units, ``(B, ...)``, that were found in another way."""
        return [
            mark.again(output, len(mark.sums))
            for mark, output in zip(self._marks, outputs, strict=True)
            if mark is not None
        ]

    def check(
        self, found: Sequence[Tensor], unit: int | None, *, coarse: bool, described: str
    ) -> None:
        """Refuse what `of_unit` found, for one unit or for all, if it is not what was noted.

        Args:
            found: ``(5,)`` or ``(B, 5)`` for each output that has units.
            unit: Which; None for all.
            coarse: Whether numbers may have been rounded to fewer digits than float32 has.
            described: The module, for the message.

        Raises:
            UnrepeatedError: It is not.
        """
        tolerance = _COARSE if coarse else _CLOSE
        marks = [mark for mark in self._marks if mark is not None]
        wrong = [mark.differs(one, unit, tolerance) for mark, one in zip(marks, found, strict=True)]
        if wrong and bool(torch.stack(wrong).any()):
            raise UnrepeatedError(described)


def _sums(rows: Tensor, over_last: Tensor, over_rest: Tensor) -> Tensor:
    """``(B, R, W)`` to ``(B, 5)``; what masks hold, and what no square would, counts by its sign."""
    rows = rows.to(torch.float32)
    rows = torch.where(rows.abs() <= _LARGEST, rows, rows.sign()).nan_to_num(_NAN)
    sums = ((rows @ over_last) * over_rest).sum(1)
    return torch.cat([sums, torch.linalg.vector_norm(rows, dim=(1, 2))[:, None]], 1)
