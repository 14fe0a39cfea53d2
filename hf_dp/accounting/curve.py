"""Epsilon after every step of a run, computed once, so that reading it in a log line is free."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hf_dp.errors import ConfigurationError, explain


class EpsilonCurve:
    """A proven upper bound on epsilon after any number of equal releases, at one delta.

    Attributes:
        num_steps: Releases planned; the curve was computed up to here and extends itself beyond.

    Guarantees:
        * Zero for zero releases, and never decreasing (test: test_curve_never_decreases).
        * An upper bound for every count, also beyond `num_steps` (test:
          test_curve_is_never_below_the_exact_epsilon).
        * Equal to the accountant's guarantee at `num_steps`, and at most that before, so a run that
          was calibrated to a target is never stopped early by the curve (test:
          test_curve_ends_at_the_guarantee).
    """

    def __init__(
        self,
        bounds: Callable[[int, int], NDArray[np.float64]],
        num_steps: int,
        final_epsilon: float,
    ) -> None:
        """Compute the curve up to `num_steps`.

        Args:
            bounds: ``bounds(first, last)`` gives upper bounds for the counts first, ..., last, in
                any order of size.
            num_steps: Releases planned, > 0.
            final_epsilon: The guarantee after `num_steps` releases.
        """
        self.num_steps = num_steps
        self._bounds = bounds
        values = np.append(bounds(1, num_steps)[:-1], final_epsilon)
        self._values = np.concatenate(([0.0], _nondecreasing(values)))

    def epsilon(self, num_releases: int) -> float:
        """The bound after `num_releases` releases, in nats.

        Args:
            num_releases: >= 0. Beyond what was computed so far, the curve first doubles its length.
        """
        if isinstance(num_releases, bool) or not isinstance(num_releases, int) or num_releases < 0:
            raise ConfigurationError(
                explain(
                    "EpsilonCurve.num_releases",
                    num_releases,
                    "a whole number >= 0",
                    "It counts what was released.",
                    "Use the ledger's number of releases.",
                )
            )
        while num_releases >= len(self._values):
            self._double()
        return float(self._values[num_releases])

    def _double(self) -> None:
        last = len(self._values) - 1
        values = _nondecreasing(self._bounds(last + 1, 2 * last))
        # A bound for fewer releases may be the looser one; what was said once is not taken back.
        self._values = np.concatenate((self._values, np.maximum(values, self._values[-1])))


def _nondecreasing(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lower each bound to the least one after it: epsilon grows with the count, so that holds too."""
    lowered: NDArray[np.float64] = np.minimum.accumulate(values[::-1])[::-1]
    return lowered
