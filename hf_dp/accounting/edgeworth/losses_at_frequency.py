"""The characteristic function of one loss, by quadrature dense enough for the frequency asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_dp.accounting._losses import Floats, SampledGaussian
from hf_dp.accounting.edgeworth.cumulants import LossNodes

Complex = NDArray[np.complex128]

_MAX_NODES = 1_000_000
_DROPPED = 1e-28  # masses that add up to nothing
_LEAST_NOISE = 0.2  # below it the nodes would not reach where a density changes most


@dataclass(frozen=True, eq=False)
class Part:
    """One kind of release: its loss in one world, centred, at nodes dense enough for a frequency.

    Attributes:
        count: How many of them.
        deviations: The loss less its mean at each node, ``(n,)``; none if nothing is sampled.
        masses: Chance of each node, ``(n,)``.
        size: Mean absolute deviation.
        normal: Variance of the loss if nothing is sampled: it is normal then. Else 0.
    """

    count: int
    deviations: Floats
    masses: Floats
    size: float
    normal: float = 0.0

    def moduli_and_logs(self, frequencies: Floats) -> tuple[Floats, Complex]:
        """Modulus and logarithm of the characteristic function of one loss, each ``(n,)``."""
        if self.normal > 0:
            log_normal = -self.normal * frequencies**2 / 2
            return np.exp(log_normal), log_normal.astype(np.complex128)
        angles = np.multiply.outer(frequencies, self.deviations / 2)
        sine, cosine = np.sin(angles), np.cos(angles)
        # exp(i x) - 1, so that nothing cancels where the function is near one.
        real, imaginary = -2 * (sine * sine) @ self.masses, 2 * (sine * cosine) @ self.masses
        log_modulus = 0.5 * np.log1p(
            np.maximum(2 * real + real * real + imaginary * imaginary, -1 + 1e-15)
        )
        return np.exp(log_modulus), log_modulus + 1j * np.arctan2(imaginary, 1 + real)

    @property
    def rounding(self) -> float:
        """Worst relative error of a sum over the nodes, with room for the terms' own."""
        return max(1e-12, 4 * np.finfo(np.float64).eps * len(self.masses))


def parts_up_to(
    releases: Mapping[SampledGaussian, int], frequency: float, *, large: bool
) -> list[Part] | None:
    """Every kind of release at nodes for frequencies up to `frequency`; None if there were too many."""
    parts = []
    for release, count in releases.items():
        sigma = release.noise_multiplier
        if release.sampling_probability == 1:
            none = np.empty(0)
            parts.append(Part(count, none, none, 0.8 / sigma, normal=1 / sigma**2))
            continue
        # The loss turns by frequency / sigma^2 per unit of output: 100 radians for 64 nodes.
        width = 100 * sigma**2 / frequency
        if 64 * (1 + 30 * sigma) / width > _MAX_NODES:
            return None
        nodes = LossNodes.of(release, min(width, 1 + 30 * sigma))
        masses = nodes.masses("remove", large=large)
        kept = masses > _DROPPED
        mean = float(masses @ nodes.losses)
        deviations = nodes.losses[kept] - mean
        size = float(masses[kept] @ np.abs(deviations)) * (1 + 1e-9)
        parts.append(Part(count, deviations, masses[kept], size))
    return parts


def total_variation(release: SampledGaussian, large: bool) -> float:
    """Upper bound on the total variation of the density of one loss.

    With s the chance, given the output, that the unit was in the sample, the density changes by
    (z + 1 - s) / s without the unit, and by (z + 1 - 2 s) / s with it, times that of the output z.

    Returns:
        The bound; inf where noise is too small for it.
    """
    sigma, q = release.noise_multiplier, release.sampling_probability
    if sigma < _LEAST_NOISE:
        return math.inf
    nodes = LossNodes.of(release)
    exponents = (1 - 2 * nodes.outputs) / (2 * sigma**2)
    inverse = 1 + (1 - q) / q * np.exp(exponents)
    smooth = np.sqrt(
        (nodes.outputs + 1) ** 2 + (0.1 * sigma) ** 2
    )  # at least |z + 1|, and analytic
    masses = nodes.masses("remove", large=large)
    return float(masses @ (smooth * inverse)) * 1.001 + 2
