"""The arithmetic of LMO-DP's released accountant, evaluated wherever it was evaluated.

For noise Laplace(0, b) with 1 / b random, of moment generating function M,

    D_alpha = log((alpha M(alpha - 1) + (alpha - 1) M(-alpha)) / (2 alpha - 1)) / (alpha - 1)

is the Rényi divergence at shift 1 of the pair (noise, b). M(t) is finite for t < t_max only. The
released code tests that for its smallest order and evaluates the closed form of M at all of them; past
t_max the closed form is a finite number, at times a positive one, that is no moment of anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hf_dp.accounting.as_published.sets import DELTA, PublishedNoise, PublishedTask
from hf_dp.scale_law import ScaleLaw

ORDERS = range(2, 129)


@dataclass(frozen=True)
class Label:
    """What the released code prints for one set.

    Attributes:
        value: It; not an epsilon.
        order: Where the least value was found.
        largest_valid_order: The largest of `ORDERS` at which M is finite; 1 if it is at none.
        inside_domain: The least value of the same formula over all real orders up to 128 at which M is
            finite: a bound on the epsilon of one release of noise as the accountant reads it, for l1
            sensitivity 1.
    """

    value: float
    order: int
    largest_valid_order: int
    inside_domain: float


def as_published_label(noise: PublishedNoise, delta: float = DELTA) -> Label:
    """The one-step label of a set: smallest over all orders, whether the formula holds there or not."""
    values = {order: _converted(_divergence(noise, order), order, delta) for order in ORDERS}
    order = min(values, key=lambda one: values[one])
    law = noise.law("accounted")
    valid = [one for one in ORDERS if one - 1 < law.domain_end]
    return Label(
        value=values[order],
        order=order,
        largest_valid_order=max(valid, default=1),
        inside_domain=inside_domain(law, delta),
    )


def inside_domain(law: ScaleLaw, delta: float) -> float:
    """The least converted value of the formula where it holds, over real orders up to the largest.

    Args:
        law: Of 1 / b, at l1 sensitivity 1.
        delta: In (0, 1).
    """
    most = min(law.domain_end, ORDERS[-1] - 1)
    excess = np.geomspace(1e-4 * most, most, 20_000)  # order - 1
    orders = 1 + excess
    moments = np.logaddexp(
        np.log(orders) + law.log_moment(excess), np.log(excess) + law.log_moment(-orders)
    )
    divergences = (moments - np.log(orders + excess)) / excess
    conversions = np.log1p(-1 / orders) - np.log(delta * orders) / excess
    return float(np.min(divergences + conversions))


def matched_noise(nominal: float, delta: float) -> float:
    """The Gaussian's noise multiplier that the released code puts in LMO's place for a whole run."""
    return math.sqrt(2 * math.log(1.25 / delta)) / nominal


def as_published_total_label(nominal: float, task: PublishedTask) -> float:
    """The label of a whole run: what `matched_noise` costs; the noise that is drawn does not enter it."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    release = dp_accounting.GaussianDpEvent(matched_noise(nominal, task.delta))
    probability = task.accounted_batch_size / task.num_examples
    accountant = RdpAccountant([float(order) for order in ORDERS])
    accountant.compose(dp_accounting.PoissonSampledDpEvent(probability, release), task.num_steps)
    return float(accountant.get_epsilon(task.delta))


def _divergence(noise: PublishedNoise, order: int) -> float:
    """D_alpha by the closed form; inf where it gives no positive number, as in the released code."""
    with np.errstate(all="ignore"):
        above = np.float64(order) * _closed_form(noise, np.float64(order - 1))
        below = np.float64(order - 1) * _closed_form(noise, np.float64(-order))
        found = float(np.log((above + below) / (2 * order - 1)) / (order - 1))
    return found if found > 0 else math.inf


def _closed_form(noise: PublishedNoise, t: np.float64) -> np.float64:
    """M(t) where that exists, and what its formula gives where it does not."""
    gamma = (1 - noise.a1 * noise.theta * t) ** -noise.k
    exponential = noise.lambda_e / (noise.lambda_e - noise.a3 * t)
    high, low = noise.a4 * t * noise.u_b, noise.a4 * t * noise.u_a
    uniform = (np.exp(high) - np.exp(low)) / (high - low)
    return np.float64(gamma * exponential * uniform)


def _converted(divergence: float, order: int, delta: float) -> float:
    """Canonne, Kamath and Steinke (2020), proposition 12."""
    return divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
