"""Batches of fixed size and cut batches: against the mechanisms themselves, and against other programs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld as theirs
from numpy.typing import NDArray
from scipy.fft import irfft, rfft
from scipy.optimize import brentq
from scipy.stats import binom, norm

from hf_dp.accounting import accountant_named
from hf_dp.accounting._losses import DIRECTIONS, SampledGaussian
from hf_dp.accounting._profiles import SampledSwap, TruncatedSample
from hf_dp.accounting._releases import release_of, unamplified
from hf_dp.errors import UnsupportedEventError
from hf_dp.events import (
    Gaussian,
    NeighboringRelation,
    PoissonSampled,
    PrivacyEvent,
    SampledWithoutReplacement,
    SelfComposed,
    TruncatedPoissonSampled,
)

Floats = NDArray[np.float64]
SPECIAL, ONE = NeighboringRelation.REPLACE_SPECIAL, NeighboringRelation.REPLACE_ONE
OUTPUTS = np.linspace(-40, 40, 20_001)
QUADRATURE = 2e-6  # what the trapezoidal rule on it may be off


def epsilon(event: PrivacyEvent, count: int, delta: float = 1e-6) -> float:
    relation = ONE if isinstance(event, SampledWithoutReplacement) else SPECIAL
    whole = SelfComposed(event, count)
    return accountant_named("pld").guarantee(whole, delta=delta, relation=relation).epsilon


def hockey_stick(larger: Floats, smaller: Floats, level: float) -> float:
    """delta of two densities on `OUTPUTS`, by the trapezoidal rule."""
    rest = np.maximum(larger - math.exp(level) * smaller, 0)
    return float(np.sum(rest) * (OUTPUTS[1] - OUTPUTS[0]))


def mixed(parts: Iterator[tuple[float, float]], sigma: float) -> Floats:
    density: Floats = sum(
        (chance * norm.pdf(OUTPUTS, centre, sigma) for chance, centre in parts),
        np.zeros_like(OUTPUTS),
    )
    return density


@pytest.mark.parametrize(("q", "sigma"), [(0.1, 1.0), (0.01, 2.0), (0.5, 4.0), (1.0, 1.0)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_swap_in_a_full_batch_passes_its_profile(q: float, sigma: float, direction: str) -> None:
    """All others contribute `rest`, so the batch without the unit stands `rest` above an empty place."""
    swap = SampledSwap(q, sigma)
    for level in (0.0, 0.05, 0.3, 1.0, 3.0):
        claimed = swap.tail(np.array([level]), direction)[0]  # type: ignore[arg-type]
        for mine, other, rest in [(1, -1, -1), (1, -1, 0), (1, -1, 1), (1, 0, -1), (0, 1, 1)]:
            pair = [
                mixed(iter([(1 - q, 0.0), (q, value - rest)]), sigma) for value in (mine, other)
            ]
            larger, smaller = pair if direction == "remove" else pair[::-1]
            assert hockey_stick(larger, smaller, level) <= claimed + QUADRATURE


def test_the_profile_of_a_swap_is_attained() -> None:
    """The unit and its replacement agree with what is left out, at opposite ends of the ball."""
    q, sigma = 0.1, 1.0
    with_unit, without = (mixed(iter([(1 - q, 0.0), (q, c)]), sigma) for c in (2.0, 0.0))
    for level in (0.1, 1.0):
        claimed = SampledSwap(q, sigma).tail(np.array([level]), "remove")[0]
        assert hockey_stick(with_unit, without, level) == pytest.approx(claimed, rel=1e-4)


def cut_mixture(
    units: int, q: float, cap: int, rest: float, mine: float
) -> Iterator[tuple[float, float]]:
    """Centres of the sum over a cut Poisson sample, all others contributing `rest`, with their chances."""
    for others in range(units):
        chance = float(binom.pmf(others, units - 1, q))
        kept = min(1.0, cap / (others + 1))
        yield chance * (1 - q * kept), rest * min(others, cap)
        # The unit is kept, and takes a place if the others had filled it.
        yield chance * q * kept, mine + rest * min(others, cap - 1)


@pytest.mark.parametrize("rest", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("sigma", [1.0, 3.0])
@pytest.mark.parametrize("cap", [2, 3, 5])
def test_no_cut_sample_passes_its_profile(cap: int, sigma: float, rest: float) -> None:
    """The mechanism itself, by enumeration: the observer is not told how many were drawn."""
    units, q = 6, 0.4
    release = TruncatedSample.of(units, q, cap, sigma)
    unit, none = (mixed(cut_mixture(units, q, cap, rest, mine), sigma) for mine in (1.0, 0.0))
    for level in (0.0, 0.1, 0.5, 1.5):
        for direction, pair in (("remove", (unit, none)), ("add", (none, unit))):
            claimed = release.tail(np.array([level]), direction)[0]  # type: ignore[arg-type]
            assert hockey_stick(*pair, level) <= claimed + QUADRATURE


@pytest.mark.parametrize("present", [False, True], ids=["absent", "blank"])
@pytest.mark.parametrize("seed", range(4))
def test_no_cut_sample_of_unlike_units_passes_its_profile(seed: int, present: bool) -> None:
    """Every set of the others by enumeration; the neighbour lacks the unit, or has a blank in its place."""
    others = np.random.default_rng(seed).choice([-1.0, -0.4, 0.3, 1.0], size=5)
    q, cap, sigma = 0.5, 2, 1.5
    release = TruncatedSample.of(6, q, cap, sigma)

    def density(mine: float | None) -> Floats:
        values = others if mine is None else np.append(others, mine)
        chances: dict[float, float] = {}
        for size in range(len(values) + 1):
            chance = q**size * (1 - q) ** (len(values) - size)
            for drawn in itertools.combinations(range(len(values)), size):
                kept = list(itertools.combinations(drawn, min(cap, size)))
                for places in kept:
                    centre = round(sum(float(values[place]) for place in places), 9)
                    chances[centre] = chances.get(centre, 0.0) + chance / len(kept)
        return mixed(iter([(chance, centre) for centre, chance in chances.items()]), sigma)

    none = density(0.0 if present else None)
    for mine in (-1.0, 1.0):
        unit = density(mine)
        for level in (0.0, 0.1, 0.5, 1.0):
            for direction, pair in (("remove", (unit, none)), ("add", (none, unit))):
                claimed = release.tail(np.array([level]), direction)[0]  # type: ignore[arg-type]
                assert hockey_stick(*pair, level) <= claimed + QUADRATURE


def test_a_cut_that_is_left_out_of_the_account_is_seen() -> None:
    """The planted fault: the same mechanism accounted for as plain Poisson sampling."""
    unit, none = (mixed(cut_mixture(40, 0.3, 5, -1.0, mine), 1.0) for mine in (1.0, 0.0))
    poisson = SampledGaussian(0.3, 1.0).tail(np.array([2.5]), "remove")[0]
    assert hockey_stick(unit, none, 2.5) > 1.5 * poisson


@pytest.mark.parametrize("interval", [1e-2, 1e-4])
@pytest.mark.parametrize(
    "event",
    [
        SampledWithoutReplacement(10_000, 100, Gaussian(1.0)),
        TruncatedPoissonSampled(10_000, 0.01, 110, Gaussian(1.0)),
        TruncatedPoissonSampled(10_000, 0.01, 150, Gaussian(0.5)),
    ],
    ids=lambda event: str(event)[:40],
)
def test_a_discretised_loss_is_a_probability(event: PrivacyEvent, interval: float) -> None:
    """Were the profile not convex, clipping its second differences would add to the total."""
    for direction in DIRECTIONS:
        loss = release_of(event).discretised(direction, interval)
        assert loss.probabilities.sum() + loss.infinity_mass == pytest.approx(1, abs=1e-9)


def composed_by_transform(release: SampledSwap, count: int, delta: float) -> float:
    """Epsilon by an independent route: the loss's distribution function, centred cells, one transform."""
    cells, width = 1 << 19, 2e-4
    losses = (np.arange(cells) - cells // 2) * width

    def survival(level: Floats) -> Floats:
        """Chance of a loss above `level`: delta - its derivative, from the two normal tails."""
        q, s = release.sampling_probability, release.noise_multiplier
        above = np.maximum(level, 0.0)
        output = 1 + s**2 / 2 * np.log1p(np.expm1(np.minimum(above, 60)) / q)
        positive = (1 - q) * norm.sf(output / s) + q * norm.sf((output - 2) / s)
        below = np.maximum(-level, 0.0)
        mirrored = 1 + s**2 / 2 * np.log1p(np.expm1(np.minimum(below, 60)) / q)
        negative = norm.sf(mirrored / s)
        chances: Floats = np.where(level >= 0, positive, 1 - negative)
        return chances

    chances = -np.diff(survival(np.append(losses, losses[-1] + width) - width / 2))
    spectrum = rfft(np.roll(chances, -(cells // 2))) ** count
    total = np.roll(irfft(spectrum, cells), cells // 2)

    def excess(level: float) -> float:
        return float(np.dot(np.maximum(-np.expm1(level - losses), 0.0), total)) - delta

    return float(brentq(excess, 0.0, 40.0, xtol=1e-5))


@pytest.mark.parametrize(
    ("q", "sigma", "count", "delta"), [(0.01, 2.0, 1000, 1e-6), (0.1, 4.0, 100, 1e-5)]
)
def test_fixed_size_agrees_with_an_independent_transform(
    q: float, sigma: float, count: int, delta: float
) -> None:
    independent = composed_by_transform(SampledSwap(q, sigma), count, delta)
    event = SampledWithoutReplacement(1000, round(1000 * q), Gaussian(sigma))
    assert epsilon(event, count, delta) == pytest.approx(independent, rel=2e-3)


@pytest.mark.parametrize(("sigma", "published"), [(1.0, 16.96), (2.0, 2.513), (4.0, 0.829)])
@pytest.mark.reference
def test_fixed_size_has_the_published_epsilon(sigma: float, published: float) -> None:
    """Bounds of an independent program for q = 0.01, 1000 steps, on a grid of 1e-3."""
    found = epsilon(SampledWithoutReplacement(10_000, 100, Gaussian(sigma)), 1000)
    assert published * 0.997 <= found <= published * 1.0005


@pytest.mark.reference
def test_fixed_size_is_far_from_poisson_and_from_an_accountant_that_does_not_double() -> None:
    """Realisable lower bounds are 15.48 and 2.13; Poisson gives 2.13 and 0.73, no doubling gives 4.02."""
    event = SampledWithoutReplacement(10_000, 100, Gaussian(1.0))
    poisson = epsilon(PoissonSampled(0.01, Gaussian(1.0)), 1000)
    assert poisson == pytest.approx(2.13, abs=1e-2)
    assert epsilon(event, 1000) > 15.48
    undoubled = dp_accounting.rdp.RdpAccountant(neighboring_relation=ONE_THERE)
    sampled = dp_accounting.SampledWithoutReplacementDpEvent(
        10_000, 100, dp_accounting.GaussianDpEvent(1.0)
    )
    undoubled.compose(dp_accounting.SelfComposedDpEvent(sampled, 1000))
    assert undoubled.get_epsilon(1e-6) == pytest.approx(4.02, abs=1e-2)
    other = SampledWithoutReplacement(10_000, 100, Gaussian(2.0))
    assert epsilon(other, 1000) > 2.13 > epsilon(PoissonSampled(0.01, Gaussian(2.0)), 1000)


ONE_THERE = dp_accounting.NeighboringRelation.REPLACE_ONE
SPECIAL_THERE = dp_accounting.NeighboringRelation.REPLACE_SPECIAL


@pytest.mark.parametrize(
    ("cap", "published"), [(110, 9.21), (120, 6.52), (130, 4.92), (150, 2.139), (200, 2.1253)]
)
@pytest.mark.reference
def test_a_cap_costs_no_more_than_the_published_bound(cap: int, published: float) -> None:
    """dp-accounting's bound, which replaces the unit by its opposite: ours is at most 2% below it."""
    found = epsilon(TruncatedPoissonSampled(10_000, 0.01, cap, Gaussian(1.0)), 1000)
    assert published * 0.98 <= found <= published * 1.0001
    event = dp_accounting.TruncatedSubsampledGaussianDpEvent(10_000, 0.01, cap, 1.0)
    other = theirs.PLDAccountant(SPECIAL_THERE, value_discretization_interval=1e-3)
    other.compose(dp_accounting.SelfComposedDpEvent(event, 1000))
    assert other.get_epsilon(1e-6) == pytest.approx(published, rel=2e-3)
    assert found <= other.get_epsilon(1e-6)


def test_a_cap_that_is_never_reached_costs_nothing() -> None:
    poisson = epsilon(PoissonSampled(0.01, Gaussian(1.0)), 500)
    for cap in (250, 10_000):
        capped = epsilon(TruncatedPoissonSampled(10_000, 0.01, cap, Gaussian(1.0)), 500)
        assert capped == pytest.approx(poisson, rel=1e-6)


def test_a_batch_of_all_is_a_swap_in_the_whole_data() -> None:
    """Then nothing is sampled: the Gaussian mechanism at twice the sensitivity."""
    everybody = epsilon(SampledWithoutReplacement(50, 50, Gaussian(4.0)), 3)
    assert everybody == pytest.approx(epsilon(Gaussian(2.0), 3), rel=1e-6)


@pytest.mark.parametrize(
    "event",
    [
        SampledWithoutReplacement(100, 10, Gaussian(2.0)),
        TruncatedPoissonSampled(100, 0.1, 12, Gaussian(2.0)),
    ],
    ids=lambda event: type(event).__name__,
)
def test_without_sampling_nothing_is_more_private(event: PrivacyEvent) -> None:
    [bound] = unamplified({event: 3})
    assert bound == Gaussian(1.0)
    assert epsilon(event, 3) < epsilon(bound, 3)


def test_fixed_size_cannot_be_accounted_as_poisson() -> None:
    event = SampledWithoutReplacement(100, 10, Gaussian(2.0))
    for name in ("pld", "rdp"):
        for relation in (NeighboringRelation.ADD_OR_REMOVE_ONE, SPECIAL):
            with pytest.raises(UnsupportedEventError, match="expected"):
                accountant_named(name).guarantee(event, delta=1e-5, relation=relation)
    with pytest.raises(UnsupportedEventError, match="Accountants that can cost it: pld"):
        accountant_named("rdp").guarantee(event, delta=1e-5, relation=ONE)


def test_what_has_no_loss_is_refused() -> None:
    with pytest.raises(TypeError, match="ask `has_loss` first"):
        release_of(Gaussian(1.0))
