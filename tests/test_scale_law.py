"""The law of a drawn inverse scale: closed forms, sums taken elsewhere, high precision, its edges."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mpmath
import numpy as np
import pytest
from scipy import integrate

from hf_dp.errors import ConfigurationError
from hf_dp.scale_law import ScaleLaw

# The set that the published LMO-DP code labels 0.3, as its accountant reads the Exponential part
# (5 as a rate) and as its sampler draws it (5 as a mean).
ACCOUNTED = ScaleLaw(1, 0.05, 0.02, 0.1, 0.2)
SAMPLED = ScaleLaw(1, 0.05, 0.5, 0.1, 0.2)
LAWS = [
    ACCOUNTED,
    SAMPLED,
    ScaleLaw(3, 1 / 3),
    ScaleLaw(2.5, 0.1, 0.3, 0.0, 3.0),
    ScaleLaw(exponential_mean=0.7),
    ScaleLaw(uniform_high=1.0),
    ScaleLaw(uniform_low=1.0, uniform_high=1.0001),
    ScaleLaw(uniform_low=2.0, uniform_high=2.0),
    ScaleLaw(0.3, 2.0, 0.0, 0.5, 0.5),
]


def precise_log_moment(law: ScaleLaw, t: Any) -> Any:
    """log M(t) with as many digits as mpmath carries."""
    shape, scale, mean, low, high = (
        mpmath.mpf(getattr(law, name))
        for name in (
            "gamma_shape",
            "gamma_scale",
            "exponential_mean",
            "uniform_low",
            "uniform_high",
        )
    )
    width = high - low
    uniform = mpmath.log(mpmath.expm1(width * t) / (width * t)) if width else 0
    return -shape * mpmath.log(1 - scale * t) - mpmath.log(1 - mean * t) + low * t + uniform


def places(law: ScaleLaw) -> list[float]:
    """Arguments of M from tiny to far out on both sides, inside its domain."""
    sizes = [
        sign * 10.0**exponent * step
        for sign in (1, -1)
        for exponent in range(-14, 5)
        for step in (1, 1.7, 3.9)
    ]
    return [t for t in sizes if t < law.domain_end and t * law.uniform_high < 600]


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_the_log_moment_keeps_its_digits_everywhere(law: ScaleLaw) -> None:
    with mpmath.workdps(60):
        for t in places(law):
            expected = precise_log_moment(law, mpmath.mpf(t))
            assert float(abs(law.log_moment(t) / expected - 1)) < 1e-13


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_the_derivatives_are_those_of_the_moment(law: ScaleLaw) -> None:
    with mpmath.workdps(80):
        for t in places(law)[::5]:
            at, step = mpmath.mpf(t), mpmath.mpf(10) ** -20 * abs(mpmath.mpf(t))
            below, value, above = (
                precise_log_moment(law, at + place * step) for place in (-1, 0, 1)
            )
            if abs(value) > 600:
                continue
            slope, curvature = (above - below) / (2 * step), (above - 2 * value + below) / step**2
            moment = mpmath.exp(value)
            assert float(moment * slope) == pytest.approx(law.moment_derivative(t), rel=1e-11)
            second = float(moment * (slope**2 + curvature))
            assert second == pytest.approx(law.moment_second_derivative(t), rel=1e-11)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_moments_end_where_they_diverge(law: ScaleLaw) -> None:
    end = law.domain_end
    assert law.log_moment(0.0) == 0.0
    if math.isinf(end):
        assert np.isfinite(law.log_moment(100.0))
        return
    inside, beyond = end * (1 - 1e-9), [end, end * 1.5, end * 6, np.inf]
    for method in (law.log_moment, law.moment_derivative, law.moment_second_derivative):
        assert np.isfinite(method(inside))
        assert np.isinf(method(beyond)).all()
        assert (method(beyond) > 0).all()


def test_the_domain_is_that_of_the_longest_tail() -> None:
    assert ACCOUNTED.domain_end == pytest.approx(20)
    assert SAMPLED.domain_end == pytest.approx(2)
    assert ScaleLaw(uniform_high=3.0).domain_end == math.inf


def test_the_reference_values_of_the_published_set() -> None:
    np.testing.assert_allclose(
        ACCOUNTED.density([0, 1, 5, -5]), [0.11, 0.0869885, 0.0354128, 0.0354128], atol=5e-8
    )
    assert ACCOUNTED.tail(1) == pytest.approx(0.8039838, abs=5e-8)
    assert (ACCOUNTED.mean, SAMPLED.mean) == (pytest.approx(0.22), pytest.approx(0.7))


@pytest.mark.parametrize(
    ("law", "variance", "mean_absolute", "information", "pure_epsilon", "radius_09"),
    [
        (ACCOUNTED, 50.7494, 4.87415, 0.0486026, 0.234704, 0.178),
        (SAMPLED, 12.9128, 2.15344, 0.538649, 0.881817, 0.423),
    ],
    ids=["accounted", "sampled"],
)
def test_the_noise_of_the_published_set(
    law: ScaleLaw,
    variance: float,
    mean_absolute: float,
    information: float,
    pure_epsilon: float,
    radius_09: float,
) -> None:
    assert law.deviation**2 == pytest.approx(variance, rel=5e-6)
    assert law.mean_absolute == pytest.approx(mean_absolute, rel=5e-6)
    assert law.information() == pytest.approx(information, rel=5e-6)
    assert law.pure_epsilon(1) == pytest.approx(pure_epsilon, rel=5e-6)
    assert law.usefulness(0.9) == pytest.approx(radius_09, abs=6e-4)


@pytest.mark.parametrize("shape", [2.001, 2.1, 3.0, 30.0, 3000.0])
@pytest.mark.parametrize("scale", [1e-6, 1 / 3, 50.0])
def test_a_gamma_part_alone_is_two_sided_lomax_noise(shape: float, scale: float) -> None:
    law = ScaleLaw(shape, scale)
    assert law.deviation == pytest.approx(
        math.sqrt(2 / ((shape - 1) * (shape - 2))) / scale, rel=1e-11
    )
    assert law.mean_absolute == pytest.approx(1 / ((shape - 1) * scale), rel=1e-12)
    assert law.information() == pytest.approx(
        shape * (shape + 1) ** 2 * scale**2 / (shape + 2), rel=1e-12
    )
    assert law.pure_epsilon(2.0) == pytest.approx((shape + 1) * math.log1p(2 * scale), rel=1e-9)
    assert law.entropy() == pytest.approx(math.log(2 / (shape * scale)) + 1 + 1 / shape, abs=1e-10)
    x = np.array([0.0, 0.1, 3.0])
    np.testing.assert_allclose(
        law.density(x), shape * scale / 2 * (1 + scale * x) ** (-shape - 1), rtol=1e-12
    )


def test_the_gamma_set_with_round_values() -> None:
    law = ScaleLaw(3, 1 / 3)
    assert law.deviation == pytest.approx(3, rel=1e-12)
    assert law.mean_absolute == pytest.approx(1.5, rel=1e-12)
    assert law.information() == pytest.approx(16 / 15, rel=1e-12)
    assert law.pure_epsilon() == pytest.approx(4 * math.log(4 / 3), rel=1e-12)


def test_a_constant_alone_is_plain_laplace_noise() -> None:
    law, x = ScaleLaw(uniform_low=2.0, uniform_high=2.0), np.array([-3.0, 0.0, 0.5])
    np.testing.assert_allclose(law.density(x), np.exp(-2 * np.abs(x)), rtol=1e-14)
    assert law.deviation == pytest.approx(math.sqrt(2) / 2, rel=1e-13)
    assert law.mean_absolute == pytest.approx(0.5, rel=1e-13)
    assert law.information() == pytest.approx(4, rel=1e-13)
    assert law.entropy() == pytest.approx(1, rel=1e-13)
    assert law.pure_epsilon(1.5) == pytest.approx(3, rel=1e-13)


@pytest.mark.parametrize("law", LAWS[:4], ids=repr)
def test_sizes_agree_with_an_integral_over_the_density(law: ScaleLaw) -> None:
    def over_the_line(value: Any) -> float:
        pieces = np.concatenate([[0], np.geomspace(1e-3, 1e7, 60)])
        return 2 * sum(
            integrate.quad(value, a, b, epsabs=0, epsrel=1e-9)[0]
            for a, b in itertools.pairwise(pieces)
        )

    def surprise(x: float) -> float:
        f = float(law.density(x))
        return -f * math.log(f) if f > 0 else 0.0

    assert over_the_line(law.density) == pytest.approx(1, abs=1e-6)
    assert over_the_line(surprise) == pytest.approx(law.entropy(), abs=1e-5)
    assert over_the_line(lambda x: x * law.density(x)) == pytest.approx(law.mean_absolute, rel=1e-5)
    if law.order_at_zero > 3:
        second = over_the_line(lambda x: x * x * law.density(x))
        assert second == pytest.approx(law.deviation**2, rel=1e-4)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_no_mixed_scale_beats_laplace_in_information(law: ScaleLaw) -> None:
    """information * variance >= 2, with equality where the scale is constant only."""
    product = law.information() * law.deviation**2
    assert product >= 2 * (1 - 1e-12)
    if law.uniform_low == law.uniform_high and not law.gamma_scale and not law.exponential_mean:
        assert product == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize(
    ("law", "deviation", "mean_absolute"),
    [
        (ScaleLaw(2.0, 1.0), False, True),
        (ScaleLaw(1.0, 1.0), False, False),
        (ScaleLaw(1.001, 1.0), False, True),
        (ScaleLaw(exponential_mean=1.0), False, False),
        (ScaleLaw(uniform_high=1.0), False, False),
        (ScaleLaw(exponential_mean=1.0, uniform_high=1.0), False, True),
        (ScaleLaw(1.0, 1.0, 1.0), False, True),
        (ScaleLaw(1.0, 1.0, 1.0, 0.0, 1.0), True, True),
        (ScaleLaw(0.5, 1.0, 1.0, 0.0, 1.0), True, True),
        (ScaleLaw(2.5, 1.0), True, True),
        (ScaleLaw(0.1, 1.0, 0.0, 0.01, 0.01), True, True),
        (ScaleLaw(0.1, 1.0, 0.0, 0.01, 5.0), True, True),
    ],
    ids=repr,
)
def test_sizes_are_infinite_where_small_scales_are_too_likely(
    law: ScaleLaw, *, deviation: bool, mean_absolute: bool
) -> None:
    assert math.isfinite(law.deviation) == deviation
    assert math.isfinite(law.mean_absolute) == mean_absolute
    assert math.isfinite(law.entropy())
    if not deviation:
        with pytest.raises(ConfigurationError, match=r"ScaleLaw=.*finite variance.*above 2"):
            law.with_deviation(1.0)


def test_rescaling_divides_the_noise() -> None:
    twice = SAMPLED.scaled(2.0)
    assert twice.deviation == pytest.approx(SAMPLED.deviation / 2, rel=1e-12)
    assert twice.entropy() == pytest.approx(SAMPLED.entropy() - math.log(2), rel=1e-12)
    np.testing.assert_allclose(twice.tail([0.5, 2.0]), SAMPLED.tail([1.0, 4.0]), rtol=1e-13)
    assert SAMPLED.with_deviation(0.7).deviation == pytest.approx(0.7, rel=1e-12)
    with pytest.raises(ConfigurationError, match=r"ScaleLaw\.factor=0"):
        SAMPLED.scaled(0)


def test_the_shapes_of_arrays_are_kept() -> None:
    assert SAMPLED.tail(np.ones((2, 3))).shape == (2, 3)
    assert SAMPLED.density(1.0).shape == ()
    assert SAMPLED.tail(np.inf) == SAMPLED.density(np.inf) == 0.0
    assert SAMPLED.tail(0.0) == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"^ScaleLaw=.*not 0.*noise without end"),
        ({"gamma_shape": 0.0, "gamma_scale": 1.0}, r"ScaleLaw\.gamma_shape=0"),
        ({"gamma_scale": -1.0}, r"ScaleLaw\.gamma_scale=-1.*>= 0"),
        ({"exponential_mean": math.nan}, r"ScaleLaw\.exponential_mean=nan"),
        ({"uniform_low": math.inf, "uniform_high": math.inf}, r"ScaleLaw\.uniform_low=inf"),
        ({"uniform_low": 2.0, "uniform_high": 1.0}, r"ScaleLaw\.uniform_high=1.*at least.*Swap"),
    ],
)
def test_what_is_no_law_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ScaleLaw(**fields)
