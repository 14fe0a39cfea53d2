"""Whether a module gives a unit alone what it gave it among others: else a rerun is not the unit's.

A module that was given its units in one order, sorted perhaps, and gives them back in another would be run
again with one unit's numbers and another's gradient. What it gave in the forward pass is marked by a few
secret random sums of each unit's numbers, which a rerun must give again.

So that a few large numbers, say those that a mask puts in, do not drown the others, there are sums for
several magnitudes: a number ``x`` counts at the magnitude ``s`` with ``u / (1 + u**2)``, ``u = x / s``.
That is little for what is much larger or much smaller, and a relative error of ``x`` is none larger there.
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
_LARGEST, _SMALLEST = 1e15, 1e-15  # of the numbers that are compared as they are
_NAN = 3.0
# The magnitudes, as shares of a unit's numbers that are smaller: the largest comes first.
_SHARES = (1.0, 0.5, 0.02)
# Relative to a unit's length at each of them: rounding in float32, and below it.
_CLOSE, _COARSE = (1e-3, 1e-3, 1e-3), (5e-2, 5e-2, 0.5)
_LOOKED_AT = 2**11  # numbers of a unit, from which magnitudes are taken


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
        scales: The magnitudes, ``(B, 3)``.
        varies: Which numbers are not equal in all units, ``(R, W)``; the others count at the first only.
        sums: ``(B, 3, 5)``, the last being a length.
    """

    over_last: Tensor
    over_rest: Tensor
    scales: Tensor
    varies: Tensor
    sums: Tensor

    @classmethod
    def of(cls, output: Tensor, axis: UnitAxis, num_units: int) -> _Mark:
        rows = axis.units_first(output.detach(), num_units)
        width = rows.shape[-1] if rows.dim() > 1 else 1
        rows = _plain(
            rows.reshape(num_units, -1, width) if rows.numel() else rows.new_zeros(num_units, 0, 1)
        )
        generator = torch.Generator().manual_seed(secrets.randbits(63))
        over_last, over_rest = (
            torch.randn(length, _SUMS, generator=generator).to(rows.device)
            for length in (rows.shape[2], rows.shape[1])
        )
        varies = (rows != rows[:1]).any(0)
        varies |= ~varies.any()
        scales = _scales(rows, varies, generator)
        sums = _sums(rows, scales, varies, over_last, over_rest)
        return cls(over_last, over_rest, scales, varies, sums)

    def again(self, output: Tensor, scales: Tensor) -> Tensor:
        """The same of units that come first, ``(n, 3, 5)``; not a number where they have not as many."""
        length, width, num_units = len(self.over_rest), len(self.over_last), len(scales)
        if output.numel() != num_units * length * width:
            return self.sums.new_full((num_units, len(_SHARES), _SUMS + 1), torch.nan)
        rows = _plain(output.detach().reshape(num_units, length, width))
        return _sums(rows, scales, self.varies, self.over_last, self.over_rest)

    def differs(self, found: Tensor, unit: int | None, tolerance: Sequence[float]) -> Tensor:
        """Whether any unit's, or that one's, are not what was noted; 0-d."""
        noted = self.sums if unit is None else self.sums[unit]
        gap = (noted - found)[..., :_SUMS].abs().amax(-1)
        allowed = noted[..., _SUMS] * noted.new_tensor(tolerance)
        differs: Tensor = ~(gap <= allowed + torch.finfo(noted.dtype).tiny ** 0.5).all()
        return differs


class Marks:
    """What a module gave each unit among others, as far as a rerun must show it.

    Guarantees:
        * A unit whose output differs from that noted by as much as its own length, at one of three
          magnitudes of its numbers (the largest, the middle one, and that which 2 % are below), is found
          out, whatever other units hold, but for a chance below one in a million, or one in a hundred if
          `coarse`.
        * A difference below 0.1 % of those lengths passes as rounding, or below 5 % if `coarse` (half of
          it at the smallest); so does what has no influence on the outputs yet, say behind a gate that
          is zero.
    """

    def __init__(self, outputs: Sequence[Tensor], axes: Sequence[UnitAxis], num_units: int) -> None:
        """Note `outputs`; where `axes` have no units nothing can be told apart, and nothing is."""
        self._marks = [
            None if axis.dim is None else _Mark.of(output, axis, num_units)
            for output, axis in zip(outputs, axes, strict=True)
        ]

    def of_unit(self, outputs: Sequence[Tensor], unit: Tensor) -> list[Tensor]:
        """What one unit's outputs show, in the same way; may be vectorised over units.

        Args:
            outputs: The unit's own.
            unit: Which, 0-d.
        """
        return [
            mark.again(output, mark.scales.index_select(0, unit.reshape(1)))[0]
            for mark, output in zip(self._marks, outputs, strict=True)
            if mark is not None
        ]

    def of_all(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The same of outputs of all units, ``(B, ...)``, that were found in another way."""
        return [
            mark.again(output, mark.scales)
            for mark, output in zip(self._marks, outputs, strict=True)
            if mark is not None
        ]

    def check(
        self, found: Sequence[Tensor], unit: int | None, *, coarse: bool, described: str
    ) -> None:
        """Refuse what `of_unit` found, for one unit or for all, if it is not what was noted.

        Args:
            found: ``(3, 5)`` or ``(B, 3, 5)`` for each output that has units.
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


def _plain(rows: Tensor) -> Tensor:
    """In float32, what masks hold within bounds."""
    return rows.to(torch.float32).clamp(-_LARGEST, _LARGEST).nan_to_num(_NAN)


def _scales(rows: Tensor, varies: Tensor, generator: torch.Generator) -> Tensor:
    """``(B, R, W)`` to ``(B, 3)``: magnitudes of the numbers that vary and are not zero.

    The largest number is left out of all but the first, however often it comes: it is a mask's.
    """
    sizes = rows.abs().flatten(1)
    if sizes.shape[1] == 0:
        return sizes.new_ones(len(sizes), len(_SHARES))
    largest = sizes.amax(1, keepdim=True)
    if sizes.shape[1] > _LOOKED_AT:
        places = torch.randint(sizes.shape[1], (_LOOKED_AT,), generator=generator)
        places = places.to(rows.device)
        sizes, varies = sizes[:, places], varies.flatten()[places]
    counts = (sizes > 0) & (sizes < largest) & varies.flatten()
    ordered = sizes.masked_fill(~counts, torch.inf).sort(1).values
    number = counts.sum(1, keepdim=True)
    found = [
        torch.where(number > 0, ordered.gather(1, (number * share).long()), largest)
        for share in _SHARES[1:]
    ]
    return torch.cat([largest, *found], 1).clamp_min(_SMALLEST)


def _sums(
    rows: Tensor, scales: Tensor, varies: Tensor, over_last: Tensor, over_rest: Tensor
) -> Tensor:
    """``(B, R, W)`` to ``(B, 3, 5)``."""
    found = []
    for index, scale in enumerate(scales.unbind(1)):
        u = rows / scale[:, None, None]
        counted = u / (1 + u * u)
        if index:
            counted = counted * varies
        sums = ((counted @ over_last) * over_rest).sum(1)
        length = torch.linalg.vector_norm(counted, dim=(1, 2))
        found.append(torch.cat([sums, length[:, None]], 1))
    return torch.stack(found, 1)
