"""A bound on the error of an Edgeworth series, computed from the sum's characteristic function.

With f the characteristic function of the standardised sum S and g the Fourier transform of the series,
Gil-Pelaez's inversion gives for every point

    |P(S > x) - series(x)| <= 1/pi * integral over u > 0 of |f(u) - g(u)| / u.

The integral is bounded from above, not approximated:

* up to where f has all but vanished, panel by panel: by Cauchy and Schwarz from the integral of
  |f - g|^2, which is analytic, so that Gauss's rule has an explicit error (Trefethen 2013, theorem 19.3);
* then by the supremum of |f|, which moves by no more than the mean size of a loss times the frequency;
* then by the total variation of the density of one loss over the frequency.

Rounding is allowed for with a multiple of the worst case of the sums involved.

Source:
    Gil-Pelaez (1951), "Note on the inversion theorem", Biometrika 38.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from hf_dp.accounting._losses import Floats, SampledGaussian
from hf_dp.accounting.edgeworth.analytic import PANEL, PANEL_NODES, Ellipse, gauss_error, gauss_rule
from hf_dp.accounting.edgeworth.cumulants import Cumulants, LossNodes, of_sum
from hf_dp.accounting.edgeworth.losses_at_frequency import (
    Complex,
    Part,
    parts_up_to,
    total_variation,
)
from hf_dp.accounting.edgeworth.series import terms

_NEGLIGIBLE = 1e-18  # modulus of f at which panels end
_MAX_PANELS = 400
_MAX_STEPS = 1000
_MAX_WORK = 12_000_000  # values of the integrand of one loss; more is given up as hopeless
_FURTHEST = 60.0  # largest exponent of a loss whose moment is looked at
_USELESS = 0.5  # an error of a chance that says nothing


class CharacteristicFunction:
    """That of the sum of all losses of a run in one world, standardised by its cumulants.

    In the direction "add" the losses have the other sign, so moduli and errors are the same.
    """

    def __init__(self, releases: Mapping[SampledGaussian, int], *, large: bool) -> None:
        """Look at `releases` with the unit (`large`) or without it, direction "remove"."""
        self._releases = releases
        self._large = large
        self.cumulants = of_sum(releases, "remove", large=large)
        self._scale = math.sqrt(self.cumulants.variance)
        self._parts: dict[int, list[Part] | None] = {}
        self._work = 0

    def error_bounds(self) -> dict[int, float]:
        """Upper bounds on the error of the series of orders 1, 2 and 3; inf where none is found."""
        if all(one.sampling_probability == 1 for one in self._releases):
            return dict.fromkeys((1, 2, 3), 0.0)  # the loss is normal, and so is the series
        hopeless = dict.fromkeys((1, 2, 3), math.inf)
        height = self._height()
        if height is None:
            return hopeless
        totals = np.zeros(3)
        end = 0.0
        for number in range(_MAX_PANELS):
            start, end = number * PANEL, (number + 1) * PANEL
            panel = self._panel(start, end, height)
            if panel is None:
                return hopeless
            integrals, modulus = panel
            totals += integrals
            if np.min(totals) > _USELESS * math.pi:
                return hopeless
            if modulus < _NEGLIGIBLE and end > 10:
                break
        tail = self.tail_integral(end)
        for order in (1, 2, 3):
            totals[order - 1] += tail + _series_tail(self.cumulants, order, end)
        return {order: float(totals[order - 1]) / math.pi for order in (1, 2, 3)}

    def integral_of_modulus(self, start: float, end: float) -> float:
        """Upper bound on the integral of ``|f(u)| / u`` from `start` > 0 to `end`; inf if none is found."""
        height = self._height()
        total, low = 0.0, start
        for _ in range(_MAX_PANELS):
            if height is None or low >= end:
                return total if height is not None else math.inf
            high = low + PANEL
            nodes, weights = gauss_rule(low, high)
            known = self._values(nodes)
            if known is None:
                return math.inf
            values, slack = known
            square = float(weights @ (np.abs(values) + slack) ** 2)
            square += gauss_error(PANEL, height.steepness, 2 * height.log_f)
            total += math.sqrt(square * (1 / low - 1 / high))
            low = high
            if float(np.max(np.abs(values))) < _NEGLIGIBLE:
                break
        return total + (self.tail_integral(low) if low < end else 0.0)

    def tail_integral(self, start: float) -> float:
        """Upper bound on the integral of ``|f(u)| / u`` from `start` on, by suprema; inf if none is found."""
        total, u = 0.0, start
        for _ in range(_MAX_STEPS):
            beyond = self._smooth_tail(u)
            if beyond < 1e-16:
                return total + beyond
            parts = self._at(u)
            if parts is None:
                return math.inf
            moduli = [
                float(part.moduli_and_logs(np.array([u / self._scale]))[0][0]) + part.rounding
                for part in parts
            ]
            step, log_bound = self._step(parts, moduli)
            if log_bound > math.log(1e-4):
                return math.inf
            total += math.exp(log_bound) * math.log1p(step / u)
            u += step
        return math.inf

    def _step(self, parts: list[Part], moduli: list[float]) -> tuple[float, float]:
        """How far to go from a frequency, and the log of a bound on the modulus up to there."""
        sampled = [
            (part.count, min(m, 1.0), part.size)
            for part, m in zip(parts, moduli, strict=True)
            if part.normal == 0
        ]
        _, modulus, size = min(sampled, key=lambda one: one[0] * math.log(one[1]))
        step = max((modulus**0.6 - modulus) / size, 1e-12)
        bound = sum(count * math.log(min(m + size * step, 1.0)) for count, m, size in sampled)
        # The modulus of a normal loss only falls.
        bound += sum(
            part.count * math.log(min(m, 1.0))
            for part, m in zip(parts, moduli, strict=True)
            if part.normal > 0
        )
        return step * self._scale, bound

    def _smooth_tail(self, u: float) -> float:
        """Bound on the tail integral from the total variation of the densities; may be above one."""
        frequency = u / self._scale
        log_bound, count = 0.0, 0
        for release, number in self._releases.items():
            ratio = total_variation(release, self._large) / frequency
            if ratio < 1:
                log_bound += number * math.log(ratio)
                count += number
        by_density = math.exp(log_bound) / count if count else math.inf
        # Unsampled Gaussians together have the characteristic function exp(-u^2 / 2 * their share).
        normal = math.fsum(
            number / release.noise_multiplier**2
            for release, number in self._releases.items()
            if release.sampling_probability == 1
        )
        exponent = frequency**2 * normal / 2
        by_normal = math.exp(-exponent) / (2 * exponent) if exponent > 0 else math.inf
        return min(by_density, by_normal)

    def _panel(self, start: float, end: float, height: Ellipse) -> tuple[Floats, float] | None:
        """For each order the integral of |f - g| / u over a panel, and the largest |f| in it."""
        nodes, weights = gauss_rule(start, end)
        known = self._values(nodes)
        if known is None:
            return None
        values, slack = known
        integrals = np.empty(3)
        for order in (1, 2, 3):
            distance = np.abs(values - _series(self.cumulants, order, nodes)) + slack
            distance += 1e-15 * (1 + nodes)
            log_top = np.logaddexp(height.log_f, height.log_g(self.cumulants, order))
            # (f - g) / u is entire: where |u| is less than the ellipse's reach, its modulus is at most
            # the largest one on the circle of that radius, so this bound holds on the whole strip.
            error = gauss_error(
                end - start, height.steepness, 2 * (log_top - math.log(height.reach))
            )
            square = float(weights @ (distance / nodes) ** 2) + error
            integrals[order - 1] = math.sqrt((end - start) * square)
        return integrals, float(np.max(np.abs(values)))

    def _values(self, nodes: Floats) -> tuple[Complex, Floats] | None:
        """The function at standardised frequencies, and how far rounding can have moved it."""
        parts = self._at(float(nodes[-1]), len(nodes))
        if parts is None:
            return None
        frequencies = nodes / self._scale
        logs, slack = np.zeros(len(nodes), dtype=np.complex128), np.zeros(len(nodes))
        for part in parts:
            moduli, log_values = part.moduli_and_logs(frequencies)
            logs += part.count * log_values
            slack += (
                part.count * part.rounding * frequencies * part.size / np.maximum(moduli, 1e-13)
            )
        values = np.exp(logs)
        return values, np.abs(values) * np.expm1(np.minimum(slack, 50.0)) + 1e-30

    def _at(self, u: float, num_points: int = 1) -> list[Part] | None:
        """The losses at nodes dense enough for frequencies up to `u`; None if there were too many."""
        level = max(3, math.ceil(math.log2(u)))
        if level not in self._parts:
            self._parts[level] = parts_up_to(
                self._releases, 2.0**level / self._scale, large=self._large
            )
        parts = self._parts[level]
        if parts is not None:
            self._work += num_points * sum(len(part.masses) for part in parts)
        return parts if self._work <= _MAX_WORK else None

    def _height(self) -> Ellipse | None:
        """The best ellipse around a panel on which f can be bounded; None if there is none."""
        reaches = (y for y in (3.0, 2.0, 1.5, 1.0, 0.5) if y <= _FURTHEST * self._scale)
        found = [Ellipse.at(y, self._log_moment(y)) for y in reaches]
        return min(
            (one for one in found if one.log_f < math.inf),
            key=lambda one: one.log_f - PANEL_NODES * math.log(one.steepness),
            default=None,
        )

    def _log_moment(self, y: float) -> float:
        """Log of a bound on E exp(y' |S|) for all y' up to `y`, both signs together."""
        sums = []
        for sign in (1.0, -1.0):
            total = 0.0
            for release, count in self._releases.items():
                if release.sampling_probability == 1:
                    total += count * (y / self._scale / release.noise_multiplier) ** 2 / 2
                    continue
                tilt = y / self._scale  # moves the mean of the output by as much
                nodes = LossNodes.of(release, further=tilt)
                masses = nodes.masses("remove", large=self._large)
                mean = float(masses @ nodes.losses)
                exponents = sign * tilt * (nodes.losses - mean)
                if float(np.max(exponents)) > 700:
                    return math.inf
                total += count * max(math.log1p(float(masses @ np.expm1(exponents))), 0.0)
            sums.append(total)
        return float(np.logaddexp(sums[0], sums[1])) + 1.0


def _series(cumulants: Cumulants, order: int, u: Floats) -> Complex:
    total = np.ones(len(u), dtype=np.complex128)
    for power, factor in terms(cumulants, order):
        total += factor * (1j * u) ** power
    values: Complex = np.exp(-u * u / 2) * total
    return values


def _series_tail(cumulants: Cumulants, order: int, start: float) -> float:
    """Bound on the integral of the modulus of the series' transform over u, from `start` >= 1 on."""
    from scipy.special import gammaincc

    total = math.exp(-(start**2) / 2)
    for power, factor in terms(cumulants, order):
        half = power / 2
        total += (
            abs(factor) * 2 ** (half - 1) * math.gamma(half) * float(gammaincc(half, start**2 / 2))
        )
    return total
