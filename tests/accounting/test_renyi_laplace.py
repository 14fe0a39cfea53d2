"""Rényi divergences of Laplace noise and its mixtures, against integration over outputs."""

from __future__ import annotations

import itertools
import math
from dataclasses import astuple
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from hf_dp.accounting._renyi_laplace import (
    in_any_direction,
    laplace_divergences,
    log_moments,
    of_equal_moves,
    of_one_coordinate,
    sampled_log_moments,
    with_bounded_losses,
    with_released_scale,
)
from hf_dp.accounting.rdp import ORDERS, epsilon_bounds, renyi_divergences
from hf_dp.events import Laplace, Norm, PoissonSampled, ScaleDraw, ScaleMixtureLaplace, Shuffled
from hf_dp.scale_law import ScaleLaw

Floats = NDArray[np.float64]

ACCOUNTED = ScaleLaw(1.0, 0.05, 0.02, 0.1, 0.2)
SAMPLED = ScaleLaw(1.0, 0.05, 0.5, 0.1, 0.2)
LOMAX = ScaleLaw(3.0, 1 / 3)
LAWS = pytest.mark.parametrize("law", [ACCOUNTED, SAMPLED, LOMAX], ids=str)
B = math.sqrt(2)


def event(
    law: ScaleLaw, norm: Norm = "l1", dimension: int | None = None, draw: ScaleDraw = "iid"
) -> ScaleMixtureLaplace:
    return ScaleMixtureLaplace(*astuple(law), draw, norm, dimension)


@cache
def outputs(shift: float, reach: float = 4000.0) -> tuple[Floats, Floats]:
    """Nodes and weights for functions with kinks at 0 and `shift`, over a heavy-tailed density."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    grown = np.concatenate(([0.0], np.geomspace(1e-4, reach, 120)))
    edges = np.concatenate((-grown[:0:-1], np.linspace(0.0, shift, 30), shift + grown[1:]))
    half, middle = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
    return (middle[:, None] + half[:, None] * nodes).ravel(), (half[:, None] * weights).ravel()


def pair(law: ScaleLaw | None, shift: float) -> tuple[Floats, Floats, Floats]:
    """Log-ratio of the densities with and without a move by `shift`, and the chances of either."""
    x, weights = outputs(shift)
    if law is None:  # plain Laplace noise of scale 1
        absent, present = np.exp(-np.abs(x)) / 2, np.exp(-np.abs(x - shift)) / 2
        return np.abs(x) - np.abs(x - shift), weights * absent, weights * present
    absent, present = law.density(x), law.density(x - shift)
    return np.log(present / absent), weights * absent, weights * present


def moment(law: ScaleLaw | None, shift: float, order: float, q: float, direction: str) -> float:
    """(order - 1) times the Rényi divergence of one coordinate over a Poisson sample."""
    ratio, absent, _ = pair(law, shift)
    drawn = np.log1p(q * np.expm1(ratio))
    exponent = order * drawn if direction == "remove" else (1 - order) * drawn
    return math.log(np.sum(absent * np.exp(exponent)))


@pytest.mark.parametrize("shift", [0.01, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("order", [1.1, 2.0, 3.7, 16.0])
@pytest.mark.parametrize("direction", ["remove", "add"])
def test_one_coordinate_has_its_closed_form(shift: float, order: float, direction: str) -> None:
    found = of_one_coordinate(shift, np.array([order]))[0]
    assert found == pytest.approx(moment(None, shift, order, 1.0, direction), rel=1e-6)


@LAWS
@pytest.mark.parametrize("order", [1.5, 2.0, 2.9])
def test_released_scale_is_the_mean_over_scales(law: ScaleLaw, order: float) -> None:
    generator = np.random.default_rng(5)
    count = 400_000
    draws = law.uniform_low + (law.uniform_high - law.uniform_low) * generator.random(count)
    draws = draws + generator.standard_gamma(law.gamma_shape, count) * law.gamma_scale
    draws = draws + generator.standard_exponential(count) * law.exponential_mean
    a, shift = order, 0.5
    rising = a / (2 * a - 1) * np.exp((a - 1) * draws * shift)
    values = rising + (a - 1) / (2 * a - 1) * np.exp(-a * draws * shift)
    found = math.exp(with_released_scale(law, shift, np.array([order]))[0])
    assert abs(values.mean() - found) <= 5 * values.std() / math.sqrt(count)
    assert abs(values.mean() - found**1.05) > 5 * values.std() / math.sqrt(count)


@LAWS
@pytest.mark.parametrize("order", [1.5, 2.0, 2.9])
@pytest.mark.parametrize("direction", ["remove", "add"])
def test_showing_the_scale_costs_no_less_than_hiding_it(
    law: ScaleLaw, order: float, direction: str
) -> None:
    hidden = moment(law, 1.0, order, 1.0, direction)
    shown = with_released_scale(law, 1.0, np.array([order]))[0]
    assert hidden < shown < 6 * hidden


@pytest.mark.parametrize("order", [2.0, 5.0, 16.0, 1.3])
@LAWS
def test_a_whole_move_costs_no_less_than_its_parts(law: ScaleLaw, order: float) -> None:
    generator = np.random.default_rng(11)
    a = np.array([order])
    for _ in range(40):
        parts = generator.dirichlet(np.full(generator.integers(2, 9), 0.6))
        split = sum(float(with_released_scale(law, part, a)[0]) for part in parts)
        whole = float(with_released_scale(law, 1.0, a)[0])
        assert split <= whole * (1 + 1e-9) + 1e-12 or math.isinf(whole)
        plain = sum(float(of_one_coordinate(part, a)[0]) for part in parts)
        assert plain <= float(of_one_coordinate(1.0, a)[0]) * (1 + 1e-9)


def test_moments_are_infinite_beyond_the_domain() -> None:
    # 1 / gamma_scale = 20, so orders from 21 on have no moment; a formula would go on.
    found = with_released_scale(ACCOUNTED, 1.0, np.array([20.0, 20.99, 21.0, 22.0, 128.0]))
    assert np.isfinite(found).tolist() == [True, True, False, False, False]
    shown = event(ACCOUNTED, draw="shared")
    divergences = dict(zip(ORDERS, renyi_divergences(shown), strict=True))
    assert math.isinf(divergences[128.0])
    assert math.isinf(divergences[21.0])
    assert divergences[20.0] == pytest.approx(0.3053739, abs=1e-7)
    # A sampled release of order a has the moments of all orders up to a in it.
    sampled = dict(zip(ORDERS, renyi_divergences(PoissonSampled(0.01, shown)), strict=True))
    assert math.isinf(sampled[21.0])
    assert sampled[20.0] < 0.02
    at_shift_two = with_released_scale(ACCOUNTED, 2.0, np.array([10.9, 11.0]))
    assert np.isfinite(at_shift_two).tolist() == [True, False]


@pytest.mark.parametrize(
    ("dimension", "scale", "order"), [(3, 1.0, 4.0), (5, 2.0, 8.0), (4, 0.5, 2.5)]
)
def test_equal_moves_are_the_worst_on_the_sphere(
    dimension: int, scale: float, order: float
) -> None:
    a = np.array([order])
    worst = float(of_equal_moves(scale, dimension, a)[0])
    generator = np.random.default_rng(3)
    best = 0.0
    for _ in range(8):
        move = np.abs(generator.standard_normal(dimension))
        move /= np.linalg.norm(move)
        value, step = -1.0, 0.5
        for _ in range(250):
            near = np.abs(move + step * generator.standard_normal(dimension))
            near /= np.linalg.norm(near)
            found = sum(float(of_one_coordinate(scale * one, a)[0]) for one in near)
            if found > value:
                move, value = near, found
            else:
                step *= 0.97
        best = max(best, value)
    assert 0.9999 * worst <= best <= worst * (1 + 1e-8)
    # In fewer coordinates, one for example, there is less to lose: such a rule would be caught.
    assert best > 1.02 * float(of_one_coordinate(scale, a)[0])


def test_equal_moves_tend_to_the_gaussian_from_below() -> None:
    orders = np.array([1.1, 2.0, 30.0, 2048.0])
    gaussian = orders * (orders - 1) * 1.7**2 / 2
    last = np.zeros(4)
    for dimension in (1, 2, 10, 10**4, 10**8, 10**14):
        found = of_equal_moves(1.7, dimension, orders)
        assert np.all(last <= found)
        assert np.all(found <= gaussian)
        last = found
    np.testing.assert_allclose(last, gaussian, rtol=1e-3)
    np.testing.assert_array_equal(of_equal_moves(1.7, None, orders), gaussian)


def two_dimensional(
    law: ScaleLaw | None, moves: tuple[float, float], q: float, order: float
) -> tuple[float, float]:
    """Log-moments, removing and adding, of two coordinates with ONE coin, integrated over both outputs."""
    (first, chance_1, _), (second, chance_2, _) = (pair(law, move) for move in moves)
    total = {"remove": 0.0, "add": 0.0}
    for ratio, chance in zip(np.array_split(first, 60), np.array_split(chance_1, 60), strict=True):
        drawn = np.log1p(q * np.expm1(ratio[:, None] + second))
        total["remove"] += float(chance @ np.exp(order * drawn) @ chance_2)
        total["add"] += float(chance @ np.exp((1 - order) * drawn) @ chance_2)
    return math.log(total["remove"]), math.log(total["add"])


@pytest.mark.parametrize("law", [None, SAMPLED], ids=str)
@pytest.mark.parametrize(("moves", "q", "order"), [((0.7, 0.7), 0.1, 6.0), ((1.2, 0.4), 0.3, 3.0)])
def test_one_coin_for_all_coordinates_has_this_moment(
    law: ScaleLaw | None, moves: tuple[float, float], q: float, order: float
) -> None:
    removed, added = two_dimensional(law, moves, q, order)
    whole = np.arange(2.0, order + 1)
    unsampled = np.array([sum(moment(law, m, j, 1.0, "remove") for m in moves) for j in whole])
    found = sampled_log_moments(unsampled, q, np.array([order]))[0]
    assert added < removed == pytest.approx(found, rel=1e-5)
    # The planted fault: every coordinate with a coin of its own. It claims too little.
    apart = sum(moment(law, m, order, q, "remove") for m in moves)
    assert apart < 0.95 * removed
    if law is None:  # and what the accountant uses is the supremum over all such moves
        l1, l2 = sum(moves), math.hypot(*moves)
        for noise in (Laplace(B / l1, "l1"), Laplace(B / l2, "l2", 2), Laplace(B / l2, "l2")):
            divergence = laplace_divergences(q, noise, (order,))[0]
            assert divergence * (order - 1) >= removed * (1 - 1e-6)


@pytest.mark.parametrize("law", [None, SAMPLED, LOMAX], ids=str)
@pytest.mark.parametrize("q", [0.01, 0.3])
def test_orders_between_whole_ones_are_bounded_by_the_chord(law: ScaleLaw | None, q: float) -> None:
    orders = np.array([1.2, 1.9, 2.0, 2.5, 3.3, 4.0])
    unsampled = np.array([moment(law, 1.0, j, 1.0, "remove") for j in (2, 3, 4)])
    bounds = sampled_log_moments(unsampled, q, orders)
    for order, bound in zip(orders, bounds, strict=True):
        for direction in ("remove", "add"):
            exact = moment(law, 1.0, order, q, direction)
            assert exact <= bound * (1 + 1e-6)
        if order in (2.0, 4.0):
            assert bound == pytest.approx(moment(law, 1.0, order, q, "remove"), rel=1e-5)


def test_sampling_never_costs_more_and_certain_sampling_is_none() -> None:
    for noise in (Laplace(1.0), Laplace(2.0, "l2"), event(SAMPLED), event(ACCOUNTED, "l2", 4)):
        unsampled = renyi_divergences(noise)
        sampled = [renyi_divergences(PoissonSampled(q, noise)) for q in (1e-3, 0.1, 0.99)]
        for less, more in itertools.pairwise([*sampled, unsampled]):
            assert np.all(less <= more)
        nearly = laplace_divergences(1 - 1e-12, noise, (2.0, 3.0, 11.0))
        np.testing.assert_allclose(
            nearly, laplace_divergences(1.0, noise, (2.0, 3.0, 11.0)), rtol=1e-6
        )
        np.testing.assert_array_equal(renyi_divergences(Shuffled(4, noise)), unsampled)


@LAWS
@pytest.mark.parametrize("order", [1.2, 2.0, 2.8])
def test_no_direction_is_worse_than_the_bound_for_all(law: ScaleLaw, order: float) -> None:
    a = np.array([order])
    bound = float(in_any_direction(law, a)[0])
    generator = np.random.default_rng(17)
    best = 0.0
    for _ in range(30):
        dimension = int(generator.integers(1, 60))
        move = generator.standard_normal(dimension) * generator.pareto(1.5, dimension)
        move = np.abs(move) / np.linalg.norm(move)
        hidden = sum(float(with_released_scale(law, one, a)[0]) for one in move[move > 1e-4])
        best = max(best, hidden)
    assert best <= bound
    # Reached within a percent: over a fine grid of equal moves.
    equal = [float(with_released_scale(law, s, a)[0]) / s**2 for s in np.geomspace(2e-3, 1.0, 200)]
    assert max(equal) <= bound <= 1.01 * max(equal)


def test_the_bound_for_all_directions_is_the_gaussian_of_a_constant_scale() -> None:
    a = np.array([1.1, 2.0, 7.0, 64.0])
    found = in_any_direction(ScaleLaw(uniform_low=0.8, uniform_high=0.8), a)
    np.testing.assert_allclose(found, a * (a - 1) * 0.8**2 / 2, rtol=3e-3)
    assert np.all(found >= a * (a - 1) * 0.8**2 / 2)


@pytest.mark.parametrize("points", [3, 12, 40])
def test_the_bound_for_all_directions_holds_on_every_grid(
    points: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = np.array([1.5, 2.0, 2.9])
    fine = in_any_direction(SAMPLED, a)
    monkeypatch.setattr("hf_dp.accounting._renyi_laplace._POINTS", points)
    assert np.all(in_any_direction(SAMPLED, a) >= fine * (1 - 2e-3))


def test_the_lesser_of_embedding_and_of_all_directions_is_taken() -> None:
    orders = np.array([1.5, 2.0, 2.5])
    for dimension in (2, 3, 10_000):
        found = log_moments(event(SAMPLED, "l2", dimension), orders)
        embedded = with_released_scale(SAMPLED, math.sqrt(dimension), orders)
        bounded = with_bounded_losses(event(SAMPLED, "l2", dimension), orders)
        least = np.minimum(np.minimum(embedded, in_any_direction(SAMPLED, orders)), bounded)
        np.testing.assert_array_equal(found, least)
        shown = log_moments(event(SAMPLED, "l2", dimension, "shared"), orders)
        np.testing.assert_array_equal(shown, embedded)
    one = log_moments(event(SAMPLED, "l2", 1), orders)
    np.testing.assert_array_equal(one, log_moments(event(SAMPLED, "l1", 1), orders))


def test_a_law_without_moments_leaves_bounded_losses() -> None:
    heavy = ScaleLaw(3.0, 20.0)  # moments below 1 / 20 only
    assert np.isinf(in_any_direction(heavy, np.array([1.1, 2.0]))).all()
    assert np.isinf(renyi_divergences(event(heavy, draw="shared"))).all()
    assert np.isinf(epsilon_bounds({event(heavy, draw="shared"): 1}, 1e-5, 1, 1)).all()
    # E[lambda^2] / E[lambda] for any number of coordinates in the l1 norm.
    assert epsilon_bounds({event(heavy): 1}, 1e-5, 1, 2).tolist() == pytest.approx([80.0, 160.0])
    assert np.isfinite(epsilon_bounds({event(heavy, "l2"): 1}, 1e-5, 1, 1)).all()


@LAWS
@pytest.mark.parametrize("order", [1.3, 2.0, 8.0, 40.0])
def test_hidden_scales_lose_no_more_than_their_highest_loss_allows(
    law: ScaleLaw, order: float
) -> None:
    a = np.array([order])
    generator = np.random.default_rng(23)
    for _ in range(8):
        dimension = int(generator.integers(1, 7))
        move = generator.standard_normal(dimension) ** int(generator.integers(1, 4))
        for norm, power in (("l1", 1), ("l2", 2)):
            moved = np.abs(move) / np.linalg.norm(move, power)
            exact = sum(moment(law, float(one), order, 1.0, "remove") for one in moved)
            for size in (dimension, None):
                noise = event(law, norm, size)  # type: ignore[arg-type]
                assert exact <= with_bounded_losses(noise, a)[0] * (1 + 1e-6)
                assert exact <= log_moments(noise, a)[0] * (1 + 1e-6)
    # No slack to spare: half a bound would be seen to be too little.
    whole = moment(law, 1.0, 1.3, 1.0, "remove")
    assert whole > 0.3 * with_bounded_losses(event(law, "l2", 1), np.array([1.3]))[0]


def test_many_small_moves_lose_up_to_the_slope_of_the_highest_loss() -> None:
    law, order, dimension = LOMAX.scaled(5.0), 2.0, 400
    exact = dimension * moment(law, 1 / math.sqrt(dimension), order, 1.0, "remove")
    bound = float(with_bounded_losses(event(law, "l2"), np.array([order]))[0])
    assert exact <= bound < 2 * exact
    # The planted fault: the highest loss of a whole move instead of its slope at 0.
    assert exact > 1.2 * order * (order - 1) / 2 * float(law.pure_epsilon(1.0)) ** 2


def test_rounding_in_a_million_coordinates_is_on_the_safe_side() -> None:
    for dimension in (10**6, 10**9, 10**12):
        found = of_equal_moves(1.0, dimension, np.array([2.0, 3.0]))
        x = 1 / math.sqrt(dimension)
        # Three terms of the series of d K_a(x): a (a - 1) / 2 - a (a - 1) (2 a - 1) x / 6 + ...
        for a, value in zip((2.0, 3.0), found, strict=True):
            assert value >= a * (a - 1) / 2 - a * (a - 1) * (2 * a - 1) * x / 6
            assert value <= a * (a - 1) / 2
