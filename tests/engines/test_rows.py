"""Cutting batches into examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hf_dp.engines.rows import batch_size, row, rows, select_rows
from hf_dp.errors import ConfigurationError


def mixed() -> dict[str, Any]:
    return {
        "input_ids": torch.arange(6).reshape(3, 2),
        "labels": torch.tensor([7, 8, 9]),
        "names": ["a", "b", "c"],
        "nested": {"values": torch.arange(3.0)},
        "position_ids": torch.arange(2)[None],
        "flag": True,
        "temperature": torch.tensor(0.5),
        "nothing": None,
    }


def test_a_row_is_a_batch_of_one() -> None:
    one = row(mixed(), 1)
    assert one["input_ids"].tolist() == [[2, 3]]
    assert one["labels"].tolist() == [8]
    assert one["names"] == ["b"]
    assert one["nested"]["values"].tolist() == [1.0]
    assert batch_size(one) == 1


def test_settings_and_shared_positions_are_passed_on_whole() -> None:
    one = row(mixed(), 2)
    assert one["position_ids"].tolist() == [[0, 1]]
    assert (one["flag"], one["temperature"].item(), one["nothing"]) == (True, 0.5, None)


def test_selected_rows_come_in_the_order_asked_for_and_are_copies() -> None:
    inputs = mixed()
    some = select_rows(inputs, [2, 0])
    assert some["labels"].tolist() == [9, 7]
    assert some["names"] == ["c", "a"]
    assert some["nested"]["values"].tolist() == [2.0, 0.0]
    some["labels"].zero_()
    assert inputs["labels"].tolist() == [7, 8, 9]


def test_an_empty_batch_has_size_zero() -> None:
    assert batch_size({"input_ids": torch.ones(0, 4)}) == 0


@pytest.mark.parametrize("index", [-1, 3])
def test_a_row_outside_the_batch_does_not_exist(index: int) -> None:
    with pytest.raises(IndexError):
        row(mixed(), index)


@pytest.mark.parametrize(
    "stray",
    [
        {"pixel_values": torch.ones(7, 2)},
        {"token_type_ids": torch.ones(1, 2)},
        {"names": ["a"]},
        {"nested": {"one": torch.ones(3), "two": torch.ones(2)}},
    ],
)
def test_tensors_that_disagree_are_refused(stray: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="the same number of rows"):
        batch_size(mixed() | stray)


def test_a_batch_without_rows_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="a row per example"):
        batch_size({"flag": True, "temperature": torch.tensor(1.0)})


def test_arrays_are_cut_and_put_in_order_as_tensors_are() -> None:
    inputs = mixed() | {
        "scores": np.array([0.5, 1.5, 2.5]),
        "scale": np.float32(2),
        "one": np.array(3),
    }
    assert row(inputs, 1)["scores"].tolist() == [1.5]
    assert rows(inputs, 1, 3)["scores"].tolist() == [1.5, 2.5]
    some = select_rows(inputs, [2, 0])
    assert some["scores"].tolist() == [2.5, 0.5]
    assert (some["scale"], int(some["one"])) == (2, 3)
    assert batch_size({"scores": np.ones((4, 2))}) == 4
    with pytest.raises(ConfigurationError, match="the same number of rows"):
        batch_size(mixed() | {"scores": np.ones(2)})


def test_rows_of_a_kind_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^batch\['scores'\]='a Series'"):
        batch_size(mixed() | {"scores": pd.Series([1.0, 2.0, 3.0])})
