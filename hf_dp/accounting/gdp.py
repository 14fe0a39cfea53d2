"""The central limit theorem of Gaussian differential privacy: an estimate, for comparison only."""

from __future__ import annotations

import math

from hf_dp.accounting.base import Accountant, Leaves, StepBounds, gaussian_parameters, is_gaussian
from hf_dp.events import PrivacyEvent

_MOST = 1e4  # nats; where the estimate is larger it is of no use


class GDPAccountant(Accountant):
    """Estimates epsilon as that of one Gaussian release, to which many releases tend together.

    It bounds nothing: at the settings of private fine-tuning it is mostly below the truth, by up to
    90%. So its `epsilon` is inf, its number is the `estimate`, and it neither draws curves nor
    chooses noise, steps or batches.

    Source:
        Bu, Dong, Long and Su (2020), "Deep Learning with Gaussian Differential Privacy",
        arXiv 1911.11607, for Poisson sampling.
    """

    name = "gdp"
    is_upper_bound = False

    def supports(self, leaf: PrivacyEvent) -> bool:
        """Gaussian noise on a sum over all units or over a Poisson sample."""
        return is_gaussian(leaf)

    def _epsilon(self, leaves: Leaves, delta: float) -> float:
        del leaves, delta
        return math.inf

    def _beside(self, leaves: Leaves, delta: float) -> tuple[float | None, float | None]:
        return None, estimated_epsilon(leaves, delta)

    def _bounds(self, leaves: Leaves, delta: float, final_epsilon: float) -> StepBounds:
        raise NotImplementedError("`check_bounds` refuses curves before")


def estimated_epsilon(leaves: Leaves, delta: float) -> float | None:
    """Epsilon of the Gaussian that all releases together tend to; None where it is beyond all use.

    Args:
        leaves: Releases with counts; at least one, all Gaussian.
        delta: In (0, 1).
    """
    from scipy.optimize import brentq

    square = math.fsum(
        count * _square(*gaussian_parameters(leaf)) for leaf, count in leaves.items()
    )
    mu = math.sqrt(square)

    def excess(epsilon: float) -> float:
        return _delta(mu, epsilon) - delta

    if excess(0.0) <= 0:
        return 0.0
    top = mu * (mu / 2 + 40)  # delta there is below exp(-700)
    if not top <= _MOST:
        return None
    return float(brentq(excess, 0.0, top, xtol=1e-12))


def _square(sampling_probability: float, noise_multiplier: float) -> float:
    """What one release adds to the squared parameter of the limit."""
    precision = 1 / noise_multiplier**2
    if sampling_probability == 1:
        return precision
    return sampling_probability**2 * math.expm1(min(precision, 700.0))


def _delta(mu: float, epsilon: float) -> float:
    """delta(epsilon) of one Gaussian release whose two worlds lie `mu` standard deviations apart."""
    from scipy.special import log_ndtr, ndtr

    if mu == 0:
        return 0.0
    absent = math.exp(min(epsilon + float(log_ndtr(-epsilon / mu - mu / 2)), 0.0))
    return float(ndtr(-epsilon / mu + mu / 2)) - absent
