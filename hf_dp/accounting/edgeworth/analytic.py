"""Gauss's rule for analytic functions, with an explicit bound on its error.

Source:
    Trefethen (2013), "Approximation Theory and Approximation Practice", theorem 19.3.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from hf_dp.accounting._losses import Floats
from hf_dp.accounting.edgeworth.cumulants import Cumulants
from hf_dp.accounting.edgeworth.series import terms

PANEL = 0.25
"""Width of a panel, in standardised frequencies."""

PANEL_NODES = 10


@dataclass(frozen=True)
class Ellipse:
    """An ellipse around every panel, and how large f gets on it.

    Attributes:
        reach: How far it goes from the real line.
        steepness: Its parameter, the sum of its half axes over half the panel's width.
        log_f: Log of a bound on the modulus of f on it.
    """

    reach: float
    steepness: float
    log_f: float

    @classmethod
    def at(cls, reach: float, log_f: float) -> Ellipse:
        ratio = 2 * reach / (PANEL / 2)  # steepness - 1 / steepness
        return cls(reach, (ratio + math.sqrt(ratio**2 + 4)) / 2, log_f)

    def log_g(self, cumulants: Cumulants, order: int) -> float:
        """Log of a bound on the modulus of the series' transform within `reach` of the real line."""
        sizes = (
            abs(factor) * (math.sqrt(power) + self.reach) ** power
            for power, factor in terms(cumulants, order)
        )
        return self.reach**2 / 2 + math.log1p(math.fsum(sizes))


def gauss_rule(start: float, end: float) -> tuple[Floats, Floats]:
    """Nodes and weights of `PANEL_NODES` points between `start` and `end`, each ``(n,)``."""
    nodes, weights = _legendre()
    half = (end - start) / 2
    return start + half * (1 + nodes), half * weights


@functools.lru_cache(maxsize=64)
def composite_rule(panels: int) -> tuple[Floats, Floats]:
    """Nodes and weights of equal panels between 0 and 1, each ``(panels * PANEL_NODES,)``."""
    nodes, weights = _legendre()
    starts = np.arange(panels)[:, None] / panels
    points = starts + (1 + nodes) / (2 * panels)
    return points.ravel(), np.tile(weights / (2 * panels), panels)


@functools.cache
def _legendre() -> tuple[Floats, Floats]:
    nodes, weights = np.polynomial.legendre.leggauss(PANEL_NODES)
    return nodes, weights


def gauss_error(width: float, steepness: float, log_top: float) -> float:
    """Error of Gauss's rule for a function of at most exp(`log_top`) on the ellipse."""
    log_error = log_top - 2 * PANEL_NODES * math.log(steepness)
    return width / 2 * (64 / 15) * math.exp(min(log_error, 700.0)) / (1 - steepness**-2)
