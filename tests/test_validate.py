"""The checks of arguments: what passes unchanged, and how the rest is worded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hf_dp._validate import (
    not_negative,
    one_of,
    open_unit_interval,
    positive,
    positive_integer,
    probability,
)
from hf_dp.errors import ConfigurationError, HfDpError, explain

NOT_NUMBERS: list[object] = [None, "1", True, False, math.nan, math.inf, -math.inf, [1], 1j]
CHECKS: list[tuple[Callable[..., Any], list[Any], list[Any], str]] = [
    (positive, [1e-300, 1, 3.5, np.float64(2)], [0, -1, -0.0, *NOT_NUMBERS], "a finite number > 0"),
    (not_negative, [0, 0.0, 1e-300, 7], [-1e-300, -1, *NOT_NUMBERS], "a finite number >= 0"),
    (probability, [1e-9, 0.5, 1, 1.0], [0, 1.0001, -0.1, *NOT_NUMBERS], "a number in (0, 1]"),
    (
        open_unit_interval,
        [1e-9, 0.999],
        [0, 1, 1.0, -0.1, *NOT_NUMBERS],
        "a number strictly between 0 and 1",
    ),
    (positive_integer, [1, 10**9], [0, -1, 1.0, *NOT_NUMBERS], "a whole number > 0"),
]
GOOD = [(check, value) for check, good, _, _ in CHECKS for value in good]
BAD = [(check, value, expected) for check, _, bad, expected in CHECKS for value in bad]


@pytest.mark.parametrize(("check", "value"), GOOD)
def test_what_is_in_range_comes_back_as_it_is(check: Callable[..., Any], value: Any) -> None:
    assert check("Owner.field", value, "why", "remedy") == value


@pytest.mark.parametrize(("check", "value", "expected"), BAD)
def test_what_is_not_is_refused_in_one_wording(
    check: Callable[..., Any], value: object, expected: str
) -> None:
    message = f"Owner.field={value!r}: expected {expected}. It matters. Do this."
    with pytest.raises(ConfigurationError, match=f"^{re.escape(message)}$"):
        check("Owner.field", value, "It matters.", "Do this.")


def test_a_known_word_passes() -> None:
    assert one_of("Owner.field", "rdp", ("pld", "rdp"), "why") == "rdp"


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        ("plD", "Did you mean 'pld'?"),
        ("rdp2", "Did you mean 'rdp'?"),
        ("moments", "Choose one of pld, rdp."),
        (None, "Choose one of pld, rdp."),
        (3, "Choose one of pld, rdp."),
    ],
)
def test_an_unknown_word_gets_the_nearest_one(value: object, remedy: str) -> None:
    message = f"Owner.field={value!r}: expected one of ['pld', 'rdp']. It matters. {remedy}"
    with pytest.raises(ConfigurationError, match=f"^{re.escape(message)}$"):
        one_of("Owner.field", value, ("rdp", "pld"), "It matters.")


def test_wrong_arguments_are_both_value_errors_and_ours() -> None:
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(ConfigurationError, HfDpError)


def test_messages_have_one_form() -> None:
    assert (
        explain("A.b", 0, "more", "Because.", "Raise it.")
        == "A.b=0: expected more. Because. Raise it."
    )
