"""The bound on a series' error, against distributions that are computed another way."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import ndtr

from hf_dp.accounting._losses import SampledGaussian
from hf_dp.accounting.edgeworth import characteristic, losses_at_frequency
from hf_dp.accounting.edgeworth.characteristic import CharacteristicFunction
from hf_dp.accounting.edgeworth.cumulants import LossNodes, absolute_moments
from hf_dp.accounting.edgeworth.interval import theorem_distance
from hf_dp.accounting.edgeworth.series import survival
from hf_dp.accounting.edgeworth.theorems import (
    Standardised,
    bound_with_continuity,
    bound_without_regularity,
    frequencies_that_matter,
)

# Sampling probability, noise multiplier, steps.
SETTINGS = [(0.05, 1.0, 100), (0.2, 1.5, 30), (0.01, 1.0, 1000)]


def true_survival(
    probability: float, noise: float, count: int, *, large: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Points, and the chance of a larger sum: losses rounded to the nearest of a fine grid, by FFT."""
    h = 2e-5
    low = math.log1p(-probability)
    top = math.log1p(probability * math.expm1((2 * (1 + 9 * noise) - 1) / (2 * noise**2)))
    first, last = math.floor(low / h), math.ceil(top / h)
    edges = np.maximum((np.arange(first, last + 2) - 0.5) * h, low + 1e-15)
    ratio = np.expm1(edges - low) * (1 - probability) / probability
    outputs = 0.5 + noise**2 * np.log(ratio)
    below = ndtr(outputs / noise)
    if large:
        below = (1 - probability) * below + probability * ndtr((outputs - 1) / noise)
    masses = np.diff(below)
    masses[0] += below[0]
    # Wide enough that what wraps round is negligible.
    spread = math.sqrt(count * float(masses @ ((np.arange(len(masses)) + first) * h) ** 2))
    length = next_fast_len(max(2 * len(masses), int(40 * spread / h)), real=True)
    sums = irfft(rfft(masses, length) ** count, length)
    mean = count * float(masses @ np.arange(len(masses)))
    start = round(mean) - length // 2
    sums = np.roll(sums, -(start % length))
    points = (start + np.arange(length) + 0.5 + count * first) * h
    return points, 1 - np.cumsum(sums)


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_no_series_is_further_from_the_truth_than_its_bound(
    setting: tuple[float, float, int], large: bool
) -> None:
    probability, noise, count = setting
    points, chances = true_survival(probability, noise, count, large=large)
    function = CharacteristicFunction({SampledGaussian(probability, noise): count}, large=large)
    bounds = function.error_bounds()
    for order in (1, 2, 3):
        distance = np.max(np.abs(survival(function.cumulants, points, order) - chances))
        # The distance of both sums' discretisations is far below these.
        assert distance <= bounds[order] + 1e-7
        assert distance >= 0.5 * bounds[order], "a bound so loose that this test shows nothing"


@pytest.mark.parametrize(
    "fault", ["weights of the rule", "series of another order", "one panel left out"]
)
def test_a_bound_that_is_too_small_would_be_seen(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probability, noise, count = SETTINGS[0]
    points, chances = true_survival(probability, noise, count, large=True)
    function = CharacteristicFunction({SampledGaussian(probability, noise): count}, large=True)
    true = [np.max(np.abs(survival(function.cumulants, points, r) - chances)) for r in (1, 2, 3)]
    if fault == "weights of the rule":
        rule = characteristic.gauss_rule
        monkeypatch.setattr(
            characteristic, "gauss_rule", lambda a, b: (rule(a, b)[0], rule(a, b)[1] / 4)
        )
    elif fault == "series of another order":
        original = characteristic._series
        monkeypatch.setattr(
            characteristic, "_series", lambda c, order, u: original(c, min(order + 1, 3), u)
        )
    else:
        panel = CharacteristicFunction._panel
        monkeypatch.setattr(
            CharacteristicFunction,
            "_panel",
            lambda self, start, end, height: (
                (np.zeros(3), 1.0) if 0.5 <= start < 4 else panel(self, start, end, height)
            ),
        )
    bounds = function.error_bounds()
    assert any(bounds[order] < true[order - 1] for order in (1, 2, 3))


@pytest.mark.parametrize("noise", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("probability", [0.001, 0.1, 0.7])
@pytest.mark.parametrize("large", [True, False])
def test_the_density_of_a_loss_varies_by_no_more_than_its_bound(
    probability: float, noise: float, large: bool
) -> None:
    release = SampledGaussian(probability, noise)
    outputs = np.linspace(-1 - 12 * noise, 2 + 12 * noise, 400_001)
    odds = probability / (1 - probability) * np.exp((2 * outputs - 1) / (2 * noise**2))
    density = np.exp(-((outputs / noise) ** 2) / 2) / (noise * math.sqrt(2 * math.pi))
    if large:
        density = density * (1 - probability) * (1 + odds)
    per_loss = density * noise**2 * (1 + 1 / odds)
    variation = np.sum(np.abs(np.diff(per_loss)))
    assert variation <= losses_at_frequency.total_variation(release, large)


def test_the_modulus_beyond_a_frequency_is_bounded() -> None:
    release, count = SampledGaussian(0.05, 1.0), 100
    function = CharacteristicFunction({release: count}, large=True)
    nodes = LossNodes.of(release, 0.05)
    centred = nodes.losses - nodes.present @ nodes.losses
    scale = math.sqrt(count * (nodes.present @ centred**2))
    u = np.geomspace(8.0, 60.0, 300)
    moduli = np.array([abs(nodes.present @ np.exp(1j * v / scale * centred)) for v in u]) ** count
    integral = float(np.sum((moduli[1:] + moduli[:-1]) / 2 * np.diff(np.log(u))))
    assert integral <= function.integral_of_modulus(8.0, 60.0)
    end = 6.0
    assert function.integral_of_modulus(4.0, end) >= function.integral_of_modulus(5.0, end)


def test_no_bound_is_made_up_where_none_is_found() -> None:
    one = CharacteristicFunction({SampledGaussian(0.01, 1.0): 1}, large=True).error_bounds()
    tiny = CharacteristicFunction({SampledGaussian(0.01, 0.1): 10}, large=True).error_bounds()
    assert set(one.values()) == set(tiny.values()) == {math.inf}
    assert losses_at_frequency.total_variation(SampledGaussian(0.01, 0.1), True) == math.inf


def test_unsampled_losses_are_normal_and_have_no_error() -> None:
    bounds = CharacteristicFunction({SampledGaussian(1.0, 2.0): 3}, large=False).error_bounds()
    assert bounds == {1: 0.0, 2: 0.0, 3: 0.0}


def test_mixtures_with_unsampled_losses_are_bounded() -> None:
    releases = {SampledGaussian(0.05, 1.0): 100, SampledGaussian(1.0, 2.0): 1}
    mixed = CharacteristicFunction(releases, large=True).error_bounds()
    alone = CharacteristicFunction({SampledGaussian(0.05, 1.0): 100}, large=True).error_bounds()
    assert 0 < mixed[2] < alone[2]


@pytest.mark.parametrize("large", [True, False])
def test_the_explicit_theorems_are_never_below_the_numeric_bound(large: bool) -> None:
    for probability, noise, count in SETTINGS:
        release = SampledGaussian(probability, noise)
        numeric = CharacteristicFunction({release: count}, large=large).error_bounds()[1]
        assert numeric <= theorem_distance(((release, count),), large=large)


def test_continuity_helps_when_there_are_many_losses() -> None:
    release, count = SampledGaussian(0.01, 1.0), 10**6
    loss = Standardised.of(absolute_moments(release, "remove", large=True), count)
    start, end = frequencies_that_matter(loss)
    high = CharacteristicFunction({release: count}, large=True).integral_of_modulus(start, end)
    with_continuity = bound_with_continuity(loss, high)
    assert with_continuity == pytest.approx(8.9e-5, rel=0.1)  # published constants: 8.9e-5
    assert with_continuity < bound_without_regularity(loss) / 10


def test_theorems_are_about_one_kind_of_release(exact_delta: Callable[..., float]) -> None:
    kinds = ((SampledGaussian(0.01, 1.0), 10), (SampledGaussian(0.02, 1.0), 10))
    assert theorem_distance(kinds, large=True) == math.inf
