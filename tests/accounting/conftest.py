"""An epsilon that shares nothing with the accountants: contour integration of the loss's transform.

For any c > 0, with M(s) = E exp(s * loss) under the world whose losses are large,

    delta(epsilon) = 1 / (2 pi i) * integral over Re s = c of M(s) exp(-s epsilon) / (s (s + 1)) ds,

and the transform of a composition is the product of the transforms. No grid of losses, no Fourier
transform of probabilities, so no common rounding either: a small delta keeps its relative precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.special import ndtr

from hf_dp.accounting import flatten
from hf_dp.events import Gaussian, PoissonSampled, PrivacyEvent, SelfComposed

Release = tuple[float, float, int]
"""Sampling probability, noise multiplier, count."""


class World:
    """Losses of one release, by quadrature, in the world where they are large."""

    def __init__(self, probability: float, noise: float, direction: str) -> None:
        nodes, weights = np.polynomial.legendre.leggauss(64)
        edges = np.linspace(-15 * noise, 1 + 15 * noise, max(60, int(80 / noise)) + 1)
        half, middle = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
        output = (middle[:, None] + half[:, None] * nodes).ravel()
        weight = (half[:, None] * weights).ravel()
        absent = np.exp(-((output / noise) ** 2) / 2) / (noise * math.sqrt(2 * math.pi))
        shifted = np.exp(-(((output - 1) / noise) ** 2) / 2) / (noise * math.sqrt(2 * math.pi))
        ratio = (2 * output - 1) / (2 * noise**2)
        small = np.log1p(probability * np.expm1(np.minimum(ratio, 30)))
        log_ratio = np.where(ratio < 30, small, ratio + math.log(probability))
        if direction == "remove":
            self.losses = log_ratio
            self.masses = weight * ((1 - probability) * absent + probability * shifted)
        else:
            self.losses = -log_ratio
            self.masses = weight * absent

    def log_transform(self, points: np.ndarray) -> np.ndarray:
        values = [np.sum(self.masses * np.expm1(point * self.losses)) for point in points]
        return np.log1p(np.array(values))

    def variance(self, tilt: float) -> float:
        masses = self.masses * np.exp(tilt * self.losses - np.max(tilt * self.losses))
        masses = masses / masses.sum()
        mean = np.sum(masses * self.losses)
        return float(np.sum(masses * (self.losses - mean) ** 2))


class Exact:
    """delta(epsilon) of a composition, in one direction."""

    def __init__(self, releases: Sequence[Release], direction: str) -> None:
        self.parts = [(World(q, sigma, direction), count) for q, sigma, count in releases]

    def log_transform(self, points: np.ndarray) -> np.ndarray:
        return sum(count * world.log_transform(points) for world, count in self.parts)

    def delta(self, epsilon: float, max_nodes: int = 8192) -> float:
        def height(log_c: float) -> float:
            c = math.exp(log_c)
            top = self.log_transform(np.array([c]))[0]
            return float(top) - c * epsilon - math.log(c) - math.log1p(c)

        saddle = minimize_scalar(
            height, bounds=(-12, 8), method="bounded", options={"xatol": 1e-6}
        ).x
        c, top = math.exp(saddle), height(saddle)
        variance = sum(count * world.variance(c) for world, count in self.parts)
        step = 2 * math.pi / (30 * math.sqrt(variance) + 20)
        total, first = 0.0, 0
        while first < max_nodes:
            s = c + 1j * step * np.arange(first, first + 64)
            values = np.exp(self.log_transform(s) - s * epsilon - np.log(s) - np.log1p(s) - top)
            total += values.real.sum() - (values[0].real / 2 if first == 0 else 0.0)
            first += 64
            if np.abs(values).max() < 1e-14:
                break
        assert np.abs(values).max() < 1e-7, "too few releases for this integral"
        return total * step / math.pi * math.exp(top)


def _releases(event: PrivacyEvent) -> list[Release]:
    found = []
    for leaf, count in flatten(event).items():
        if isinstance(leaf, PoissonSampled) and isinstance(leaf.event, Gaussian):
            found.append((leaf.sampling_probability, leaf.event.noise_multiplier, count))
        elif isinstance(leaf, Gaussian):
            found.append((1.0, leaf.noise_multiplier, count))
    return found


@pytest.fixture(scope="session")
def exact_delta() -> Callable[..., float]:
    """``exact_delta(event, epsilon, direction)``."""
    return lambda event, epsilon, direction="remove": Exact(_releases(event), direction).delta(
        epsilon
    )


@pytest.fixture(scope="session")
def exact_epsilon() -> Callable[..., float]:
    """``exact_epsilon(event, delta, near, direction)``; `near` is right within a factor of two."""

    def solve(event: PrivacyEvent, delta: float, near: float, direction: str = "remove") -> float:
        exact = Exact(_releases(event), direction)

        def excess(epsilon: float) -> float:
            return math.log(max(exact.delta(epsilon), 1e-300) / delta)

        return float(brentq(excess, near / 2, near * 2, xtol=1e-10, rtol=1e-10))

    return solve


@pytest.fixture(scope="session")
def gaussian_epsilon() -> Callable[[float, float], float]:
    """Closed form for one unsampled Gaussian (Balle and Wang, 2018): ``(noise_multiplier, delta)``."""

    def solve(noise: float, delta: float) -> float:
        def excess(epsilon: float) -> float:
            above = ndtr(0.5 / noise - epsilon * noise)
            return float(above - math.exp(epsilon) * ndtr(-0.5 / noise - epsilon * noise) - delta)

        return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, 500.0, xtol=1e-13))

    return solve


@pytest.fixture(scope="session")
def sgd() -> Callable[..., PrivacyEvent]:
    """``sgd(sampling_probability, noise_multiplier, num_steps)``: the event of a run."""

    def event(probability: float, noise: float, num_steps: int) -> PrivacyEvent:
        return SelfComposed(PoissonSampled(probability, Gaussian(float(noise))), num_steps)

    return event
