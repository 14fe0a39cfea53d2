"""How a bound is printed: never sharper than it is."""

from __future__ import annotations

import math


def rounded_up(bound: float, digits: int = 4) -> str:
    """`bound` with so many digits, rounded up; to the nearest could print less than was proven."""
    if not 0 < bound < math.inf:
        return f"{bound:g}"
    places = digits - 1 - math.floor(math.log10(bound))
    raised = math.ceil(bound * 10.0**places - 1e-9) / 10.0**places
    return f"{raised:.{digits}g}"


def rounded_down(bound: float, digits: int = 4) -> str:
    """A lower bound with so many digits, rounded down: never more than was proven."""
    if not 0 < bound < math.inf:
        return f"{bound:g}"
    places = digits - 1 - math.floor(math.log10(bound))
    lowered = math.floor(bound * 10.0**places + 1e-9) / 10.0**places
    return f"{lowered:.{digits}g}"
