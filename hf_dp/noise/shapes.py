"""The shapes that a search tries: laws of mean 1 in LMO-DP's family, four numbers each."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hf_dp.scale_law import ScaleLaw

Point = NDArray[np.float64]
"""Log of the Gamma part's shape, then logs of three shares relative to that of the constant part: of
the Gamma, the Exponential and the Uniform part, ``(4,)``."""

Score = Callable[[ScaleLaw], float]
"""What to make least; `HOPELESS` for shapes that cannot be had."""

HOPELESS = 1e6
"""A score above all others, but finite: the simplex takes differences."""

LEAST, MOST = math.log(1e-3), math.log(1e3)
"""Bounds of shares: below a thousandth a part does nothing."""

_SHAPES = (math.log(0.2), math.log(1e4))

STARTS: tuple[tuple[float, float, float, float], ...] = (
    (1000.0, 0.02, 0.001, 0.01),
    (20.0, 0.1, 0.01, 0.1),
    (200.0, 10.0, 0.01, 0.01),
    (8.0, 10.0, 0.1, 0.1),
    (2.0, 1.0, 1.0, 1.0),
    (1.0, 0.01, 0.01, 1.0),
)
"""Where a search begins, each as shape and shares: plain Laplace but for a hundredth, and for a tenth, a
narrow Gamma, a wide one, all parts alike, and a constant with a uniform part."""


def law_at(point: Point) -> ScaleLaw:
    """The law of mean 1 at a point; points out of bounds are moved to the nearest within."""
    shape = math.exp(float(np.clip(point[0], *_SHAPES)))
    gamma, exponential, uniform = np.exp(np.clip(point[1:], LEAST, MOST))
    total = 1 + gamma + exponential + uniform
    return ScaleLaw(
        gamma_shape=shape,
        gamma_scale=float(gamma / total) / shape,
        exponential_mean=float(exponential / total),
        uniform_low=float(1 / total),
        uniform_high=float((1 + 2 * uniform) / total),
    )


def best_shape(score: Score, *, budget: int, good_enough: float) -> tuple[ScaleLaw, int]:
    """The shape of least score within a number of evaluations. Deterministic.

    All of `STARTS` are tried; a simplex search goes on from the best, unless that is above `good_enough`.

    Args:
        score: What to make least.
        budget: Evaluations, > 0.
        good_enough: A score above which no further search from the starts is worth its time.

    Returns:
        The shape, and how many evaluations were made.
    """
    from scipy.optimize import minimize

    seen: list[tuple[float, Point]] = []

    def valued(point: Point) -> float:
        if len(seen) >= budget:  # the last simplex step may ask for more
            return HOPELESS
        seen.append((score(law_at(point)), np.array(point)))
        return seen[-1][0]

    starts = [np.log(np.array(start)) for start in STARTS]
    for start in starts:
        valued(start)
    value, start = min(seen, key=lambda one: one[0])
    if value < HOPELESS and value <= good_enough and len(seen) < budget:
        simplex = np.vstack([start, *(start + step for step in np.diag([1.0, 1.5, 1.5, 1.5]))])
        options = {
            "maxfev": budget - len(seen),
            "initial_simplex": simplex,
            "xatol": 0.02,
            "fatol": 1e-4,
        }
        minimize(valued, start, method="Nelder-Mead", options=options)
    return law_at(min(seen, key=lambda one: one[0])[1]), len(seen)
