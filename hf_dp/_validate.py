"""Checks of arguments, each with one wording. They return the value or raise ConfigurationError."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

from hf_dp.errors import ConfigurationError, explain


def _number(field: str, value: object, expected: str, why: str, remedy: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigurationError(explain(field, value, expected, why, remedy))
    return float(value)


def positive(field: str, value: object, why: str, remedy: str) -> float:
    """A finite number above zero."""
    expected = "a finite number > 0"
    number = _number(field, value, expected, why, remedy)
    if number <= 0:
        raise ConfigurationError(explain(field, value, expected, why, remedy))
    return number


def not_negative(field: str, value: object, why: str, remedy: str) -> float:
    """A finite number, zero or above."""
    expected = "a finite number >= 0"
    number = _number(field, value, expected, why, remedy)
    if number < 0:
        raise ConfigurationError(explain(field, value, expected, why, remedy))
    return number


def probability(field: str, value: object, why: str, remedy: str) -> float:
    """A number in (0, 1]."""
    expected = "a number in (0, 1]"
    number = _number(field, value, expected, why, remedy)
    if not 0 < number <= 1:
        raise ConfigurationError(explain(field, value, expected, why, remedy))
    return number


def open_unit_interval(field: str, value: object, why: str, remedy: str) -> float:
    """A number in (0, 1), both ends excluded."""
    expected = "a number strictly between 0 and 1"
    number = _number(field, value, expected, why, remedy)
    if not 0 < number < 1:
        raise ConfigurationError(explain(field, value, expected, why, remedy))
    return number


def positive_integer(field: str, value: object, why: str, remedy: str) -> int:
    """A whole number above zero."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigurationError(explain(field, value, "a whole number > 0", why, remedy))
    return value


def one_of(field: str, value: object, allowed: Iterable[str], why: str) -> str:
    """One of the allowed strings; the message suggests the nearest."""
    names = sorted(allowed)
    if isinstance(value, str) and value in names:
        return value
    near = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.4)
    remedy = f"Did you mean {near[0]!r}?" if near else f"Choose one of {', '.join(names)}."
    raise ConfigurationError(explain(field, value, f"one of {names}", why, remedy))
