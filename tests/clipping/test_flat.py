"""Flat clipping bounds every unit, whatever its norms are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_dp.clipping import ClippingPolicy, FlatClipping
from hf_dp.errors import ConfigurationError


def weights(clipping_norm: float, *squared: Tensor) -> Tensor:
    """The weights for these squared norms of as many parameters; all must get the same."""
    found = FlatClipping(clipping_norm).weights({str(i): s for i, s in enumerate(squared)})
    assert list(found) == [str(i) for i in range(len(squared))]
    assert all(torch.equal(weight, found["0"]) for weight in found.values())
    return found["0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clipping_norm", [1e-6, 0.1, 1.0, 7.0, 1e6])
def test_weight_times_norm_never_exceeds_the_clipping_norm(
    clipping_norm: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.rand(100_000, generator=generator, dtype=torch.float64) * 40 - 20
    squared = (10.0**exponents).to(dtype) * clipping_norm**2
    clipped = weights(clipping_norm, squared)
    moved = clipped.double() * squared.double().sqrt()
    assert float(moved.max()) <= clipping_norm  # in exact arithmetic, not only in dtype
    assert float(clipped.max()) <= 1.0
    above = squared.double() > (1.0001 * clipping_norm) ** 2
    assert float(moved[above].min()) >= clipping_norm * (1 - 2e-6)
    assert bool((clipped[squared.double() < (0.999 * clipping_norm) ** 2] == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clipping_norm", [1e-6, 0.1, 1.0, 1e6])
def test_weight_times_l1_norm_never_exceeds_the_clipping_norm(
    clipping_norm: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(2_000, generator=generator, dtype=torch.float64) * 60 - 25
    exponents = scales + torch.rand(300, 2_000, generator=generator, dtype=torch.float64)
    sums = dict(enumerate((10.0**exponents).to(dtype)))
    found = FlatClipping(clipping_norm, "l1").weights({str(i): s for i, s in sums.items()})["0"]
    norms = torch.stack(list(sums.values())).double().sum(0)
    moved = found.double() * norms
    assert found.dtype == dtype
    assert float(moved.max()) <= clipping_norm
    kept = (norms > 1.001 * clipping_norm) & (norms < clipping_norm * 1e37)
    assert bool((moved[kept] >= clipping_norm * (1 - 2e-6)).all())


def test_a_weight_too_small_to_be_exact_is_none() -> None:
    norms = torch.tensor([1e38, 3e38])
    assert FlatClipping(1e-3, "l1").weights({"": norms})[""].tolist() == [0.0, 0.0]
    assert bool((FlatClipping(10.0, "l1").weights({"": norms})[""] > 0).all())


def test_the_l1_norm_is_over_all_parameters() -> None:
    one, other = torch.tensor([3.0, 0.1, torch.inf]), torch.tensor([1.0, 0.2, 1.0])
    found = FlatClipping(1.0, "l1").weights({"a": one, "b": other})
    torch.testing.assert_close(found["b"], torch.tensor([0.25, 1.0, 0.0]))


def test_there_is_no_third_norm() -> None:
    with pytest.raises(ConfigurationError, match=r"FlatClipping\.norm='linf'.*l1"):
        FlatClipping(1.0, "linf")  # type: ignore[arg-type]


def test_the_norm_is_over_all_parameters() -> None:
    found = weights(1.0, torch.tensor([9.0, 0.01]), torch.tensor([16.0, 0.02]))
    torch.testing.assert_close(found, torch.tensor([0.2, 1.0]))


def test_not_finite_gets_weight_zero() -> None:
    bad = torch.tensor([torch.nan, torch.inf, 1.0, 3e38, 1.0])
    other = torch.tensor([1.0, 1.0, torch.nan, 3e38, 1.0])
    found = weights(1.0, bad, other)
    assert found[:4].tolist() == [0, 0, 0, 0]
    assert float(found[4]) == pytest.approx(math.sqrt(0.5))


def test_a_gradient_of_zero_keeps_weight_one() -> None:
    assert weights(1.0, torch.zeros(2)).tolist() == [1.0, 1.0]
    assert weights(1.0, torch.tensor([-1e-9])).tolist() == [1.0]  # zero, but for rounding


def test_nobody_is_clipped_in_an_empty_batch() -> None:
    assert weights(1.0, torch.zeros(0)).shape == (0,)


def test_sensitivity_is_the_clipping_norm_and_scales() -> None:
    policy: ClippingPolicy = FlatClipping(0.5)
    assert policy.sensitivity == 0.5
    assert policy.scaled(0.25) == FlatClipping(0.125)
    assert policy.norm == "l2"
    assert FlatClipping(0.5, "l1").scaled(2.0) == FlatClipping(1.0, norm="l1")
    assert policy.event() is None


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, None, "1", True])
def test_a_clipping_norm_that_bounds_nothing_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"FlatClipping\.clipping_norm=.*> 0"):
        FlatClipping(value)
