"""The private loss rides in the release without making it larger."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_dp.clipping import LossRelease
from hf_dp.errors import ConfigurationError

ANY = torch.tensor([0.0, 1.0, 3.9, 4.0, 5.0, 1e30, -2.0, -1e30, torch.nan, torch.inf, -torch.inf])


@pytest.mark.parametrize("sensitivity", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.9])
def test_loss_coordinate_is_bounded(share: float, sensitivity: float) -> None:
    release = LossRelease(share=share, ceiling=4.0)
    found = release.coordinates(ANY, sensitivity=sensitivity)
    assert float(found.min()) >= 0
    assert float(found.max()) <= share * sensitivity * (1 + 1e-7)
    expected = torch.tensor([0.0, 0.25, 0.975, 1, 1, 1, 0, 0, 0, 0, 0]) * share * sensitivity
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 0.999])
def test_gradient_and_loss_share_the_sensitivity(share: float) -> None:
    release = LossRelease(share=share)
    assert math.hypot(share, release.gradient_share("l2")) == pytest.approx(1.0, abs=1e-15)
    assert share + release.gradient_share("l1") == pytest.approx(1.0, abs=1e-15)


def test_a_tenth_costs_the_gradient_half_a_percent_of_its_l2_norm() -> None:
    assert 1 - LossRelease().gradient_share("l2") == pytest.approx(0.005, rel=0.01)


def test_the_mean_loss_is_what_went_in() -> None:
    release, losses = LossRelease(share=0.2, ceiling=8.0), torch.tensor([1.0, 2.0, 6.0])
    summed = release.coordinates(losses, sensitivity=0.7).sum()
    assert float(release.mean_loss(summed, sensitivity=0.7, divisor=3.0)) == pytest.approx(3.0)


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, math.nan, None])
def test_a_share_is_strictly_between_nothing_and_all(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"LossRelease\.share=.*between 0 and 1"):
        LossRelease(share=value)


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, None])
def test_a_ceiling_is_positive_and_finite(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"LossRelease\.ceiling=.*> 0"):
        LossRelease(ceiling=value)
