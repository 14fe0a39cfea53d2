"""PLD: exact to 4 digits, never below the truth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent, pld
from dp_accounting.pld import privacy_loss_mechanism

from hf_dp.accounting import PLDAccountant, RDPAccountant, _composition
from hf_dp.accounting import pld as pld_module
from hf_dp.accounting._losses import DIRECTIONS, DiscreteLoss, SampledGaussian, discretise
from hf_dp.errors import ConfigurationError
from hf_dp.events import (
    BallsInBins,
    Composed,
    Gaussian,
    NeighboringRelation,
    PoissonSampled,
    PrivacyEvent,
    SelfComposed,
    TruncatedPoissonSampled,
)

Exact = Callable[..., float]
Sgd = Callable[[float, float, int], PrivacyEvent]

# Sampling probability, noise multiplier, steps, delta; epsilon when one is removed, when one is added.
# Contour integrals in the project's research notes (Edgeworth report, table T5).
EXACT = [
    (0.01, 1.0, 1000, 1e-5, 1.828237, 1.416662),
    (0.01, 1.0, 1000, 1e-6, 2.124515, 1.589089),
    (0.01, 1.0, 10000, 1e-5, 6.187712, 5.611509),
    (0.01, 0.6, 1000, 1e-5, 7.433614, 3.177551),
    (0.01, 0.6, 100, 1e-5, 3.815599, 0.598890),
    (0.05, 0.8, 1000, 1e-5, 17.580738, 11.786596),
    (0.05, 2.0, 100, 1e-5, 1.097231, 0.883345),
    (0.01, 2.0, 1000, 1e-6, 0.720916, 0.66555),
    (0.001, 2.0, 10000, 1e-5, 0.173308, 0.1704),
    (0.001, 0.8, 10000, 1e-5, 0.782388, 0.6509),
    (0.001, 1.0, 10000, 1e-6, 0.555140, 0.5078),
    (0.05, 0.6, 100, 1e-5, 11.506409, 3.2242),
    (0.05, 1.0, 100, 1e-5, 3.502148, 1.881766),
    (2000 / 392702, 0.573, 3920, 1e-6, 9.599783, 4.612665),
]
ROWS = pytest.mark.parametrize(
    "row", EXACT, ids=lambda row: f"q{row[0]:.3g}-sigma{row[1]}-T{row[2]}-delta{row[3]}"
)


def epsilon(event: PrivacyEvent, delta: float) -> float:
    return PLDAccountant().guarantee(event, delta=delta).epsilon


@pytest.mark.reference
@ROWS
def test_epsilon_agrees_with_exact_values_from_above(
    row: tuple[float, float, int, float, float, float], sgd: Sgd
) -> None:
    probability, noise, num_steps, delta, removed, _ = row
    found = epsilon(sgd(probability, noise, num_steps), delta)
    rounding = 0.5e-6 / removed  # the reference has six digits behind the point
    assert removed * (1 - rounding) <= found <= removed * (1 + 4e-5 + rounding)


@pytest.mark.reference
@ROWS
def test_adding_one_is_exact_too(
    row: tuple[float, float, int, float, float, float], sgd: Sgd, exact_epsilon: Exact
) -> None:
    # Hidden in epsilon behind the larger direction, so it is looked at alone.
    probability, noise, num_steps, delta, _, added = row
    loss = discretise(SampledGaussian(probability, noise), "add", 5e-5)
    found = _composition.composed_epsilon([(loss, num_steps)], delta)
    assert found == pytest.approx(added, rel=4e-3)  # a few of these come from coarse grids
    if num_steps == 100 and noise < 1:
        return  # so few bounded losses that the contour integral takes seconds
    exact = exact_epsilon(sgd(probability, noise, num_steps), delta, added, "add")
    assert exact * (1 - 1e-8) <= found <= exact * (1 + 1e-3)


@pytest.mark.reference
def test_a_noise_multiplier_that_was_estimated_too_small_is_rejected(sgd: Sgd) -> None:
    # Published as epsilon = 8 with an accountant that is no upper bound.
    found = epsilon(sgd(2000 / 392702, 0.573, 3920), 1e-6)
    assert found == pytest.approx(9.5998, abs=5e-4)


@pytest.mark.parametrize(
    ("probability", "noise", "num_steps", "delta"),
    [(0.02, 0.9, 700, 1e-6), (0.003, 1.3, 4000, 1e-7), (0.3, 5.0, 2000, 1e-5)],
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_epsilon_agrees_with_contour_integration(
    probability: float,
    noise: float,
    num_steps: int,
    delta: float,
    direction: str,
    sgd: Sgd,
    exact_epsilon: Exact,
) -> None:
    event = sgd(probability, noise, num_steps)
    found = epsilon(event, delta)
    if direction == "remove":
        exact = exact_epsilon(event, delta, near=found)
        assert exact <= found <= exact * (1 + 5e-5)
    else:
        loss = discretise(SampledGaussian(probability, noise), "add", 5e-5)
        found = _composition.composed_epsilon([(loss, num_steps)], delta)
        exact = exact_epsilon(event, delta, found, "add")
        assert exact <= found <= exact * (1 + 1e-4)


def test_different_releases_compose(exact_epsilon: Exact) -> None:
    mixed = Composed(
        (
            SelfComposed(PoissonSampled(0.01, Gaussian(0.9)), 400),
            SelfComposed(PoissonSampled(0.05, Gaussian(2.0)), 100),
            SelfComposed(Gaussian(30.0), 20),
        )
    )
    found = epsilon(mixed, 1e-6)
    exact = exact_epsilon(mixed, 1e-6, near=found)
    assert exact <= found <= exact * (1 + 5e-5)


@pytest.mark.parametrize("noise", [0.3, 1.0, 4.0, 50.0, 1e4])
@pytest.mark.parametrize("count", [1, 7])
def test_unsampled_noise_agrees_with_the_closed_form(
    noise: float, count: int, gaussian_epsilon: Callable[[float, float], float]
) -> None:
    found = epsilon(SelfComposed(Gaussian(noise), count), 1e-5)
    exact = gaussian_epsilon(noise / math.sqrt(count), 1e-5)
    assert exact * (1 - 1e-9) <= found <= exact * (1 + 1e-4) + 1e-7


@pytest.mark.reference
@pytest.mark.parametrize(
    ("direction", "at", "delta"),
    [("remove", 0.01, 0.0019002737053), ("add", 0.005, 0.000963144335305)],
)
def test_one_release_has_its_closed_form(direction: str, at: float, delta: float) -> None:
    tail = SampledGaussian(0.01, 1.0).tail(np.array([at]), direction)  # type: ignore[arg-type]
    assert tail[0] == pytest.approx(delta, rel=1e-10)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("probability", "noise"), [(1e-4, 0.5), (0.01, 1.0), (0.3, 3.0), (0.9, 0.8), (1.0, 2.0)]
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tails_agree_with_dp_accounting(probability: float, noise: float, direction: str) -> None:
    mechanism = privacy_loss_mechanism.GaussianPrivacyLoss(
        noise,
        sampling_prob=probability,
        adjacency_type=privacy_loss_mechanism.AdjacencyType[direction.upper()],
    )
    at = np.linspace(0.0, 4.0, 81)
    tail = SampledGaussian(probability, noise).tail(at, direction)  # type: ignore[arg-type]
    np.testing.assert_allclose(tail, mechanism.get_delta_for_epsilon(at), rtol=1e-9, atol=5e-16)


@pytest.mark.parametrize(("probability", "noise"), [(0.01, 1.0), (0.2, 0.6), (1.0, 3.0)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_discretised_loss_is_exact_on_the_grid(
    probability: float, noise: float, direction: str
) -> None:
    release = SampledGaussian(probability, noise)
    loss = discretise(release, direction, 1e-2)  # type: ignore[arg-type]
    losses = (loss.lowest + np.arange(len(loss.probabilities))) * loss.interval
    assert loss.infinity_mass + loss.probabilities.sum() == pytest.approx(1.0, abs=1e-12)
    for at in losses[losses >= 0][:200:20]:
        above = np.maximum(-np.expm1(at - losses), 0.0)
        exact = release.tail(np.array([at]), direction)[0]  # type: ignore[arg-type]
        assert loss.infinity_mass + above @ loss.probabilities == pytest.approx(exact, rel=1e-9)
    # Both are distributions: the smaller world's masses sum to one as well.
    assert loss.probabilities @ np.exp(-losses) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("interval", [1e-1, 1e-2, 3e-3, 1e-3, 2e-4])
def test_every_interval_gives_an_upper_bound(interval: float, sgd: Sgd) -> None:
    releases = {SampledGaussian(0.01, 1.0): 1000}
    for compute in (pld_module._epsilon_on_grid, pld_module._certified_epsilon):
        assert compute(releases, 1e-5, interval) >= 1.8282365
        assert compute(releases, 1e-6, interval) >= 2.1245145


@pytest.mark.reference
@pytest.mark.parametrize("row", EXACT[3:7], ids=str)
def test_composition_agrees_with_dp_accounting_from_end_to_end(
    row: tuple[float, float, int, float, float, float],
) -> None:
    probability, noise, num_steps, delta, _, _ = row
    theirs = pld.PLDAccountant(value_discretization_interval=1e-3)
    step = PoissonSampledDpEvent(probability, GaussianDpEvent(noise))
    theirs.compose(SelfComposedDpEvent(step, num_steps))
    releases = {SampledGaussian(probability, noise): num_steps}
    for compute in (pld_module._epsilon_on_grid, pld_module._certified_epsilon):
        assert compute(releases, delta, 1e-3) == pytest.approx(theirs.get_epsilon(delta), rel=1e-7)


def test_infinite_losses_add_up() -> None:
    rare = DiscreteLoss(0.1, -2, np.array([0.25, 0.0, 0.5, 0.0, 0.25 - 1e-6]), 1e-6)
    total = -math.expm1(100 * math.log1p(-1e-6))
    composed = [(rare, 60), (rare, 40)]
    assert _composition.composed_epsilon(composed, total * 0.999999) == math.inf
    assert _composition.composed_epsilon(composed, total * 1.01) < 100 * 0.2


@pytest.mark.parametrize(
    ("probability", "noise", "num_steps", "deltas"),
    [
        (0.01, 1.0, 1000, (1e-8, 1e-10, 1e-12)),
        (0.01, 1.0, 10000, (1e-8, 1e-10, 1e-11)),
        (0.001, 1.5, 1_000_000, (1e-8, 1e-9)),
    ],
)
def test_rounding_never_makes_epsilon_too_small(
    probability: float,
    noise: float,
    num_steps: int,
    deltas: tuple[float, ...],
    sgd: Sgd,
    exact_delta: Exact,
) -> None:
    event = sgd(probability, noise, num_steps)
    for delta in deltas:
        assert exact_delta(event, epsilon(event, delta)) <= delta


def test_the_slack_for_rounding_is_needed_and_ample(
    monkeypatch: pytest.MonkeyPatch, sgd: Sgd, exact_delta: Exact
) -> None:
    monkeypatch.setattr(pld_module, "rounding_slack", lambda num_releases: 0.0)
    lost = []
    for probability, noise, num_steps in ((0.01, 1.0, 1000), (0.1, 3.0, 3000), (0.001, 1.5, 10**6)):
        event = sgd(probability, noise, num_steps)
        for delta in (1e-10, 1e-11, 1e-12):
            loss = exact_delta(event, epsilon(event, delta)) - delta
            lost.append(loss / _composition.rounding_slack(num_steps))
    assert 0 < max(lost) < 0.2, lost


@pytest.mark.parametrize(("delta", "num_steps"), [(9e-13, 10), (1e-20, 1), (1e-11, 10**6)])
def test_deltas_that_rounding_could_hide_are_refused(
    delta: float, num_steps: int, sgd: Sgd
) -> None:
    event = sgd(0.001, 1.0, num_steps)
    with pytest.raises(ConfigurationError, match=r"PLDAccountant\.delta=.*accountant 'rdp'"):
        epsilon(event, delta)
    assert 0 < RDPAccountant().guarantee(event, delta=delta).epsilon < math.inf


def test_only_an_accountant_that_can_cost_it_is_recommended_for_a_small_delta(sgd: Sgd) -> None:
    with pytest.raises(ConfigurationError, match="Use the accountant 'rdp', which"):
        epsilon(sgd(0.1, 1.0, 10), 1e-14)
    for event in (
        BallsInBins(10, Gaussian(1.0)),
        TruncatedPoissonSampled(99, 0.1, 9, Gaussian(1.0)),
    ):
        assert not RDPAccountant().can_cost(event)
        with pytest.raises(ConfigurationError, match=r"Use a larger delta: .*cannot cost"):
            PLDAccountant().guarantee(
                event, delta=1e-14, relation=NeighboringRelation.REPLACE_SPECIAL
            )


def test_more_noise_fewer_steps_and_larger_delta_cost_less(sgd: Sgd) -> None:
    noises = [epsilon(sgd(0.01, noise, 500), 1e-6) for noise in (0.5, 0.8, 0.81, 1.0, 2.0, 8.0)]
    steps = [epsilon(sgd(0.01, 1.0, steps), 1e-6) for steps in (5000, 1000, 999, 100, 10, 1)]
    deltas = [epsilon(sgd(0.01, 1.0, 500), delta) for delta in (1e-10, 1e-6, 9e-7, 1e-3)]
    deltas[1:3] = deltas[2:0:-1]
    rates = [epsilon(sgd(rate, 1.0, 500), 1e-6) for rate in (1.0, 0.5, 0.1, 0.01, 0.001)]
    for falling in (noises, steps, deltas, rates):
        assert all(a > b for a, b in itertools.pairwise(falling)), falling


@pytest.mark.parametrize(
    ("probability", "noise", "num_steps"),
    [(1.0, 0.01, 100), (0.5, 1.0, 10**6), (0.01, 0.05, 10**5), (1e-9, 0.01, 10**7)],
)
def test_hopeless_runs_are_bounded_without_exploding(
    probability: float, noise: float, num_steps: int, sgd: Sgd
) -> None:
    event = sgd(probability, noise, num_steps)
    found = epsilon(event, 1e-6)
    assert 500 < found <= RDPAccountant().guarantee(event, delta=1e-6).epsilon
    assert PLDAccountant().curve(event, num_steps=1, delta=1e-6).epsilon(1) == found


@pytest.mark.parametrize(
    ("probability", "noise", "num_steps"),
    [(1e-9, 1.0, 100), (0.5, 1e6, 100), (0.999999, 20.0, 1000), (1e-5, 0.3, 1000)],
)
def test_extreme_runs_are_costed(
    probability: float, noise: float, num_steps: int, sgd: Sgd
) -> None:
    event = sgd(probability, noise, num_steps)
    found = epsilon(event, 1e-6)
    assert 0 <= found <= RDPAccountant().guarantee(event, delta=1e-6).epsilon
