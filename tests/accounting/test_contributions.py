"""Several examples of one unit in a batch: against the mechanism itself, by integration and simulation."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from decimal import Decimal, localcontext

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, norm

from hf_dp.accounting import _contributions, accountant_named, accountant_or_estimator_named
from hf_dp.accounting._contributions import Contributions, SampledContributions
from hf_dp.accounting._losses import DIRECTIONS, SampledGaussian
from hf_dp.accounting._releases import release_of, unamplified
from hf_dp.accounting.affordable import largest_batch, most_steps
from hf_dp.accounting.tuning import RandomRepeats, guarantee_of_best
from hf_dp.errors import UnsupportedEventError
from hf_dp.events import (
    Gaussian,
    NeighboringRelation,
    PoissonSampled,
    PoissonSampledContributions,
    PrivacyEvent,
    PrivacyUnit,
    SelfComposed,
)

Floats = NDArray[np.float64]

POINTS = [(0.01, 3, 1.0), (0.1, 8, 2.0), (0.001, 32, 0.6), (0.5, 4, 3.0), (0.3, 400, 120.0)]
LEVELS = np.array([0.0, 1e-6, 1e-3, 0.02, 0.1, 0.5, 1.0, 2.0, 5.0])


def step(p: float, most: int, sigma: float) -> PrivacyEvent:
    return PoissonSampledContributions(p, most, Gaussian(sigma))


def epsilon(p: float, most: int, sigma: float, steps: int, delta: float = 1e-6) -> float:
    whole = SelfComposed(step(p, most, sigma), steps)
    return accountant_named("pld").guarantee(whole, delta=delta, unit="user").epsilon


def integrated(
    chances: dict[float, float], sigma: float, level: float, direction: str
) -> tuple[float, float]:
    """delta of a mixture of Gaussians with those centres, by the trapezoidal rule, and its error."""
    centres = np.array(list(chances))
    low, high = min(centres.min(), 0) - 12 * sigma, max(centres.max(), 0) + 12 * sigma
    outputs, width = np.linspace(low, high, 40_001, retstep=True)
    noise = norm.pdf(outputs, 0, sigma)
    mixture = sum(w * norm.pdf(outputs, c, sigma) for c, w in chances.items() if w > 1e-18)
    pair = (mixture, noise) if direction == "remove" else (noise, mixture)
    rest = np.maximum(pair[0] - math.exp(level) * pair[1], 0)
    return float(rest.sum() * width), float(width**2 / sigma**2)


def binomial(p: float, most: int) -> dict[float, float]:
    return {float(k): float(binom.pmf(k, most, p)) for k in range(most + 1)}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("p", "most", "sigma"), POINTS)
def test_contributions_have_the_profile_of_their_mixture(
    p: float, most: int, sigma: float, direction: str
) -> None:
    claimed = SampledContributions(p, most, sigma).tail(LEVELS, direction)  # type: ignore[arg-type]
    for level, found in zip(LEVELS[::2], claimed[::2], strict=True):
        true, error = integrated(binomial(p, most), sigma, float(level), direction)
        # More than 256 numbers of contributions are not told apart, nor are fewer than negligible.
        assert true - error <= found <= true * (1 + 1e-6) + error


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_examples_of_a_user_do_worse_than_equal_large_ones(direction: str) -> None:
    """Every subset of the user's examples, by enumeration, whatever their clipped gradients are."""
    generator = np.random.default_rng(7)
    p, sigma = 0.2, 1.5
    release = SampledContributions(p, 4, sigma)
    for owned in (1, 2, 4, 4, 4):
        gradients = generator.uniform(-1, 1, owned)
        gradients[0] = 1.0
        chances: dict[float, float] = {}
        for drawn in itertools.product((0, 1), repeat=owned):
            centre = round(float(np.dot(drawn, gradients)), 9)
            chance = p ** sum(drawn) * (1 - p) ** (owned - sum(drawn))
            chances[centre] = chances.get(centre, 0.0) + chance
        for level in (0.0, 0.1, 0.5, 1.5):
            claimed = release.tail(np.array([level]), direction)[0]  # type: ignore[arg-type]
            true, error = integrated(chances, sigma, level, direction)
            assert true <= claimed + error


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_contribution_is_a_poisson_sample(direction: str) -> None:
    for p, sigma in [(0.01, 1.0), (0.3, 0.5), (0.9, 5.0)]:
        single = SampledContributions(p, 1, sigma).tail(LEVELS, direction)  # type: ignore[arg-type]
        plain = SampledGaussian(p, sigma).tail(LEVELS, direction)  # type: ignore[arg-type]
        assert single == pytest.approx(plain, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_contributions_that_are_nearly_certain_are_a_gaussian(direction: str) -> None:
    nearly = SampledContributions(1 - 1e-12, 5, 5.0).tail(LEVELS, direction)  # type: ignore[arg-type]
    assert nearly == pytest.approx(SampledGaussian(1.0, 1.0).tail(LEVELS, "remove"), abs=1e-10)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_more_examples_and_more_frequent_ones_cost_more(direction: str) -> None:
    def tails(p: float, most: int) -> Floats:
        return SampledContributions(p, most, 1.3).tail(LEVELS, direction)  # type: ignore[arg-type]

    for most in (1, 2, 3, 7, 20, 60):
        assert (tails(0.05, most) <= tails(0.05, most + 1) * (1 + 1e-12)).all()
        assert (tails(0.05, most) <= tails(0.06, most) * (1 + 1e-12)).all()


@pytest.mark.parametrize(("p", "most", "sigma"), POINTS)
def test_outputs_that_are_found_are_on_the_safe_side(p: float, most: int, sigma: float) -> None:
    """S(x) once more in fifty digits: epsilon there is at most, and at most by 1e-9 below, what was asked."""
    release = SampledContributions(p, most, sigma)
    kinds = release._kinds
    for wanted in (-3.0, 0.0, 0.7, 20.0):
        for side in (-1, +1):
            (output,), _, (found,) = release._outputs(np.array([wanted]), side)
            with localcontext() as context:
                context.prec = 50
                x, variance = Decimal(float(output)), Decimal(sigma) ** 2
                total = Decimal(0)
                for number, chance in zip(kinds.numbers, kinds.chances, strict=True):
                    k = Decimal(float(number))
                    exponent = (2 * x * k - k * k) / (2 * variance)
                    total += Decimal(float(chance)) * exponent.exp()
                excess = side * float(total.ln() - Decimal(wanted))
            assert found
            assert 0 <= excess < 1e-9


@pytest.mark.parametrize(
    ("p", "most"), [(0.01, 3), (1e-6, 5000), (0.2, 500), (0.999, 40), (0.5, 1)]
)
def test_contributions_are_binomial_but_for_what_is_negligible(p: float, most: int) -> None:
    kinds = Contributions.of(p, most)
    assert kinds.absent + kinds.chances.sum() == pytest.approx(1, abs=1e-14)
    assert kinds.left_out < 1e-21
    assert kinds.absent == 0 or kinds.absent == pytest.approx((1 - p) ** most, rel=1e-12)
    above = [kinds.chances[kinds.numbers > k].sum() + kinds.left_out for k in range(most)]
    assert above == pytest.approx(binom.sf(range(most), most, p), rel=1e-9, abs=2e-22)


def test_numbers_that_are_not_told_apart_count_as_the_largest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fine = SampledContributions(0.2, 200, 60.0)
    exact = [fine.tail(LEVELS, direction) for direction in DIRECTIONS]
    Contributions.of.cache_clear()
    monkeypatch.setattr(_contributions, "_MOST_KINDS", 40)
    coarse = SampledContributions(0.2, 200, 60.0)
    assert len(coarse._kinds.numbers) <= 40
    for direction, tails in zip(DIRECTIONS, exact, strict=True):
        assert (coarse.tail(LEVELS, direction) >= tails).all()
    assert coarse.tail(LEVELS, "remove")[0] < exact[0][0] * 1.1
    Contributions.of.cache_clear()


def test_an_output_that_is_not_found_claims_no_privacy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_contributions, "_ROUNDS", 0)
    levels = np.array([0.1, 1.0])
    for direction, limit in zip(DIRECTIONS, (2, 1), strict=True):
        tails = SampledContributions(0.3, 3, 1.0).tail(levels[:limit], direction)
        assert (tails == 1.0).all()


@pytest.mark.parametrize("interval", [1e-2, 1e-4])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("p", "most", "sigma"), POINTS)
def test_a_discretised_loss_is_a_probability(
    p: float, most: int, sigma: float, direction: str, interval: float
) -> None:
    loss = release_of(step(p, most, sigma)).discretised(direction, interval)  # type: ignore[arg-type]
    assert loss.probabilities.sum() + loss.infinity_mass == pytest.approx(1, abs=1e-9)
    assert loss.infinity_mass < 1e-20


def simulated_delta(
    p: float, most: int, sigma: float, steps: int, level: float, direction: str
) -> tuple[float, float]:
    """delta(level) of a run whose user's gradients all agree, and the simulation's standard error."""
    generator = np.random.default_rng()
    losses = np.zeros(RUNS)
    k = np.arange(most + 1)
    weights = binom.pmf(k, most, p)
    for _ in range(steps):
        outputs = generator.normal(0.0, sigma, RUNS)
        if direction == "remove":
            outputs += generator.binomial(most, p, RUNS)
        ratio = np.exp((2 * outputs[:, None] * k - k**2) / (2 * sigma**2)) @ weights
        losses += np.log(ratio) if direction == "remove" else -np.log(ratio)
    values = np.maximum(-np.expm1(level - losses), 0)
    return float(values.mean()), float(values.std() / math.sqrt(RUNS))


RUNS = 100_000


@pytest.mark.statistical
def test_simulated_runs_agree_with_the_bound_in_both_directions() -> None:
    """Each comparison fails by chance once in 3 million times (five standard errors)."""
    p, most, sigma, steps, delta = 0.1, 4, 3.0, 20, 0.01
    claimed = epsilon(p, most, sigma, steps, delta)
    removed, error = simulated_delta(p, most, sigma, steps, claimed, "remove")
    assert abs(removed - delta) < 5 * error + 1e-3 * delta
    added, error = simulated_delta(p, most, sigma, steps, claimed, "add")
    assert added < delta + 5 * error
    # The planted faults: a user with one example less, and the direction "add" alone.
    assert (
        simulated_delta(p, most, sigma, steps, epsilon(p, most - 1, sigma, steps, delta), "remove")[
            0
        ]
        > delta * 1.3
    )
    assert added < delta * 0.8


def test_removing_a_user_costs_more_than_adding_one(monkeypatch: pytest.MonkeyPatch) -> None:
    both = epsilon(0.0064, 3, 1.0, 782)
    assert both == pytest.approx(3.93696, rel=5e-4)
    monkeypatch.setattr("hf_dp.accounting.pld.DIRECTIONS", ("add",))
    assert epsilon(0.0064, 3, 1.0, 782) == pytest.approx(2.76717, rel=5e-4)


@dataclass(frozen=True)
class Run:
    """A plan of a user's examples that needs no torch."""

    sampling_probability: float
    max_contributions: int
    num_steps: int
    noise_multiplier: float = 1.0
    relation: NeighboringRelation = NeighboringRelation.REPLACE_SPECIAL
    unit: PrivacyUnit = "user"

    def event(self) -> PrivacyEvent:
        one = step(self.sampling_probability, self.max_contributions, self.noise_multiplier)
        return SelfComposed(one, self.num_steps)

    def with_noise_multiplier(self, noise_multiplier: float) -> Run:
        return dataclasses.replace(self, noise_multiplier=noise_multiplier)


def test_noise_is_calibrated_to_a_target() -> None:
    pld = accountant_named("pld")
    plan = pld.calibrate(Run(0.01, 8, 1000), target_epsilon=4.0, target_delta=1e-6)
    assert plan.noise_multiplier == pytest.approx(3.1657, rel=5e-4)
    assert pld.guarantee(plan.event(), delta=1e-6).epsilon <= 4.0
    less = plan.with_noise_multiplier(plan.noise_multiplier * 0.999)
    assert pld.guarantee(less.event(), delta=1e-6).epsilon > 4.0


def test_a_curve_never_decreases_and_is_never_below_the_guarantee() -> None:
    curve = accountant_named("pld").curve(step(0.01, 8, 3.2), num_steps=500, delta=1e-6)
    values = [curve.epsilon(count) for count in range(501)]
    assert values[0] == 0
    assert values == sorted(values)
    for count in (1, 10, 170, 500):
        exact = epsilon(0.01, 8, 3.2, count)
        assert exact * (1 - 1e-9) <= curve.epsilon(count) <= exact * 1.08 + 1e-12
    assert curve.epsilon(600) >= epsilon(0.01, 8, 3.2, 600)


def test_steps_and_batches_are_afforded() -> None:
    pld = accountant_named("pld")
    steps = most_steps(pld, step(0.01, 8, 3.2), target_epsilon=4.0, target_delta=1e-6)
    assert epsilon(0.01, 8, 3.2, steps) <= 4.0 < epsilon(0.01, 8, 3.2, steps + 1 + steps // 1000)
    batch = largest_batch(
        pld,
        lambda batch: SelfComposed(step(batch / 10_000, 8, 3.2), 1000),
        num_examples=10_000,
        target_epsilon=4.0,
        target_delta=1e-6,
    )
    assert epsilon(batch / 1e4, 8, 3.2, 1000) <= 4.0 < epsilon(batch * 1.002 / 1e4, 8, 3.2, 1000)


def test_without_the_sample_all_examples_are_there() -> None:
    leaves = {step(0.01, 4, 2.0): 3, Gaussian(0.5): 1, PoissonSampled(0.1, Gaussian(1.0)): 2}
    assert unamplified(leaves) == {Gaussian(0.5): 4, PoissonSampled(0.1, Gaussian(1.0)): 2}


def test_epsilon_falls_with_the_noise_from_useless_to_nothing() -> None:
    """Where losses of hundreds are likely the bound is that of all examples, always drawn."""
    found = []
    for noise in (0.01, 0.03, 0.1, 0.4, 1.0, 5.0, 50.0, 1e6):
        found.append(epsilon(0.01, 6, noise, 3, 1e-5))
        plain = SelfComposed(Gaussian(noise / 6), 3)
        assert found[-1] <= accountant_named("rdp").guarantee(plain, delta=1e-5).epsilon * 1.001
    assert all(math.isfinite(value) for value in found)
    assert found == sorted(found, reverse=True)
    assert found[0] > 1000
    assert found[-1] == 0


@pytest.mark.parametrize("accountant", ["rdp", "edgeworth", "gdp"])
def test_accountants_without_a_proof_for_mixtures_refuse_and_name_one_that_has_it(
    accountant: str,
) -> None:
    refusing = accountant_or_estimator_named(accountant)
    run = SelfComposed(step(0.01, 4, 1.0), 100)
    assert not refusing.can_cost(run)
    with pytest.raises(
        UnsupportedEventError, match=r"PoissonSampledContributions.*can cost it: pld"
    ):
        refusing.guarantee(run, delta=1e-6)


def test_the_price_of_selection_is_refused() -> None:
    run = SelfComposed(step(0.01, 4, 1.0), 100)
    with pytest.raises(
        UnsupportedEventError, match=r"PoissonSampledContributions.*can cost it: pld"
    ):
        guarantee_of_best(run, RandomRepeats(10), delta=1e-6)


def test_replacing_one_user_is_refused() -> None:
    with pytest.raises(UnsupportedEventError, match=r"relation='replace_one'"):
        accountant_named("pld").guarantee(
            step(0.01, 4, 1.0), delta=1e-6, relation=NeighboringRelation.REPLACE_ONE
        )
