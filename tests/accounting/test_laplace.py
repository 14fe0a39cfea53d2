"""Laplace noise of fixed scale: dominating pairs, both directions, every dimension and norm."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, LaplacePrivacyLoss
from mixture_laws import epsilon, run_of

from hf_dp.accounting import PLDAccountant, RDPAccountant, accountant_named
from hf_dp.accounting._laplace import FixedScale, SampledNoise, laplace_loss, pure_epsilon
from hf_dp.accounting._leaves import has_laplace_bound, is_laplace
from hf_dp.accounting._losses import DIRECTIONS, Direction, SampledGaussian, amplified
from hf_dp.accounting._releases import has_loss, release_of
from hf_dp.accounting.group import group_guarantee
from hf_dp.accounting.tuning import RandomRepeats, guarantee_of_best
from hf_dp.errors import UnsupportedEventError
from hf_dp.events import (
    BallsInBins,
    Composed,
    Gaussian,
    Laplace,
    NeighboringRelation,
    Norm,
    PoissonSampled,
    PoissonSampledContributions,
    PrivacyEvent,
    SampledWithoutReplacement,
    SelfComposed,
    Shuffled,
    TruncatedPoissonSampled,
)
from hf_dp.noise import LaplaceNoise

SPECIAL = NeighboringRelation.REPLACE_SPECIAL


def laplace(b: float, norm: Norm = "l1", dimension: int | None = None) -> Laplace:
    """By scale rather than by standard deviation."""
    return Laplace(b * math.sqrt(2), norm, dimension)


@pytest.mark.reference
@pytest.mark.parametrize("b", [0.3, 1.0, 20.0])
@pytest.mark.parametrize("probability", [1e-3, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_profiles_agree_with_dp_accounting(
    b: float, probability: float, direction: Direction
) -> None:
    adjacency = AdjacencyType.REMOVE if direction == "remove" else AdjacencyType.ADD
    theirs = LaplacePrivacyLoss(b, sampling_prob=probability, adjacency_type=adjacency)
    loss = laplace_loss(PoissonSampled(probability, laplace(b)) if probability < 1 else laplace(b))
    epsilons = np.concatenate(([0.0], np.geomspace(1e-4, 1.2 / b, 30)))
    expected = [theirs.get_delta_for_epsilon(one) for one in epsilons]
    np.testing.assert_allclose(loss.tail(epsilons, direction), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("b", "probability", "num_steps", "delta"),
    [(1.0, 0.1, 100, 1e-5), (2.0, 0.05, 200, 1e-8), (2.0, 1.0, 10, 1e-5), (5.0, 0.02, 2000, 1e-6)],
)
def test_epsilon_agrees_with_dp_accounting(
    b: float, probability: float, num_steps: int, delta: float
) -> None:
    step = privacy_loss_distribution.from_laplace_mechanism(
        b, sampling_prob=probability, value_discretization_interval=2e-4
    )
    theirs = step.self_compose(num_steps).get_epsilon_for_delta(delta)
    found = epsilon(SelfComposed(PoissonSampled(probability, laplace(b)), num_steps), delta)
    assert theirs * (1 - 2e-4) <= found <= theirs * (1 + 1e-4)


def two_coordinates(inverse_scale: float, share: float, points: int = 700) -> Callable[..., float]:
    """The hockey-stick of two coordinates that move by parts of `inverse_scale`, by integration.

    Cells' ends are where a density has a kink, so the middle rule converges fast.
    """

    def coordinate(shift: float) -> tuple[np.ndarray, np.ndarray]:
        # The loss is constant outside [0, shift], linear in between.
        edges = np.linspace(0.0, shift, points + 1)
        middles = (edges[1:] + edges[:-1]) / 2
        chances = np.concatenate(
            ([0.5], np.exp(-middles) * np.diff(edges) / 2, [math.exp(-shift) / 2])
        )
        losses = np.concatenate(([-shift], 2 * middles - shift, [shift]))
        return chances / chances.sum(), losses

    (p, first), (r, second) = (coordinate(part * inverse_scale) for part in (share, 1 - share))
    losses, chances = (first[:, None] + second).ravel(), np.outer(p, r).ravel()

    def delta(level: float, sampling_probability: float = 1.0) -> float:
        ratio = 1 + sampling_probability * np.expm1(losses)
        return float(chances @ np.maximum(ratio - math.exp(level), 0.0))

    return delta


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("inverse_scale", [0.2, 1.0, 3.0])
def test_no_spread_over_two_coordinates_is_worse(inverse_scale: float, share: float) -> None:
    loss = SampledNoise(1.0, FixedScale(inverse_scale))
    sampled = SampledNoise(0.3, FixedScale(inverse_scale))
    spread = two_coordinates(inverse_scale, share)
    for level in np.linspace(0.0, inverse_scale, 9):
        at = np.array([level])
        assert spread(level) <= loss.tail(at, "remove")[0] + 1e-6
        assert spread(level, 0.3) <= sampled.tail(at, "remove")[0] + 1e-6


def test_a_pair_that_moved_by_half_would_be_seen_not_to_dominate() -> None:
    spread = two_coordinates(1.0, 0.5)
    assert spread(0.2) > 1.2 * FixedScale(0.5).profile(np.array([0.2]))[0]


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_equal_moves_in_the_l2_norm_lie_below_the_embedding(share: float) -> None:
    # Two coordinates of l2 norm 1 have an l1 norm of at most sqrt(2); both coordinates by 1 / sqrt(2).
    moved = math.sqrt(share) + math.sqrt(1 - share)
    spread = two_coordinates(moved, math.sqrt(share) / moved)
    loss = laplace_loss(laplace(1.0, "l2", 2))
    for level in (0.0, 0.3, 0.8, 1.2):
        assert spread(level) <= loss.tail(np.array([level]), "remove")[0] + 1e-6


@pytest.mark.parametrize("probability", [0.02, 0.4])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_amplification_has_its_two_directions(probability: float, direction: Direction) -> None:
    """Against the definition, integrated over the output, for a Gaussian and for Laplace noise."""
    x = np.linspace(-40.0, 41.0, 810_001)
    step = x[1] - x[0]
    cases = [
        (SampledGaussian(1.0, 1.3), np.exp(-((x / 1.3) ** 2) / 2) / (1.3 * math.sqrt(2 * math.pi)),
         np.exp(-(((x - 1) / 1.3) ** 2) / 2) / (1.3 * math.sqrt(2 * math.pi))),
        (SampledNoise(1.0, FixedScale(1 / 1.5)), np.exp(-np.abs(x) / 1.5) / 3,
         np.exp(-np.abs(x - 1) / 1.5) / 3),
    ]  # fmt: skip
    for release, absent, shifted in cases:
        drawn = (1 - probability) * absent + probability * shifted
        large, small = (drawn, absent) if direction == "remove" else (absent, drawn)
        for level in (0.0, 0.01, 0.1, 0.3):
            exact = float(np.sum(np.maximum(large - math.exp(level) * small, 0.0)) * step)
            found = amplified(
                lambda levels, release=release: release.tail(levels, "remove"),
                probability,
                np.array([level]),
                direction,
            )
            assert found[0] == pytest.approx(exact, rel=1e-4, abs=1e-9)


@pytest.mark.statistical
def test_a_simulated_run_loses_what_is_claimed() -> None:
    """Five deviations either way: a false alarm once in 1.7 million runs."""
    generator = np.random.default_rng()
    runs, b, q, num_steps, delta = 200_000, 1.0, 0.2, 20, 0.01
    losses = np.zeros(runs)
    for _ in range(num_steps):
        output = generator.laplace(0.0, b, runs) + (generator.random(runs) < q)
        losses += np.log1p(q * np.expm1((np.abs(output) - np.abs(output - 1)) / b))
    found = epsilon(SelfComposed(PoissonSampled(q, laplace(b)), num_steps), delta)

    def agrees(claimed: float) -> bool:
        parts = np.maximum(-np.expm1(claimed - losses), 0.0)
        return abs(parts.mean() - delta) <= 5 * parts.std() / math.sqrt(runs)

    assert agrees(found)
    assert not agrees(0.95 * found)
    assert not agrees(1.05 * found)


@pytest.mark.parametrize("delta", [1e-12, 1e-10, 1e-5, 0.2])
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
    "noise", [laplace(3.0), laplace(10.0, "l2", 4), laplace(1e-3), laplace(1e5)], ids=str
)
def test_epsilon_is_never_above_the_pure_one(noise: Laplace, accountant: str, delta: float) -> None:
    pure = math.sqrt(2) / noise.noise_multiplier * (1 if noise.norm == "l1" else 2)
    assert pure_epsilon(noise) == pytest.approx(pure, rel=1e-12)
    for count in (1, 3):
        assert epsilon(SelfComposed(noise, count), delta, accountant) <= count * pure * (1 + 1e-12)
    sampled = math.log1p(0.1 * math.expm1(pure)) if pure < 700 else pure
    assert epsilon(PoissonSampled(0.1, noise), delta, accountant) <= sampled * (1 + 1e-12)


def test_epsilon_of_one_release_has_its_closed_form() -> None:
    # 1 - exp((epsilon - 1 / b) / 2) = delta
    for b, delta in ((1.0, 1e-5), (2.0, 0.1), (0.3, 1e-10)):
        exact = 1 / b + 2 * math.log1p(-delta)
        found = epsilon(laplace(b), delta)
        assert exact - 1e-12 <= found <= exact + 1e-4 / b


@pytest.mark.parametrize("dimension", [1, 2, 7, 64])
def test_more_coordinates_never_cost_less(dimension: int) -> None:
    step = PoissonSampled(0.1, laplace(2.0, "l2", dimension))
    more = PoissonSampled(0.1, laplace(2.0, "l2", dimension + 1))
    whole = PoissonSampled(0.1, laplace(2.0, "l2"))
    for accountant in ("pld", "rdp"):
        found = [epsilon(SelfComposed(one, 50), 1e-6, accountant) for one in (step, more, whole)]
        assert found == sorted(found)


def test_one_coordinate_has_the_same_cost_in_either_norm() -> None:
    events = [PoissonSampled(0.1, laplace(1.5, norm, 1)) for norm in ("l1", "l2")]
    first, second = (epsilon(SelfComposed(event, 40), 1e-6) for event in events)
    assert first == pytest.approx(second, rel=1e-12)


def test_in_many_dimensions_it_costs_what_a_gaussian_of_deviation_b_does() -> None:
    for sampled in (Gaussian(2.0), PoissonSampled(0.1, Gaussian(2.0))):
        whole = laplace(2.0, "l2")
        same = whole if isinstance(sampled, Gaussian) else PoissonSampled(0.1, whole)
        assert epsilon(SelfComposed(same, 30), 1e-6) == pytest.approx(
            epsilon(SelfComposed(sampled, 30), 1e-6, "rdp"), rel=1e-3
        )


def test_the_lesser_bound_is_taken_where_there_are_two() -> None:
    for dimension, rdp_is_better in ((2, False), (400, True)):
        event = PoissonSampled(0.05, laplace(1.0, "l2", dimension))
        pld, rdp = epsilon(event, 1e-5), epsilon(event, 1e-5, "rdp")
        assert pld <= rdp
        assert (pld == rdp) is rdp_is_better


def test_pld_is_at_most_rdp_over_a_grid_of_runs() -> None:
    for b, q, num_steps in itertools.product((0.5, 2.0), (0.01, 0.3, 1.0), (1, 30)):
        step = PoissonSampled(q, laplace(b))
        for delta in (1e-10, 1e-5):
            event = SelfComposed(step, num_steps)
            assert epsilon(event, delta) <= epsilon(event, delta, "rdp") * (1 + 1e-9)


def test_gaussian_and_laplace_releases_compose() -> None:
    parts = (
        SelfComposed(PoissonSampled(0.1, Gaussian(2.0)), 50),
        SelfComposed(PoissonSampled(0.1, laplace(3.0)), 20),
        laplace(9.0, "l2"),
    )
    for accountant in ("pld", "rdp"):
        one = epsilon(Composed(parts[:1]), 1e-5, accountant)
        two = epsilon(Composed(parts[:2]), 1e-5, accountant)
        three = epsilon(Composed(parts), 1e-5, accountant)
        assert one < two < three < 2 * one + 2
    # Basic composition of two halves of delta is no better.
    halves = epsilon(parts[0], 5e-6) + epsilon(parts[1], 5e-6)
    assert epsilon(Composed(parts[:2]), 1e-5) < halves


@pytest.mark.parametrize(
    "noise", [laplace(2.0), laplace(6.0, "l2"), laplace(4.0, "l2", 3)], ids=str
)
@pytest.mark.parametrize("accountant", [PLDAccountant(), RDPAccountant()], ids=lambda a: a.name)
def test_curve_bounds_every_count_and_ends_at_the_guarantee(
    noise: Laplace, accountant: PLDAccountant
) -> None:
    step = PoissonSampled(0.1, noise)
    curve = accountant.curve(step, num_steps=60, delta=1e-6)
    for count in (1, 2, 17, 60, 90):
        exact = accountant.guarantee(SelfComposed(step, count), delta=1e-6).epsilon
        assert exact * (1 - 2e-3) <= curve.epsilon(count) <= exact * 1.1 + 1e-9
    last = accountant.guarantee(SelfComposed(step, 60), delta=1e-6).epsilon
    assert curve.epsilon(60) == last


@pytest.mark.parametrize(
    "noise", [laplace(1.0), laplace(1.0, "l2"), laplace(1.0, "l2", 4)], ids=str
)
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(("target", "delta"), [(0.5, 1e-10), (3.0, 1e-5)])
def test_calibrated_noise_meets_the_target(
    noise: Laplace, accountant: str, target: float, delta: float
) -> None:
    run = run_of(LaplaceNoise(noise.noise_multiplier, noise.norm, noise.dimension), 0.1, 30)
    chosen = accountant_named(accountant).calibrate(run, target_epsilon=target, target_delta=delta)
    assert epsilon(chosen.event(), delta, accountant) <= target
    less = chosen.with_noise_multiplier(0.998 * chosen.noise.noise_multiplier)
    assert epsilon(less.event(), delta, accountant) > target


def test_a_shuffled_pass_costs_one_release() -> None:
    for noise in (laplace(1.0), laplace(3.0, "l2", 9)):
        found = PLDAccountant().guarantee(Shuffled(20, noise), delta=1e-6, relation=SPECIAL)
        assert found.epsilon == epsilon(noise, 1e-6)


@pytest.mark.parametrize(
    ("event", "relation"),
    [
        (BallsInBins(5, laplace(1.0)), SPECIAL),
        (PoissonSampledContributions(0.1, 3, laplace(1.0)), SPECIAL),
        (TruncatedPoissonSampled(100, 0.1, 20, laplace(1.0)), SPECIAL),
        (SampledWithoutReplacement(100, 10, laplace(1.0)), NeighboringRelation.REPLACE_ONE),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("accountant", ["pld", "rdp", "edgeworth"])
def test_other_samplers_are_refused_with_the_remedy(
    event: PrivacyEvent, relation: NeighboringRelation, accountant: str
) -> None:
    with pytest.raises(UnsupportedEventError) as caught:
        accountant_named(accountant).guarantee(event, delta=1e-5, relation=relation)
    if relation is SPECIAL or accountant == "pld":
        contributions = isinstance(event, PoissonSampledContributions)
        remedy = "draw users instead" if contributions else "use sampling='poisson'"
        assert remedy in str(caught.value)


def test_accountants_without_a_proof_name_those_that_have_one() -> None:
    with pytest.raises(UnsupportedEventError, match="Accountants that can cost it: pld, rdp"):
        epsilon(laplace(1.0), 1e-5, "edgeworth")


def test_one_example_of_several_contributions_counts_as_poisson_sampled() -> None:
    event = PoissonSampledContributions(0.1, 1, laplace(1.0))
    assert epsilon(event, 1e-5) == epsilon(PoissonSampled(0.1, laplace(1.0)), 1e-5)


def test_selection_of_the_best_run_is_refused() -> None:
    with pytest.raises(UnsupportedEventError, match="Use Gaussian noise for a search"):
        guarantee_of_best(laplace(1.0), RandomRepeats(10.0), delta=1e-5)


def test_a_group_costs_no_less_than_its_examples_together() -> None:
    # Three examples that move the sum by 3 have, purely, 3 / b; the general lemma cannot be below that.
    found = group_guarantee(PLDAccountant(), laplace(5.0), group_size=3, delta=1e-6)
    exact = 3 / 5 + 2 * math.log1p(-1e-6)
    assert exact <= found.epsilon <= 3 / 5 * (1 + 1e-9)


def test_what_has_no_known_loss_is_not_looked_up() -> None:
    whole = laplace(1.0, "l2")
    assert is_laplace(whole)
    assert has_laplace_bound(whole)
    assert not has_loss(whole)
    with pytest.raises(TypeError, match="ask `has_laplace_loss` first"):
        laplace_loss(whole)
    assert release_of(laplace(1.0)) == release_of(laplace(1.0, "l1", 12))
