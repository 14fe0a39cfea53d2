"""One hidden scale for each coordinate: the loss of one coordinate, and of several."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from mixture_laws import (
    LAWS,
    SAMPLED,
    Floats,
    chances_of,
    delta_of,
    epsilon,
    event,
    reach_of,
)
from scipy.integrate import quad

from hf_dp.accounting import _hidden_scale as hidden_module
from hf_dp.accounting._hidden_scale import HiddenScale
from hf_dp.accounting._laplace import (
    BoundedLoss,
    pure_epsilon,
    symmetric_loss,
)
from hf_dp.scale_law import ScaleLaw


def integrated(law: ScaleLaw, level: float, shift: float = 1.0) -> float:
    """Delta of one coordinate, by adaptive quadrature of where one density exceeds the other."""

    def excess(x: float) -> float:
        above = law.density(x) - math.exp(level) * law.density(x - shift)
        return max(float(above), 0.0)

    ends = [-1e6, -1e3, -100.0, -20.0, -5.0, -1.0, 0.0, 0.1 * shift, shift / 2]
    parts = [
        quad(excess, low, high, epsabs=1e-13, epsrel=1e-9, limit=200)[0]
        for low, high in itertools.pairwise(ends)
    ]
    return math.fsum(parts)


@LAWS
def test_hidden_scale_agrees_with_quadrature_from_above(law: ScaleLaw) -> None:
    loss = HiddenScale(law)
    for share in (0.0, 0.03, 0.3, 0.7, 0.95):
        level = share * loss.highest
        found = float(loss.profile(np.array([level]))[0])
        exact = integrated(law, level)
        assert exact * (1 - 1e-9) - 1e-12 <= found <= exact * (1 + 1e-6) + 1e-9


@LAWS
def test_the_loss_of_a_hidden_scale_ends_at_its_highest(law: ScaleLaw) -> None:
    loss = HiddenScale(law)
    x = np.linspace(-30.0, 30.0, 200_001)
    losses = np.log(law.density(x) / law.density(x - 1))
    assert losses.max() <= loss.highest <= losses.max() + 1e-6
    beyond = loss.profile(loss.highest * np.array([1 - 1e-9, 1.0, 1.1, 50.0]))
    assert beyond[0] > 0
    assert beyond[1:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("nodes", [3, 6, 20])
def test_a_bad_table_of_losses_is_paid_for(nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_module, "_NODES", nodes)
    levels = np.linspace(0.0, 0.95, 24) * HiddenScale(SAMPLED).highest
    rough = HiddenScale(SAMPLED).profile(levels)
    monkeypatch.setattr(hidden_module, "_NODES", 4096)
    exact = HiddenScale(SAMPLED).profile(levels)
    assert np.all(rough >= exact - 1e-12)
    # The planted fault: the same ends, without what they may miss.
    monkeypatch.setattr(hidden_module, "_NODES", nodes)
    faulty = HiddenScale(SAMPLED)
    for table in (faulty._left, faulty._right):
        table._chances *= 0.0
    assert np.any(faulty.profile(levels) < exact - 1e-9)


@LAWS
@pytest.mark.parametrize("shift", [0.2, 0.9])
def test_smaller_moves_of_one_coordinate_cost_less(law: ScaleLaw, shift: float) -> None:
    loss = HiddenScale(law)
    for share in (0.0, 0.3, 0.7):
        level = share * loss.highest
        found = float(loss.profile(np.array([level]))[0])
        assert integrated(law, level, shift) < found


def spread(law: ScaleLaw, moves: float, cells: int = 500) -> tuple[Floats, Floats]:
    """Losses and chances of one of the coordinates that a unit moves by 1 / `moves`."""
    shift = 1 / moves
    grown = np.concatenate(([0.0], np.geomspace(1e-3, reach_of(law), cells)))
    edges = np.concatenate((-grown[:0:-1], np.linspace(0.0, shift, 60), shift + grown[1:]))
    # Cells of outputs: looking at them through cells can only hide something.
    absent, present = chances_of(law, edges), chances_of(law, edges - shift)
    return np.log(present / absent), present


def test_two_halves_are_worse_than_one_coordinate() -> None:
    """Why the exact loss of one coordinate is used at dimension 1 alone."""
    one = HiddenScale(SAMPLED)
    level = 0.899
    assert one.highest < level
    losses, chances = spread(SAMPLED, 2)
    both = (losses[:, None] + losses).ravel(), np.outer(chances, chances).ravel()
    halves = delta_of(*both, level)
    assert delta_of(*both, 0.8995) < 1.39e-4 < halves < 1.43e-4
    # So at that delta two coordinates cost more than `level`, and the accountant says so.
    for accountant, dimension in itertools.product(("pld", "rdp"), (2, 3, None)):
        for draw in ("iid", "shared"):
            several = event(SAMPLED, dimension, "l1", draw)  # type: ignore[arg-type]
            assert epsilon(several, 0.99 * halves, accountant) >= level
    # The planted fault: one coordinate's pair taken for two. It would be below the truth.
    assert epsilon(event(SAMPLED, 1), 0.99 * halves) < level
    assert isinstance(symmetric_loss(event(SAMPLED, 1)), HiddenScale)
    assert not isinstance(symmetric_loss(event(SAMPLED, 2)), HiddenScale)
    assert not isinstance(symmetric_loss(event(SAMPLED, 1, "l1", "shared")), HiddenScale)


@LAWS
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_two_coordinates_lose_no_more_than_their_highest_loss_allows(
    law: ScaleLaw, share: float
) -> None:
    parts = [spread(law, 1 / part, 300) for part in (share, 1 - share)]
    losses = (parts[0][0][:, None] + parts[1][0]).ravel()
    chances = np.outer(parts[0][1], parts[1][1]).ravel()
    for dimension in (2, 5, None):
        loss = symmetric_loss(event(law, dimension))
        assert isinstance(loss, BoundedLoss)
        assert loss.highest == pure_epsilon(event(law, dimension))
        levels = np.linspace(0.0, 1.1, 12) * loss.highest
        for level, found in zip(levels, loss.profile(levels), strict=True):
            assert delta_of(losses, chances, level) <= found * (1 + 1e-9)
        # Randomised response itself has exactly this profile.
        h = loss.highest
        answers = np.array([-h, h]), np.array([1.0, math.exp(h)]) / (1 + math.exp(h))
        exact = [delta_of(*answers, level) for level in levels]
        np.testing.assert_allclose(loss.profile(levels), exact, atol=1e-15)


def test_a_shown_scale_for_each_coordinate_is_not_dominated_by_one_coordinate() -> None:
    # Inverse scales 0 or 20, each half the time: total variation of one coordinate and of two halves.
    def shown(shift: float) -> tuple[Floats, Floats]:
        x = np.linspace(-2.0, 3.0, 1001)
        middle, width = (x[1:] + x[:-1]) / 2, np.diff(x)
        chances = 10 * np.exp(-20 * np.abs(middle - shift)) * width / 2
        losses = 20 * (np.abs(middle) - np.abs(middle - shift))
        return np.append(losses, 0.0), np.append(chances, 0.5)

    one, both = shown(1.0), shown(0.5)
    losses = (both[0][:, None] + both[0]).ravel()
    assert delta_of(*one, 0.0) == pytest.approx(0.5, abs=1e-3)
    assert delta_of(losses, np.outer(both[1], both[1]).ravel(), 0.0) > 0.74
