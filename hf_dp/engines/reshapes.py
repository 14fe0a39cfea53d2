"""Whether a reshape puts examples on an axis that does not grow with their number.

``(B, T, H)`` as ``(T, B * H)`` has parts of several examples along both axes. Two batches of different size
show only that the second grew, so the first would pass for one that all examples share. Numbers keep their
order in a reshape, so lengths alone show where the examples went: they stay together on the axis that grows
if the axes before it hold what they held.
"""

from __future__ import annotations

from math import prod

Shape = tuple[int, ...]
Reshape = tuple[Shape, Shape]
"""The shape that went in, and the one that came out."""
Growth = tuple[tuple[int, ...] | None, tuple[int, ...] | None]
"""Of what went in and of what came out, the axes that grow with the number of examples; None if unknown."""


def growth(few: Reshape, more: Reshape) -> Growth:
    """Which axes grow, seen in the same reshape of two batches that differ in the number of examples."""
    return _growing(few[0], more[0]), _growing(few[1], more[1])


def strays(reshape: Reshape, grows: Growth, num_units: int) -> bool:
    """Whether examples may be on axes of what came out that do not grow, or on one with other axes first.

    Args:
        reshape: The shapes.
        grows: Which of their axes grow.
        num_units: B.
    """
    (given, out), (before, after) = reshape, grows
    if before is None or after is None:
        return True
    if not before and not after:
        return False
    if len(before) != 1 or len(after) != 1:
        return True
    axis, place = before[0], after[0]
    if prod(given[:axis]) != prod(out[:place]):
        return True
    return given[axis] != out[place] and (given[axis] % num_units or out[place] % num_units) != 0


def _growing(few: Shape, more: Shape) -> tuple[int, ...] | None:
    if len(few) != len(more):
        return None
    return tuple(axis for axis in range(len(few)) if few[axis] != more[axis])
