"""Clipped sums add up; what is released is another type."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from hf_dp.sums import ClippedSum, NoisySum


def of(value: float, units: int, loss: Tensor | None = None, name: str = "w") -> ClippedSum:
    numbers = torch.full((units,), value)
    return ClippedSum(
        {name: torch.full((2,), value)}, norms=numbers, losses=-numbers, loss_sum=loss
    )


def test_sums_add_and_units_are_listed_one_after_another() -> None:
    first = of(1.0, 2, torch.tensor(0.5))
    both = first + of(3.0, 1, torch.tensor(0.25))
    assert both.grads["w"].tolist() == [4.0, 4.0]
    assert both.norms.tolist() == [1.0, 1.0, 3.0]
    assert both.losses.tolist() == [-1.0, -1.0, -3.0]
    assert float(both.loss_sum) == 0.75  # type: ignore[arg-type]
    assert both.grads["w"] is first.grads["w"]  # in place: memory for one sum


def test_without_a_loss_there_is_none() -> None:
    assert (of(1.0, 1) + of(1.0, 1)).loss_sum is None


def test_sums_over_different_parameters_do_not_add() -> None:
    with pytest.raises(ValueError, match="different parameters"):
        of(1.0, 1) + of(1.0, 1, name="v")


def test_private_and_released_are_different_frozen_types() -> None:
    assert not issubclass(ClippedSum, NoisySum)
    assert not issubclass(NoisySum, ClippedSum)
    with pytest.raises(dataclasses.FrozenInstanceError):
        of(1.0, 1).loss_sum = None  # type: ignore[misc]
