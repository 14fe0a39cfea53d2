"""Rényi divergences of Laplace noise, of fixed or of drawn scale, sampled or not.

K_a below is the log-moment (a - 1) D_a(P || Q) = log E_Q[(P / Q)^a] of a release whose sum one unit
moves, D_a its Rényi divergence of order a.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from hf_dp.accounting._hidden_scale import highest_loss
from hf_dp.accounting._laplace import inverse_scale, l1_shift, pure_epsilon
from hf_dp.accounting._leaves import simplified
from hf_dp.accounting._losses import Floats
from hf_dp.events import Laplace, PrivacyEvent, ScaleMixtureLaplace
from hf_dp.scale_law import ScaleLaw

_POINTS = 256  # of the grid of shifts
_NEAR = 1e-3
_SLACK = 1e-9  # relative, for rounding
_EDGE = 1e-7  # relative
_ROUNDING = 4e-15  # absolute, of a log-moment


@functools.lru_cache(maxsize=256)
def laplace_divergences(
    sampling_probability: float, inner: PrivacyEvent, orders: tuple[float, ...]
) -> Floats:
    """Upper bounds on the Rényi divergences of Laplace noise over a Poisson sample, ``(len(orders),)``.

    Args:
        sampling_probability: In (0, 1].
        inner: `Laplace` or `ScaleMixtureLaplace`.
        orders: > 1; at fractions, sampled releases have looser bounds.
    """
    a = np.array(orders)
    divergences: Floats = log_moments(inner, a) / (a - 1)
    if sampling_probability < 1:
        # Also of a sample: a mixture's divergence is at most that of its worst part.
        whole = np.arange(2.0, math.ceil(max(orders)) + 1)
        sampled = sampled_log_moments(log_moments(inner, whole), sampling_probability, a)
        divergences = np.minimum(divergences, sampled / (a - 1))
    divergences.flags.writeable = False
    return divergences


def sampled_log_moments(moments: Floats, sampling_probability: float, orders: Floats) -> Floats:
    """Log-moments of symmetric additive noise on a sum over a Poisson sample.

    At whole orders the moment of (1 - q) Q + q P against Q is the binomial mean of exp(K_j), which grows
    with every K_j: so suprema may be put in for each of them. In between, log-moments are convex in the
    order, so they lie below the chord.

    Guarantees:
        * A bound in both directions (test: test_one_coin_for_all_coordinates_has_this_moment). Noise
          that is symmetric, in any number of coordinates, has a reflection that swaps P and Q and turns
          r = P / Q into 1 / r, also where a symmetric noise's scale is shown. So E_Q[phi(r)] is half of
          E_Q[phi(r) + r phi(1 / r)], a sum that is as negative at 1 / r as at r, up to the factor r. Take
          r >= 1, x = 1 - q + q r, y = 1 - q + q / r and phi = x^a - x^(1 - a), the two directions'
          moments: with F(z) = z^a - z^(1 - a), the sum is F(x) - r y F(1 / y). Here x - 1 = r y (1 / y - 1)
          and x y >= 1, and F is convex on z >= 1 with F(1) = 0, so F(z) / (z - 1) grows and
          F(x) >= r y F(1 / y): adding a unit has the lesser moment.

    Args:
        moments: K_2, K_3, ..., to an order not below the largest of `orders`, ``(m,)``; inf where unknown.
        sampling_probability: In (0, 1).
        orders: > 1, ``(n,)``.

    Source:
        Mironov, Talwar and Zhang (2019), arXiv 1908.10530, for the Gaussian.
    """
    from scipy.special import gammaln, logsumexp

    # log(exp(K) - 1): the binomial mean less 1 has no term at which digits cancel.
    positive = np.maximum(moments, 1e-300)
    excess = positive + np.log(-np.expm1(-positive))
    present, absent = math.log(sampling_probability), math.log1p(-sampling_probability)

    @functools.cache
    def at(order: int) -> float:
        if order == 1:
            return 0.0
        if np.isinf(excess[order - 2]):  # they grow with the order
            return math.inf
        j = np.arange(2, order + 1)
        weights = gammaln(order + 1) - gammaln(j + 1) - gammaln(order - j + 1)
        terms = weights + j * present + (order - j) * absent + excess[: order - 1]
        return float(np.logaddexp(0.0, logsumexp(terms)) * (1 + _SLACK))

    below = np.floor(orders).astype(int)
    parts = orders - below
    chords = [
        at(n) if part == 0 else (1 - part) * at(n) + part * at(n + 1)
        for n, part in zip(map(int, below), parts, strict=True)
    ]
    return np.array(chords)


def log_moments(inner: PrivacyEvent, orders: Floats) -> Floats:
    """Suprema of K_a over all that one unit may move the sum by, or upper bounds, ``(n,)``.

    Args:
        inner: `Laplace` or `ScaleMixtureLaplace`.
        orders: > 1, ``(n,)``.

    Returns:
        The bounds, for adding and for removing a unit; inf where none is known.
    """
    noise = simplified(inner)
    if isinstance(noise, Laplace):
        scale, dimension = inverse_scale(noise), noise.dimension
        return (
            of_one_coordinate(scale, orders)
            if noise.norm == "l1"
            else of_equal_moves(scale, dimension, orders)
        )
    assert isinstance(noise, ScaleMixtureLaplace)
    shift = l1_shift(noise)
    found = np.full(len(orders), np.inf)
    if not math.isinf(shift):
        found = with_released_scale(noise.law, shift, orders)
    if noise.draw == "shared":
        return found
    if noise.norm == "l2" and noise.dimension != 1:
        found = np.minimum(found, in_any_direction(noise.law, orders))
    bounded: Floats = np.minimum(found, with_bounded_losses(noise, orders))
    return bounded


def of_one_coordinate(shift: float, orders: Floats) -> Floats:
    """K_a = log((a e^((a - 1) s) + (a - 1) e^(-a s)) / (2 a - 1)) of a move by `shift` = s scales, ``(n,)``.

    It is the largest of all moves whose l1 norm is s: D_a is convex in s and 0 at 0 (`of_equal_moves`), so
    a whole move costs no less than the sum of its parts.

    Source:
        Mironov (2017), arXiv 1702.07476, proposition 6.
    """
    a = orders
    quadratic = a * (a - 1) * shift**2 / 2
    rising = _log_share(a) + (a - 1) * shift
    falling = np.log((a - 1) / (2 * a - 1)) - a * shift
    exact = np.logaddexp(rising, falling) * (1 + _SLACK) + _ROUNDING
    return np.minimum(exact, quadratic)


def of_equal_moves(scale: float, dimension: int | None, orders: Floats) -> Floats:
    """K_a of a move of l2 norm 1, in the direction in which it is largest, ``(n,)``.

    With t = e^(-(2 a - 1) x), D_a of one coordinate that moves by x scales has the derivatives
    a (1 - t) / (a + (a - 1) t) and a (2 a - 1)^2 t / (a + (a - 1) t)^2, the second positive and falling in
    x. So the first is concave and 0 at 0, its ratio to x falls, and D_a is a concave function of x^2: of
    all moves of d coordinates, equal ones cost most. d D_a(1 / sqrt(d)) grows with d, to a / 2 at one
    scale per unit of l2 norm: the divergence of Gaussian noise whose standard deviation is b.

    Args:
        scale: 1 / b.
        dimension: d; None: any.
        orders: > 1, ``(n,)``.
    """
    limit = orders * (orders - 1) * scale**2 / 2
    if dimension is None:
        return limit
    moved = scale / math.sqrt(dimension)
    exact = dimension * of_one_coordinate(moved, orders)
    # Rounding is relative to the move, so moves that are too small for it take the limit.
    return np.where(orders * moved > 1e-5, np.minimum(exact, limit), limit)


def with_released_scale(law: ScaleLaw, shift: float, orders: Floats) -> Floats:
    """K_a of one coordinate that moves by `shift`, its inverse scale being shown, ``(n,)``.

    It is the log of E exp(K_a(lambda s)) = (a M((a - 1) s) + (a - 1) M(-a s)) / (2 a - 1), M being
    lambda's moment generating function; infinite where (a - 1) s is beyond the end of its domain.

    Guarantees:
        * An upper bound where scales are hidden (nobody sees more of them than all), and for
          any number of coordinates that move by `shift` in the l1 norm, with one scale for all or one
          for each (test: test_a_whole_move_costs_no_less_than_its_parts): K_a is convex in the shift and
          0 at 0, so its exponential is log-convex, and so is a mean of such functions (Hölder); a convex
          function that is 0 at 0 is superadditive.
    """
    a = orders
    up, down = _log_moment(law, (a - 1) * shift), law.log_moment(-a * shift)
    rounding = _ROUNDING * (1 + np.abs(np.where(np.isfinite(up), up, 0.0)))
    moments: Floats = np.logaddexp(_log_share(a) + up, np.log((a - 1) / (2 * a - 1)) + down)
    return np.maximum(moments, 0.0) * (1 + _SLACK) + rounding


def in_any_direction(law: ScaleLaw, orders: Floats) -> Floats:
    """A bound on K_a of every move of l2 norm 1 of any number of coordinates, ``(n,)``.

    No coordinate moves by more than 1, so the sum of K_a(s_i) is at most the supremum of K_a(s) / s^2 over
    s in (0, 1]. On a grid of shifts, K_a, being convex, lies below its chords, which start at or below 0;
    a chord over s^2 is A w^2 + B w with w = 1 / s and A <= 0, whose maximum is at -B / (2 A) or
    at an end. Below the first shift s, K_a <= exp(K_a) - 1 <= s^2 m'' / 2, as exp(K_a) is 1 with slope 0 at
    0 and its second derivative is at most
    a (a - 1) ((a - 1) M''((a - 1) s) + a M''(0)) / (2 a - 1), M'' being an increasing function.
    """
    bounds = np.full(len(orders), np.inf)
    finite = np.isfinite(_log_moment(law, orders - 1))
    if not finite.any():
        return bounds
    a = orders[finite][:, None]
    second = float(law.moment_second_derivative(0.0))
    first = np.minimum(_NEAR, _NEAR * law.mean / (a * second))
    shifts = first ** np.linspace(1.0, 0.0, _POINTS)
    up, down = law.log_moment((a - 1) * shifts), law.log_moment(-a * shifts)
    moments = np.logaddexp(_log_share(a) + up, np.log((a - 1) / (2 * a - 1)) + down)
    moments = np.maximum(moments, 0.0) + _ROUNDING * (1 + np.abs(up))
    near = law.moment_second_derivative((a - 1) * first)
    curvature = a * (a - 1) * ((a - 1) * near + a * second) / (2 * a - 1)
    rises = np.diff(moments) / np.diff(shifts)
    starts = moments[:, :-1] - rises * shifts[:, :-1]
    peaks = np.where(starts < 0, -rises / (2 * np.minimum(starts, -1e-300)), np.inf)
    w = np.clip(peaks, 1 / shifts[:, 1:], 1 / shifts[:, :-1])
    along = starts * w**2 + rises * w
    bounds[finite] = np.maximum(along.max(1), curvature[:, 0] / 2) * (1 + _SLACK)
    return bounds


def with_bounded_losses(noise: ScaleMixtureLaplace, orders: Floats) -> Floats:
    """A bound on K_a of hidden scales, one for each coordinate, for every order, ``(n,)``.

    A coordinate that moves by s has losses of at most e(s), concave, 0 at 0, with slope
    c = E[lambda^2] / E[lambda] there (`pure_epsilon`). For losses of at most h,
    K_a <= log(cosh((a - 1 / 2) h) / cosh(h / 2)) (put x^a into `BoundedLoss`), which is at most
    a (a - 1) h^2 / 2, as log cosh(y) - y^2 / 2 falls in y > 0. K_a adds up over coordinates. In the l2 norm
    the sum of e(s_i)^2 is at most c^2; in the l1 norm it is at most e(1) times the sum of e(s_i).
    """
    law = noise.law
    steepest = float(law.moment_second_derivative(0.0)) / law.mean
    if noise.norm == "l2" and noise.dimension != 1:
        squares = steepest**2
    else:
        squares = highest_loss(law, 1.0) * pure_epsilon(noise)
    return orders * (orders - 1) / 2 * squares * (1 + _SLACK)


def _log_moment(law: ScaleLaw, points: Floats) -> Floats:
    """Log M; inf also just before the end of the domain, where rounding would count."""
    logs: Floats = np.where(points < law.domain_end * (1 - _EDGE), law.log_moment(points), np.inf)
    return logs


def _log_share(a: Floats) -> Floats:
    """Log of a / (2 a - 1)."""
    logs: Floats = np.log(a / (2 * a - 1))
    return logs
