"""The law of a random inverse scale, and of the Laplace noise that is drawn with it.

Laplace noise of scale b has density exp(-|z| / b) / (2 b). Here the *inverse scale* lambda = 1 / b is
itself drawn, as a sum of a Gamma, an Exponential and a Uniform variable. All that is worth knowing of
the noise Z follows from the moment generating function M(t) = E[exp(t lambda)]::

    P(|Z| > x) = M(-x)        density(x) = M'(-|x|) / 2
    Var Z = 2 E[lambda^-2]    E|Z| = E[1 / lambda]

M is finite for t below `ScaleLaw.domain_end` only, and is inf from there on; its formula goes on to
give finite numbers there, which mean nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_dp._validate import not_negative, positive
from hf_dp.errors import ConfigurationError, explain

Array = NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)
_PANEL = 0.5  # width, in log x, of the pieces of the integrals
# x^n of (coth(x / 2) - 2 / x) / 2 at n = 1, 3, 5, ...: B_2n / (2n)!, B_2n being Bernoulli's numbers
_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798)
_LANGEVIN = np.array([b / math.factorial(2 * n + 2) for n, b in enumerate(_BERNOULLI)])
_SINHC = np.array(
    [1 / math.factorial(2 * n + 3) for n in range(10)]
)  # of y^2, y^4, ... in sinh(y)/y


@dataclass(frozen=True)
class ScaleLaw:
    """The law of lambda = 1 / b at sensitivity 1, the sum of up to three independent parts.

    A part whose scale, mean or ends are 0 is absent. A uniform part with equal ends is a constant;
    with nothing else the noise is plain Laplace noise of scale 1 / uniform_low.

    Attributes:
        gamma_shape: Shape k of the Gamma part, > 0.
        gamma_scale: Scale (not rate) of the Gamma part; its mean is gamma_shape * gamma_scale.
        exponential_mean: Mean (not rate) of the Exponential part.
        uniform_low: Lower end of the Uniform part.
        uniform_high: Upper end of the Uniform part, >= uniform_low.

    Guarantees:
        * `log_moment` is inf at and beyond `domain_end` (test: test_moments_end_where_they_diverge).

    Source:
        The family is that of LMO-DP (arXiv 2405.18776); the identities are those of mixtures of
        exponential laws (Feller 1971, volume II, chapter XIII).
    """

    gamma_shape: float = 1.0
    gamma_scale: float = 0.0
    exponential_mean: float = 0.0
    uniform_low: float = 0.0
    uniform_high: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no law of a positive inverse scale."""
        why = "It shapes the law of the inverse scale of the noise."
        positive("ScaleLaw.gamma_shape", self.gamma_shape, why, "Use 1 for an exponential part.")
        for name in ("gamma_scale", "exponential_mean", "uniform_low", "uniform_high"):
            not_negative(f"ScaleLaw.{name}", getattr(self, name), why, "Use 0 to leave it out.")
        if self.uniform_high < self.uniform_low:
            raise ConfigurationError(
                explain(
                    "ScaleLaw.uniform_high",
                    self.uniform_high,
                    f"at least uniform_low ({self.uniform_low})",
                    "They are the ends of an interval.",
                    "Swap them.",
                )
            )
        if not self.mean > 0:
            raise ConfigurationError(
                explain(
                    "ScaleLaw",
                    dataclasses.astuple(self),
                    "one part at least that is not 0",
                    "An inverse scale of 0 is noise without end.",
                    "Set gamma_scale, exponential_mean or uniform_high.",
                )
            )

    @property
    def mean(self) -> float:
        """E[lambda] = M'(0), twice the density of the noise at 0."""
        uniform = (self.uniform_low + self.uniform_high) / 2
        return self.gamma_shape * self.gamma_scale + self.exponential_mean + uniform

    @property
    def domain_end(self) -> float:
        """The t from which on M(t) is infinite; inf if there is none."""
        longest = max(self.gamma_scale, self.exponential_mean)
        return 1 / longest if longest > 0 else math.inf

    @property
    def order_at_zero(self) -> float:
        """The p of P(lambda < x) ~ x^p at 0: E[lambda^-r] is finite where r < p. inf: bounded away."""
        if self.uniform_low > 0:
            return math.inf
        gamma = self.gamma_shape if self.gamma_scale > 0 else 0.0
        return gamma + (self.exponential_mean > 0) + (self.uniform_high > 0)

    def log_moment(self, t: ArrayLike) -> Array:
        """Log M(t); inf for t >= `domain_end`."""
        t = np.asarray(t, dtype=np.float64)
        inside = np.where(t < self.domain_end, t, 0.0)
        total = (
            -self.gamma_shape * np.log1p(-self.gamma_scale * inside) if self.gamma_scale else 0.0
        )
        if self.exponential_mean:
            total = total - np.log1p(-self.exponential_mean * inside)
        if self.uniform_low:
            total = total + self.uniform_low * inside
        if self._width:
            total = total + _log_mean_exp(self._width * inside)
        return _finite_inside(total, t < self.domain_end)

    def moment_derivative(self, t: ArrayLike) -> Array:
        """M'(t) = E[lambda exp(t lambda)]; inf for t >= `domain_end`."""
        t = np.asarray(t, dtype=np.float64)
        inside = np.where(t < self.domain_end, t, 0.0)
        value = np.exp(self.log_moment(inside)) * self._slope(inside)
        return _finite_inside(value, t < self.domain_end)

    def moment_second_derivative(self, t: ArrayLike) -> Array:
        """M''(t) = E[lambda^2 exp(t lambda)]; inf for t >= `domain_end`."""
        t = np.asarray(t, dtype=np.float64)
        inside = np.where(t < self.domain_end, t, 0.0)
        curvature = self._slope(inside) ** 2 + self._slope_of_slope(inside)
        return _finite_inside(np.exp(self.log_moment(inside)) * curvature, t < self.domain_end)

    def tail(self, x: ArrayLike) -> Array:
        """P(abs(Z) > x), x >= 0."""
        return _plain(np.exp(self.log_moment(-np.asarray(x, dtype=np.float64))))

    def density(self, x: ArrayLike) -> Array:
        """The density of the noise Z at `x`."""
        return _plain(self.moment_derivative(-np.abs(np.asarray(x, dtype=np.float64))) / 2)

    def usefulness(self, radius: ArrayLike) -> Array:
        """P(abs(Z) <= radius), radius >= 0."""
        return _plain(-np.expm1(self.log_moment(-np.asarray(radius, dtype=np.float64))))

    def pure_epsilon(self, shift: ArrayLike = 1.0) -> Array:
        """The largest log-ratio of the densities of Z and Z + shift: what ONE noised number costs."""
        shift = np.abs(np.asarray(shift, dtype=np.float64))
        slopes = np.log(self._slope(np.zeros_like(shift))) - np.log(self._slope(-shift))
        return _plain(slopes - self.log_moment(-shift))

    @cached_property
    def deviation(self) -> float:
        """Standard deviation of Z; inf where the variance is infinite."""
        if self.order_at_zero <= 2:
            return math.inf
        # E[lambda^-2] is the integral of x M(-x) over x > 0; M(-x) ~ x^-order beyond the last piece.
        inner, end = self._integral(lambda x: x * self.tail(x)), self._far
        beyond = end**2 * float(self.tail(end)) / (self.order_at_zero - 2)
        return math.sqrt(2 * (inner + beyond))

    @cached_property
    def mean_absolute(self) -> float:
        """E[abs(Z)]; inf where it is."""
        if self.order_at_zero <= 1:
            return math.inf
        end = self._far
        return self._integral(self.tail) + end * float(self.tail(end)) / (self.order_at_zero - 1)

    def entropy(self) -> float:
        """Differential entropy of Z, in nats."""

        def integrand(x: Array) -> Array:
            f = self.density(x)
            return -2 * f * np.log(f, out=np.zeros_like(f), where=f > 0)

        end, last = self._far, float(self.density(self._far))
        if last == 0:
            return self._integral(integrand)
        order = self.order_at_zero + 1  # the density falls as x^-order
        beyond = -2 * last * end * (math.log(last) / (order - 1) - order / (order - 1) ** 2)
        return self._integral(integrand) + beyond

    def information(self) -> float:
        """Fisher information of Z's place, int f'^2 / f.

        Where many coordinates move by little each, the noise costs what a Gaussian of this precision
        (1 / variance) costs; it is at least 1 / deviation^2, and 2 / deviation^2 in this family.
        """

        def integrand(x: Array) -> Array:
            slope = self._slope(-x)
            return self.tail(x) * (slope**2 + self._slope_of_slope(-x)) ** 2 / slope

        return self._integral(integrand)

    def scaled(self, factor: float) -> ScaleLaw:
        """The law of factor * lambda; the noise drawn with it is Z / factor."""
        positive("ScaleLaw.factor", factor, "It divides the noise.", "Use a number above 0.")
        return dataclasses.replace(
            self,
            gamma_scale=self.gamma_scale * factor,
            exponential_mean=self.exponential_mean * factor,
            uniform_low=self.uniform_low * factor,
            uniform_high=self.uniform_high * factor,
        )

    def with_deviation(self, deviation: float) -> ScaleLaw:
        """The law of the same shape whose noise has this standard deviation."""
        if math.isinf(self.deviation):
            raise ConfigurationError(
                explain(
                    "ScaleLaw",
                    dataclasses.astuple(self),
                    "a law of finite variance",
                    "No rescaling gives noise of infinite variance a standard deviation.",
                    "Take gamma_shape above 2, add parts, or set uniform_low above 0.",
                )
            )
        return self.scaled(self.deviation / deviation)

    @property
    def _width(self) -> float:
        return self.uniform_high - self.uniform_low

    @property
    def _far(self) -> float:
        """An x beyond which M(-x) is a power of x, or 0."""
        scales = (self.gamma_scale, self.exponential_mean, self.uniform_low, self._width)
        return 1e12 / min(scale for scale in scales if scale > 0)

    def _slope(self, t: Array) -> Array:
        """(log M)'(t), inside the domain."""
        total = self.gamma_shape * self.gamma_scale / (1 - self.gamma_scale * t)
        total = total + self.exponential_mean / (1 - self.exponential_mean * t) + self.uniform_low
        return total + self._width * _mean_share(self._width * t) if self._width else total

    def _slope_of_slope(self, t: Array) -> Array:
        """(log M)''(t), inside the domain."""
        total = self.gamma_shape * (self.gamma_scale / (1 - self.gamma_scale * t)) ** 2
        total = total + (self.exponential_mean / (1 - self.exponential_mean * t)) ** 2
        return total + self._width**2 * _variance_share(self._width * t) if self._width else total

    def _integral(self, integrand: Callable[[Array], Array]) -> float:
        """Over x from 0 to `_far`, by Gauss-Legendre pieces of equal length in log x.

        All integrands are analytic in log x within pi of the real line, so 20 nodes on a piece of
        length 1/2 are exact to rounding.
        """
        start, end = math.log(1e-18 / self.mean), math.log(self._far)
        pieces = math.ceil((end - start) / _PANEL)
        half = (end - start) / pieces / 2
        middles = start + half * (2 * np.arange(pieces) + 1)
        x = np.exp(middles[:, None] + half * _NODES)
        return half * float((integrand(x) * x * _WEIGHTS).sum())


def _plain(value: ArrayLike) -> Array:
    """A NumPy number rather than an array without axes."""
    scalar: Array = np.asarray(value, dtype=np.float64)[()]
    return scalar


def _finite_inside(value: ArrayLike, inside: NDArray[np.bool_]) -> Array:
    return _plain(np.where(inside, value, np.inf))


def _log_mean_exp(x: Array) -> Array:
    """log((exp(x) - 1) / x), the log-moment of a uniform variable on [0, 1]; full accuracy near 0."""
    size = np.abs(x)
    small = np.minimum(size, 2.0) / 2
    near = x / 2 + np.log1p(_series(_SINHC, small**2) * small**2)
    large = np.maximum(size, 2.0)
    far = np.maximum(x, 0.0) + np.log1p(-np.exp(-large)) - np.log(large)
    return np.where(size < 2.0, near, far)


def _mean_share(x: Array) -> Array:
    """The derivative of `_log_mean_exp`: 1 / (1 - exp(-x)) - 1 / x."""
    size = np.abs(x)
    small = np.where(size < 1.0, x, 0.0)
    near = 0.5 + small * _series(_LANGEVIN, small**2)
    large = np.maximum(size, 1.0)
    # exp(-x) / (1 - exp(-x)) is what vanishes on the negative side: no cancellation with 1 / x
    vanishing = np.exp(-large) / -np.expm1(-large)
    far = np.where(x > 0, 1 + vanishing - 1 / large, 1 / large - vanishing)
    return np.where(size < 1.0, near, far)


def _variance_share(x: Array) -> Array:
    """The second derivative of `_log_mean_exp`: 1 / x^2 - 1 / (4 sinh(x / 2)^2)."""
    size = np.abs(x)
    small = np.where(size < 1.0, x, 0.0)
    odd = 2 * np.arange(len(_LANGEVIN)) + 1
    near = _series(_LANGEVIN * odd, small**2)
    large = np.maximum(size, 1.0)
    far = 1 / large**2 - np.exp(-large) / np.expm1(-large) ** 2
    return np.where(size < 1.0, near, far)


def _series(coefficients: Array, square: Array) -> Array:
    value = np.polynomial.polynomial.polyval(square, coefficients)
    return np.asarray(value, dtype=np.float64)
