"""Two explicit bounds on how far the first-order expansion is from the truth.

Both hold for a sum of independent, equally distributed losses with four moments, whatever their
number. At the deltas that people ask for they need a billion steps to say anything about epsilon from
above; they are here because they are what the method can promise without looking any closer.

Source:
    Derumigny, Girard and Guyonvarch (2024), "Explicit non-asymptotic bounds for the distance to the
    first-order Edgeworth expansion", Sankhya A, arXiv 2101.05780; the constants are theirs, and where
    two terms of the proof could be told apart only by sharper ones the larger is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hf_dp.accounting.edgeworth.cumulants import AbsoluteMoments

_SMOOTHING = 1.0253  # bounds 2 pi |t| |Psi(t)| of Prawitz's function
_CHI = 0.09916191
_T_STAR = 0.6359658
_ETAS = np.concatenate(([0.1], np.linspace(0.005, 0.3, 60)))
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Standardised:
    """Moments of one standardised loss, and the number of losses.

    Attributes:
        skewness: Third moment.
        third: Third absolute moment.
        third_plus_first: That plus the first absolute moment.
        fourth: Fourth moment.
        count: Losses in the sum.
    """

    skewness: float
    third: float
    third_plus_first: float
    fourth: float
    count: int

    @classmethod
    def of(cls, moments: AbsoluteMoments, count: int) -> Standardised:
        """Divide central moments by powers of the standard deviation."""
        scale = math.sqrt(moments.second)
        third = moments.third / scale**3
        return cls(
            moments.signed_third / scale**3,
            third,
            third + moments.first / scale,
            moments.fourth / scale**4,
            count,
        )


def bound_without_regularity(loss: Standardised, eta: float | None = None) -> float:
    """Largest distance of the distribution function from the first-order one: four moments suffice.

    Falls with the root of the count.

    Args:
        loss: Moments and count.
        eta: Free parameter of the proof in (0, 1/3); the best of a few if not given.
    """
    if eta is None:
        return min(bound_without_regularity(loss, float(one)) for one in _ETAS)
    n, skew, tilde, four = loss.count, abs(loss.skewness), loss.third_plus_first, loss.fourth
    u = 2 * math.sqrt(n) / tilde
    low = min(math.sqrt(2 * eta) * (n / four) ** 0.25, u)
    total = (
        0.1995 * tilde / math.sqrt(n)
        + (0.031 * tilde**2 + 0.054 * skew * tilde) / n
        + _small_frequencies(loss, eta)
        + 81.2376 * tilde**4 / (16 * math.pi**4 * n**2)
        + 4.3394 * skew * tilde**3 / (8 * math.pi**3 * n**2)
        + skew / math.sqrt(n) * _gap(min(low, low**2 / 2), u**2 / 2)
        + _SMOOTHING
        * 2**2.5
        * loss.third
        / (3 * math.pi * math.sqrt(n))
        * _gap(low**2 / 8, u**2 / 8)
    )
    return float(total * _ROUNDING)


def frequencies_that_matter(loss: Standardised) -> tuple[float, float]:
    """Between which frequencies `bound_with_continuity` needs the characteristic function."""
    n, tilde = loss.count, loss.third_plus_first
    start = min(2 * _T_STAR * math.pi * math.sqrt(n) / tilde, 16 * math.pi**3 * n**2 / tilde**4)
    return start, 16 * math.pi**4 * n**2 / tilde**4


def bound_with_continuity(
    loss: Standardised, high_frequencies: float, eta: float | None = None
) -> float:
    """The same distance for losses whose characteristic function falls off.

    Falls with the count itself.

    Args:
        loss: Moments and count.
        high_frequencies: Upper bound on the integral of ``|f(u)| / u`` over
            `frequencies_that_matter`, with f that of the standardised sum.
        eta: As in `bound_without_regularity`.
    """
    if eta is None:
        return min(bound_with_continuity(loss, high_frequencies, float(one)) for one in _ETAS)
    n, skew, tilde, four = loss.count, abs(loss.skewness), loss.third_plus_first, loss.fourth
    _, b = frequencies_that_matter(loss)
    u = 16 * math.pi**3 * n**2 / tilde**4
    low = min(math.sqrt(2 * eta) * (n / four) ** 0.25, u)
    u2 = 32 * math.pi**6 * n**4 / tilde**8
    low2 = min(eta * math.sqrt(n / (16 * four)), u2)
    cut = min(math.sqrt(b), b**2)
    fourth_integral = _integral_gap(
        cut * (1 - 4 * math.pi * _CHI * _T_STAR) / (2 * math.pi**2),
        min(_T_STAR**2 * math.sqrt(b), b**2 / math.pi**2) * (1 - 4 * math.pi * _CHI * _T_STAR) / 2,
    )
    fifth_integral = _integral_gap(cut / (2 * math.pi**2), b**2 / (2 * math.pi**2))
    total = (
        _small_frequencies(loss, eta)
        + _SMOOTHING / math.pi * high_frequencies
        + 1.2533 * tilde**4 / (16 * math.pi**4 * n**2)
        + 0.3334 * tilde**4 * skew / (16 * math.pi**4 * n**2.5)
        + 14.1961 * tilde**16 / ((2 * math.pi) ** 16 * n**8)
        + 4.3394 * tilde**12 * skew / ((2 * math.pi) ** 12 * n**6.5)
        + skew / math.sqrt(n) * _gap(min(low, low**2 / 2), u**2 / 2)
        + _SMOOTHING * 2**2.5 * loss.third / (3 * math.pi * math.sqrt(n)) * _gap(low2, u2)
        + fourth_integral
        + fifth_integral
    )
    return float(total * _ROUNDING)


def _small_frequencies(loss: Standardised, eta: float) -> float:
    """The part of both bounds that comes from frequencies near zero."""
    n, skew, four = loss.count, abs(loss.skewness), loss.fourth
    slope = (1 - 3 * eta) ** 2
    p2 = (
        48 * eta * math.sqrt(four / n)
        + 4 * eta**2 * four / n
        + 96 * math.sqrt(2 * eta) * skew / (four**0.25 * n**0.25)
        + 32 * eta * skew**2 / math.sqrt(four * n)
        + 16 * math.sqrt(2) * four**0.25 * skew * eta**1.5 / n**0.75
    )
    exponent = eta**2 * (1 / 6 + 1 / (2 * slope) + 2 * p2 / (576 * slope))
    if exponent > 700:
        return math.inf
    e2 = math.exp(exponent)
    b = four / 12 + 1 / (4 * slope) + p2 / (576 * slope)
    gamma = math.gamma
    rest = (
        _SMOOTHING
        / (2 * math.pi * slope)
        * (
            skew / (6 * n**1.5) * math.sqrt(2) * gamma(1.5)
            + four / (24 * n**2) * 8 * gamma(4)
            + skew**2 / (36 * n**2) * 8 * gamma(4)
            + four * skew / (72 * n**2.5) * 2**3.5 * gamma(4.5)
            + four**2 / (576 * n**3) * 16 * gamma(5)
        )
    )
    rest += (
        _SMOOTHING
        / math.pi
        * e2
        * b
        * (16 * gamma(5) / (8 * n**2) + skew * 2**3.5 * gamma(4.5) / (12 * n**1.5))
    )
    small = (0.327 * four * (1 / 12 + 1 / (4 * slope)) + 0.037 * e2 * skew**2) / n + rest
    return float(small)


def _gap(low: float, high: float) -> float:
    """Upper incomplete gamma function of 3/2 between two points, at least zero."""
    from scipy.special import gammaincc

    return max(0.0, math.gamma(1.5) * float(gammaincc(1.5, low) - gammaincc(1.5, high)))


def _integral_gap(low: float, high: float) -> float:
    """Exponential integrals at two points: their distance, scaled as in the proof."""
    from scipy.special import exp1

    return _SMOOTHING / math.pi * abs(float(exp1(low) - exp1(high)))
