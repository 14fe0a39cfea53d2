"""A printed bound is never below the bound."""

from __future__ import annotations

import math

import pytest

from hf_dp.accounting.shown import rounded_down, rounded_up


@pytest.mark.parametrize("bound", [2.55746, 1.2349e-5, 8.0, 0.99999, 123456.7, 1e-12])
@pytest.mark.parametrize("digits", [3, 4, 5])
def test_rounded_up_is_never_below(bound: float, digits: int) -> None:
    shown = float(rounded_up(bound, digits))
    assert bound * (1 - 1e-12) <= shown <= bound * (1 + 10.0 ** (1 - digits))


@pytest.mark.parametrize("bound", [2.55746, 1.2349e-5, 8.0, 0.99999, 123456.7, 1e-12])
@pytest.mark.parametrize("digits", [3, 4, 5])
def test_rounded_down_is_never_above(bound: float, digits: int) -> None:
    shown = float(rounded_down(bound, digits))
    assert bound * (1 - 10.0 ** (1 - digits)) <= shown <= bound * (1 + 1e-12)
    assert rounded_down(0.0) == "0"


def test_what_is_no_number_to_round_is_shown_as_it_is() -> None:
    assert rounded_up(0.0) == "0"
    assert rounded_up(math.inf) == "inf"


def test_whole_numbers_stay_whole() -> None:
    assert rounded_up(8.0) == "8"
