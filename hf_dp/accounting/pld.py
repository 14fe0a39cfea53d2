"""Accounting by privacy loss distributions: within 0.01% of the exact epsilon, from above."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_dp.accounting._composition import (
    chernoff_window,
    composed_epsilon,
    log_moments,
    rounding_slack,
)
from hf_dp.accounting._leaves import is_laplace
from hf_dp.accounting._losses import (
    DIRECTIONS,
    TILTS,
    Direction,
    DiscreteLoss,
    SampledGaussian,
)
from hf_dp.accounting._releases import Release, has_loss, release_of, unamplified
from hf_dp.accounting.base import Accountant, Leaves, StepBounds, gaussian_parameters, is_gaussian
from hf_dp.accounting.rdp import RDPAccountant, epsilon_bounds
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import NeighboringRelation, PrivacyEvent

MIN_DELTA = 1e-12

_COARSE = 1e-3
_HOPELESS = 500.0
_ROUGH_POINTS = 1000
_QUICK_POINTS = 30_000
_MAX_POINTS = 250_000
_MAX_COMPOSED_POINTS = 500_000
_MAX_WIDE_POINTS = 2_000_000
_CURVE_POINTS = 80

Releases = Mapping[Release, int]
Grid = Callable[[Release, Direction, float], DiscreteLoss]


class PLDAccountant(Accountant):
    """Composes discretised privacy losses in both directions and takes the larger epsilon.

    The grid's error in epsilon grows with the square of its interval, and is at most about
    5 * releases * interval^2 (measured). Cheap passes on coarse grids tell the size of both; the last
    pass is on a grid for an error of 3e-5 of epsilon. Where losses of hundreds are likely nothing is
    protected, and the Rényi bound is returned instead.

    Guarantees:
        * An upper bound whatever the grid (test: test_every_interval_gives_an_upper_bound), rounding
          in floating point included (test: test_rounding_never_makes_epsilon_too_small).

    Source:
        Composition and conversion by dp-accounting; Doroshenko et al. (2022) for the grid.
    """

    name = "pld"
    relations = frozenset(NeighboringRelation)

    def supports(self, leaf: PrivacyEvent) -> bool:
        """Gaussian noise with any sampler of hf_dp, Laplace noise with those that accountant 'rdp' knows."""
        return is_gaussian(leaf) or has_loss(leaf) or RDPAccountant().supports(leaf)

    def _epsilon(self, leaves: Leaves, delta: float) -> float:
        bound = _without_losses(leaves, delta)
        return min(bound, self._composed(leaves, delta)) if _have_losses(leaves) else bound

    def _composed(self, leaves: Leaves, delta: float) -> float:
        releases = _releases(leaves)
        usable = _usable_delta(delta, releases, leaves)
        scale = Scale.of(releases)
        if scale.is_hopeless:
            return float(epsilon_bounds(unamplified(leaves), delta, 1, 1)[0])
        coarse = _epsilon_on_grid(releases, usable, scale.coarsest)
        interval = scale.quick_interval(coarse, accuracy=1e-3)
        near = _epsilon_on_grid(releases, usable, interval)
        error = _epsilon_on_grid(releases, usable, 2 * interval) - near
        error_at_one = error / (3 * interval**2)
        if any(is_laplace(leaf) for leaf in leaves):
            # Losses with atoms fit some grids by chance, which says nothing of the next.
            error_at_one = max(error_at_one, float(scale.num_releases))
        interval = scale.fine_interval(near, error_at_one)
        return _certified_epsilon(releases, usable, interval)

    def _quick_epsilon(self, leaves: Leaves, delta: float, near: float) -> float:
        bound = _without_losses(leaves, delta)
        if not _have_losses(leaves):
            return bound
        return min(bound, self._quickly_composed(leaves, delta, near))

    def _quickly_composed(self, leaves: Leaves, delta: float, near: float) -> float:
        releases = _releases(leaves)
        usable = _usable_delta(delta, releases, leaves)
        scale = Scale.of(releases)
        if scale.is_hopeless:
            return float(epsilon_bounds(unamplified(leaves), delta, 1, 1)[0])
        return _epsilon_on_grid(releases, usable, scale.quick_interval(near, accuracy=1e-3))

    def _bounds(self, leaves: Leaves, delta: float, final_epsilon: float) -> StepBounds:
        """The lesser of the Rényi bound, for every count, and a staircase through some exact points."""

        def bounds(first: int, last: int) -> NDArray[np.float64]:
            by_moments = epsilon_bounds(unamplified(leaves), delta, first, last)
            if not _have_losses(leaves):
                return by_moments
            return np.minimum(by_moments, stairs(first, last))

        def stairs(first: int, last: int) -> NDArray[np.float64]:
            scale = Scale.of(_releases(leaves, last))
            if scale.is_hopeless:
                return np.full(last - first + 1, np.inf)
            interval = scale.quick_interval(final_epsilon, accuracy=2e-3)
            grid: Grid = functools.cache(_discretised)
            counts = np.unique(np.geomspace(first, last, _CURVE_POINTS).round().astype(int))
            heights = np.array([height(int(count), interval, grid) for count in counts])
            # Epsilon grows with the count, so a count's bound holds for all counts below it.
            rounded_up = np.searchsorted(counts, np.arange(first, last + 1))
            return heights[rounded_up]

        def height(count: int, interval: float, grid: Grid) -> float:
            releases = _releases(leaves, count)
            slack = rounding_slack(sum(releases.values()))
            return _epsilon_on_grid(releases, max(delta - slack, 0.0), interval, grid)

        return bounds


def _have_losses(leaves: Leaves) -> bool:
    """Whether the losses of all releases are known, so that they can be composed."""
    return all(is_gaussian(leaf) or has_loss(leaf) for leaf in leaves)


def _without_losses(leaves: Leaves, delta: float) -> float:
    """The bound of accountant 'rdp', which Laplace noise may have alone, and is sometimes the lesser."""
    if not any(is_laplace(leaf) for leaf in leaves):
        return math.inf
    return float(epsilon_bounds(unamplified(leaves), delta, 1, 1)[0])


def merged_releases(leaves: Leaves, num_steps: int = 1) -> dict[SampledGaussian, int]:
    """What that many steps compose numerically: all unsampled Gaussians are one, exactly.

    Args:
        leaves: Releases of one step, all Gaussian over a Poisson sample or over all units.
        num_steps: > 0.
    """
    releases: dict[SampledGaussian, int] = {}
    precision = 0.0
    for leaf, count in leaves.items():
        sampling_probability, noise_multiplier = gaussian_parameters(leaf)
        if sampling_probability == 1:
            precision += num_steps * count / noise_multiplier**2
        else:
            releases[SampledGaussian(sampling_probability, noise_multiplier)] = num_steps * count
    if precision > 0:
        releases[SampledGaussian(1.0, 1 / math.sqrt(precision))] = 1
    return releases


def _releases(leaves: Leaves, num_steps: int = 1) -> dict[Release, int]:
    """What that many steps compose numerically, whatever the samplers."""
    releases: dict[Release, int] = {}
    gaussian = {leaf: count for leaf, count in leaves.items() if is_gaussian(leaf)}
    for merged, times in merged_releases(gaussian, num_steps).items():
        releases[merged] = times
    for leaf, count in leaves.items():
        if leaf not in gaussian:
            release = release_of(leaf)
            releases[release] = releases.get(release, 0) + num_steps * count
    return releases


def _usable_delta(delta: float, releases: Releases, leaves: Leaves) -> float:
    """`delta` less what rounding can hide; refused where not enough is left."""
    slack = rounding_slack(sum(releases.values()))
    if delta < MIN_DELTA or slack > delta / 2:
        least = max(MIN_DELTA, 2 * slack)
        limitless = all(map(RDPAccountant().supports, leaves))
        raise ConfigurationError(
            explain(
                "PLDAccountant.delta",
                delta,
                f"at least {least:.1e} for this number of releases",
                "Rounding in its Fourier transforms could hide a smaller delta.",
                "Use the accountant 'rdp', which has no such limit, or a larger delta."
                if limitless
                else "Use a larger delta: the accountant 'rdp', which has no such limit, cannot cost "
                "these releases.",
            )
        )
    return delta - slack


@dataclass(frozen=True)
class Scale:
    """How large losses are, and with it which grids fit in memory and time.

    Attributes:
        num_releases: Releases that are composed numerically.
        width: Range of the loss of one release, in nats.
        window: Size of the composed loss, but for a negligible chance.
        wide_window: The range that dp-accounting gives its transform; its bound is looser where one
            release loses little.
    """

    num_releases: int
    width: float
    window: float
    wide_window: float

    @classmethod
    def of(cls, releases: Releases) -> Scale:
        """Measure the losses on a grid too rough for anything else."""
        ranges = [release.loss_range() for release in releases]
        width = max(high - low for low, high in ranges)
        num_releases = sum(releases.values())
        if width > _HOPELESS:
            return cls(num_releases, width, math.inf, math.inf)
        wide = np.array([-20.0, -5.0, -1.0, 1.0, 5.0, 20.0]) / width
        windows, wide_windows = [], []
        for parts in _both_directions(releases, width / _ROUGH_POINTS).values():
            low, high = chernoff_window(log_moments(parts), TILTS)
            windows.append(max(high, -low))
            ends = [chernoff_window(n * loss.log_moments_at(wide), wide) for loss, n in parts]
            wide_windows.append(sum(high - low for low, high in ends))
        return cls(num_releases, width, max(windows), max(wide_windows))

    @property
    def is_hopeless(self) -> bool:
        """Whether losses are so large that nothing is protected, and the Rényi bound says enough."""
        return self.window > _HOPELESS

    @property
    def coarsest(self) -> float:
        """The interval of the first pass, before anything is known about epsilon."""
        return max(_COARSE, self.width / _QUICK_POINTS, self.window / _MAX_COMPOSED_POINTS)

    def quick_interval(self, epsilon: float, accuracy: float) -> float:
        """An interval for this relative accuracy near `epsilon`, or the finest one that is quick."""
        if not 0 < epsilon < math.inf:
            return self.coarsest
        least = max(self.width / _QUICK_POINTS, self.window / _MAX_COMPOSED_POINTS)
        wanted = math.sqrt(accuracy * epsilon / (5 * self.num_releases))
        return max(least, min(_COARSE, wanted))

    def fine_interval(self, epsilon: float, error_at_one: float) -> float:
        """The interval of the last pass: for 3e-5 of `epsilon`, or the finest feasible one.

        Args:
            epsilon: About what will come out.
            error_at_one: The grid's error divided by the square of its interval.
        """
        if not 0 < epsilon < math.inf:
            return self.coarsest
        least = max(self.width / _MAX_POINTS, self.wide_window / _MAX_WIDE_POINTS)
        wanted = math.sqrt(3e-5 * epsilon / max(error_at_one, 1e-9))
        return max(least, min(_COARSE, wanted))


def _discretised(release: Release, direction: Direction, interval: float) -> DiscreteLoss:
    return release.discretised(direction, interval)


def _both_directions(
    releases: Releases, interval: float, grid: Grid = _discretised
) -> dict[Direction, list[tuple[DiscreteLoss, int]]]:
    """Both directions of all releases; one suffices where they are alike."""
    symmetric = all(release.is_symmetric for release in releases)
    return {
        direction: [(grid(release, direction, interval), n) for release, n in releases.items()]
        for direction in (DIRECTIONS[:1] if symmetric else DIRECTIONS)
    }


def _epsilon_on_grid(
    releases: Releases, delta: float, interval: float, grid: Grid = _discretised
) -> float:
    losses = _both_directions(releases, interval, grid)
    return max(composed_epsilon(parts, delta) for parts in losses.values())


def _certified_epsilon(releases: Releases, delta: float, interval: float) -> float:
    """Epsilon on a grid, composed and converted by dp-accounting."""
    from dp_accounting.pld import pld_pmf
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    def distribution(parts: list[tuple[DiscreteLoss, int]]) -> PrivacyLossDistribution:
        total: PrivacyLossDistribution | None = None
        for loss, count in parts:
            pmf = pld_pmf.DensePLDPmf(
                interval, loss.lowest, loss.probabilities, loss.infinity_mass, True
            )
            composed = PrivacyLossDistribution(pmf if count == 1 else pmf.self_compose(count))
            total = composed if total is None else total.compose(composed)
        return total

    epsilons = [
        distribution(parts).get_epsilon_for_delta(delta)
        for parts in _both_directions(releases, interval).values()
    ]
    return float(max(epsilons))
