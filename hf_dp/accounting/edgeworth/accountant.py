"""The Edgeworth accountant: a quick estimate, what can be proven about it, and a certificate beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hf_dp.accounting.base import Accountant, Leaves, is_gaussian
from hf_dp.accounting.edgeworth.cumulants import of_sum
from hf_dp.accounting.edgeworth.interval import Interval, Releases, interval
from hf_dp.accounting.edgeworth.series import ORDERS, Order, estimated_epsilon, looks_converged
from hf_dp.accounting.pld import PLDAccountant, merged_releases
from hf_dp.errors import PrivacyError, explain
from hf_dp.events import PrivacyEvent, Shuffled

_SKEWED = 0.25  # skewness of the sum above which the estimate is too rough to start a search from


@dataclass(frozen=True)
class Estimates:
    """Epsilon by the series of every order, when one unit is removed. None of them bounds anything.

    Attributes:
        by_order: Order to estimate; None where the series has nothing to say.
        skewness: Of the sum of losses; the estimates are poor above 0.2.
        looks_converged: Whether orders 1 to 3 agree (see `looks_converged`).
    """

    by_order: Mapping[Order, float | None]
    skewness: float
    looks_converged: bool


class EdgeworthAccountant(PLDAccountant):
    """Estimates epsilon from a few moments of the loss, and certifies it.

    The `estimate` of a guarantee is the second-order series': milliseconds, for any number of steps,
    within a percent where many steps add up and off by factors where few do. `epsilon` is never that:
    it is the lesser of the upper end of a proven interval and the bound of accountant "pld". `lower`
    is the proven lower end. Calibration starts its search from the estimate.

    Guarantees:
        * `epsilon` is an upper bound, also where the estimate is far below it (test:
          test_epsilon_is_never_below_the_exact_one).

    Source:
        Wang, Gao, Zhang, Shen and Su (2022), "Analytical Composition of Differential Privacy via the
        Edgeworth Accountant", arXiv 2206.04236; used for fine-tuning by Behnia, Ebrahimi, Pacheco and
        Padmanabhan (2022), "EW-Tune", arXiv 2210.15042.
    """

    name = "edgeworth"
    relations = Accountant.relations

    def supports(self, leaf: PrivacyEvent) -> bool:
        """Gaussian noise on a sum over all units or over a Poisson sample."""
        return is_gaussian(leaf)

    def estimates(self, leaves: Leaves, delta: float) -> Estimates:
        """What the series of each order says.

        Args:
            leaves: Releases with counts, as `flatten` gives them; at least one, all supported.
            delta: In (0, 1).
        """
        releases = merged_releases(leaves)
        large = of_sum(releases, "remove", large=True)
        small = of_sum(releases, "remove", large=False)
        by_order = {order: estimated_epsilon(large, small, delta, order) for order in ORDERS}
        return Estimates(by_order, large.skewness, looks_converged(by_order))

    def interval(self, leaves: Leaves, delta: float) -> Interval:
        """Between which numbers epsilon provably lies; see `estimates` for the arguments."""
        return interval(_ordered(leaves), delta)

    def _epsilon(self, leaves: Leaves, delta: float) -> float:
        certificate = super()._epsilon(leaves, delta)
        proven = self.interval(leaves, delta)
        epsilon = min(certificate, proven.upper)
        if proven.lower > epsilon:
            raise PrivacyError(
                explain(
                    "EdgeworthAccountant.lower",
                    proven.lower,
                    f"at most the upper bound {epsilon!r}",
                    "Two proofs contradict each other, so the arithmetic of one of them failed.",
                    "Use the accountant 'rdp', and report these settings as a bug.",
                )
            )
        return epsilon

    def _certificate(self, leaves: Leaves, delta: float) -> float:
        return super()._epsilon(leaves, delta)  # the interval would be sharper by 0.003% at best

    def _beside(self, leaves: Leaves, delta: float) -> tuple[float | None, float | None]:
        # A shuffled pass is bounded as one in the worst order; in secret order less may hold as well.
        exact = not any(isinstance(leaf, Shuffled) for leaf in leaves)
        lower = self.interval(leaves, delta).lower if exact else 0.0
        return (lower if lower > 0 else None), self._estimate(leaves, delta)

    def _estimate(self, leaves: Leaves, delta: float) -> float | None:
        releases = merged_releases(leaves)
        large = of_sum(releases, "remove", large=True)
        return estimated_epsilon(large, of_sum(releases, "remove", large=False), delta)

    def _quick_epsilon(self, leaves: Leaves, delta: float, near: float) -> float:
        """The estimate where it is any good: a search may start from it, a certificate ends it."""
        if of_sum(merged_releases(leaves), "remove", large=True).skewness <= _SKEWED:
            estimate = self._estimate(leaves, delta)
            if estimate is not None and 0 < estimate < math.inf:
                return estimate
        return super()._quick_epsilon(leaves, delta, near)


def _ordered(leaves: Leaves) -> Releases:
    releases = merged_releases(leaves).items()
    return tuple(
        sorted(releases, key=lambda item: (item[0].sampling_probability, item[0].noise_multiplier))
    )
