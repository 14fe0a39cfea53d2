"""The offline search: certified, never worse than the Gaussian, and honest about why."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from searches import searched, spent

from hf_dp.accounting.pld import PLDAccountant
from hf_dp.errors import ConfigurationError, PrivacyError
from hf_dp.events import (
    Gaussian,
    NeighboringRelation,
    PrivacyEvent,
    SelfComposed,
    Shuffled,
)
from hf_dp.noise import GaussianNoise, LaplaceNoise, ScaleMixtureNoise
from hf_dp.noise.candidates import FAMILIES
from hf_dp.noise.figures import Figures, law_of
from hf_dp.noise.search import BUDGET, search_noise
from hf_dp.noise.shapes import HOPELESS, LEAST, MOST, STARTS, best_shape, law_at
from hf_dp.noise.why import value_of
from hf_dp.scale_law import ScaleLaw

REGIMES = [
    (1.0, 1e-5, 1.0, 1, {"dimension": 1}),
    (1.0, 1e-5, 1.0, 10, {"dimension": 1, "norm": "l2"}),
    (3.0, 1e-5, 0.01, 100, {}),
    (0.3, 1e-10, 0.01, 100, {"norm": "l1", "dimension": 64}),
    (1.0, 1e-10, 1.0, 1, {"dimension": 8}),
    (1.0, 1e-5, 0.01, 100, {"dimension": 1024}),
    (1.0, 1e-5, 1.0, 1, {"norm": "l1", "dimension": 3, "draw": "shared"}),
    (1.0, 1e-5, 1.0, 1, {"objective": "usefulness", "radius": 0.7}),
    (1.0, 1e-5, 1.0, 10, {"objective": "mean_absolute"}),
    (1.0, 1e-5, 1.0, 10, {"objective": "entropy"}),
]


@pytest.mark.parametrize(("epsilon", "delta", "probability", "steps", "more"), REGIMES)
def test_the_winner_is_never_worse_than_the_gaussian(
    epsilon: float, delta: float, probability: float, steps: int, more: dict[str, Any]
) -> None:
    found = searched(epsilon, delta, probability, steps, **more)
    gaussian = found.of("gaussian")
    assert gaussian is not None
    objective = found.question.objective
    assert value_of(found.winner, objective) <= value_of(gaussian, objective)
    for candidate in found.candidates:
        assert candidate.epsilon == spent(found, probability, candidate.family) <= epsilon


def test_the_winner_is_certified_by_the_accountant() -> None:
    found = searched()
    assert found.winner.family == "laplace"
    mechanism = found.mechanism
    assert isinstance(mechanism, LaplaceNoise)
    # One number with Laplace noise: delta(epsilon) = 1 - exp((epsilon - 1 / b) / 2), exactly.
    loss = math.sqrt(2) / mechanism.noise_multiplier
    assert loss + 2 * math.log1p(-1e-5) <= found.winner.epsilon <= 1.0
    assert found.winner.epsilon == pytest.approx(loss, rel=1e-4)


def test_a_search_that_skips_certification_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: PLDAccountant, plan: Any, **targets: float) -> Any:
        honest = calibrate(self, plan, **targets)
        return honest.with_noise_multiplier(honest.noise.noise_multiplier * 0.9)

    calibrate = PLDAccountant.calibrate
    monkeypatch.setattr(PLDAccountant, "calibrate", careless)
    with pytest.raises(PrivacyError, match=r"search_noise\.epsilon=.*at most the target 1\.0"):
        searched()
    # Were the search to take the accountant's choice unseen, the tests above would see it.
    monkeypatch.setattr(
        PLDAccountant,
        "guarantee",
        lambda self, event, *, delta, **more: Known(epsilon=1.0),
    )
    found = searched(families=("gaussian", "laplace"))
    monkeypatch.undo()
    assert spent(found, 1.0, "gaussian") > 1.0
    assert spent(found, 1.0, "laplace") > 1.0


class Known:
    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epsilon", "probability", "steps", "ratio"),
    [(3.0, 0.01, 100, 0.998), (6.0, 1.0, 1, 0.965)],
)
def test_for_one_number_mixtures_are_little_better_than_plain_laplace_up_to_epsilon_six(
    epsilon: float, probability: float, steps: int, ratio: float
) -> None:
    found = searched(epsilon, 1e-5, probability, steps, dimension=1, budget=60)
    mixture, plain = found.of("lmo"), found.of("laplace")
    assert mixture is not None
    assert plain is not None
    gain = mixture.figures.deviation / plain.figures.deviation
    assert ratio - 0.01 < gain < ratio + 0.002


@pytest.mark.slow
def test_the_mean_absolute_value_gains_most_where_epsilon_is_large() -> None:
    found = searched(6.0, dimension=1, objective="mean_absolute", budget=60)
    plain = found.of("laplace")
    assert plain is not None
    assert found.winner.family == "lmo"
    assert found.winner.figures.mean_absolute < 0.84 * plain.figures.mean_absolute


def test_where_epsilon_is_large_a_mixture_has_far_less_noise_than_laplace() -> None:
    law = ScaleLaw(2.202, 17.4, 0.0908, 0.889, 1.066)  # found for epsilon 10 and delta 1e-5
    epsilon = PLDAccountant().guarantee(event_of(law), delta=1e-5).epsilon
    assert epsilon == pytest.approx(10, rel=2e-3)
    assert law.deviation < 0.62 * math.sqrt(2) / 10
    # Of one number with noise of density f: the integral of (f(x) - e^epsilon f(x - 1))+.
    x = np.linspace(-2, 3, 2_000_001)
    excess = law.density(x) - math.exp(epsilon) * law.density(x - 1)
    delta = float(np.sum(np.maximum(excess, 0)) * (x[1] - x[0]))
    assert delta == pytest.approx(1e-5, rel=0.02)


def event_of(law: ScaleLaw) -> PrivacyEvent:
    return ScaleMixtureNoise(law, dimension=1).event()


def test_families_can_be_chosen() -> None:
    assert isinstance(searched(families=("lmo",)).mechanism, ScaleMixtureNoise)
    only = searched(families=("gaussian",), norm="l1")
    assert only.mechanism == GaussianNoise(3.7307, norm="l1")
    assert [one.family for one in searched(families=("laplace", "gaussian")).candidates] == [
        "gaussian",
        "laplace",
    ]
    with pytest.raises(ConfigurationError, match=r"search_noise\.families='lap'.*Did you mean"):
        searched(families=("lap",))


def test_what_cannot_be_accounted_for_is_no_candidate_and_the_reason_is_given() -> None:
    class OnlyGaussian(PLDAccountant):
        def supports(self, leaf: PrivacyEvent) -> bool:
            return "Laplace" not in repr(leaf)

    found = searched(accountant=OnlyGaussian())
    assert [one.family for one in found.candidates] == ["gaussian"]
    assert set(found.refused) == {"laplace", "lmo"}
    assert any("is no candidate: OnlyGaussian.event" in line for line in found.why())
    with pytest.raises(ConfigurationError, match=r"families=\('lmo',\): expected a family that"):
        searched(accountant=OnlyGaussian(), families=("lmo",))


def test_a_sampler_is_whatever_wraps_the_event() -> None:
    found = search_noise(
        target_epsilon=1.0,
        target_delta=1e-5,
        step=lambda event: Shuffled(10, event),
        num_steps=2,
        norm="l2",
        dimension=1,
        accountant=PLDAccountant(),
        relation=NeighboringRelation.REPLACE_SPECIAL,
        families=("gaussian", "laplace"),
    )
    event = SelfComposed(Shuffled(10, found.mechanism.event()), 2)
    relation = NeighboringRelation.REPLACE_SPECIAL
    certified = PLDAccountant().guarantee(event, delta=1e-5, relation=relation)
    assert certified.epsilon == found.winner.epsilon


def test_the_clipping_norm_scales_the_figures_and_nothing_else() -> None:
    one, three = searched(), searched(clipping_norm=3.0)
    assert three.mechanism == one.mechanism
    assert three.winner.figures.deviation == pytest.approx(3 * one.winner.figures.deviation)
    scaled = searched(clipping_norm=3.0, objective="usefulness", radius=2.1).winner.figures
    plain = searched(objective="usefulness", radius=0.7).winner.figures
    assert scaled.usefulness == pytest.approx(plain.usefulness)


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("target_epsilon", {"epsilon": 0.0}),
        ("num_steps", {"num_steps": 0}),
        ("dimension", {"dimension": 0}),
        ("norm", {"norm": "l3"}),
        ("draw", {"draw": "each"}),
        ("objective", {"objective": "std"}),
        ("radius", {"objective": "usefulness"}),
        ("radius", {"radius": -1.0}),
        ("clipping_norm", {"clipping_norm": 0.0}),
        ("budget", {"budget": 0}),
    ],
)
def test_a_question_without_answer_is_refused(field: str, more: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=rf"search_noise\.{field}="):
        searched(**more)


def test_progress_ends_at_what_was_planned() -> None:
    seen: list[tuple[int, int]] = []
    searched(progress=lambda done, planned: seen.append((done, planned)), budget=7)
    assert seen[0] == (1, 7)
    assert seen[-1] == (7, 7)
    # Where mixtures are far behind, only the starts are tried.
    seen.clear()
    far = searched(
        0.1, num_steps=10, norm="l2", dimension=10**6, budget=40, progress=lambda *x: seen.append(x)
    )
    assert far.shapes_tried == len(STARTS)
    assert seen[-1] == (40, 40)


def test_figures_agree_with_draws() -> None:
    generator = np.random.default_rng(5)
    law = ScaleLaw(gamma_shape=4.0, gamma_scale=0.2, uniform_low=0.5, uniform_high=1.0)
    scales = generator.gamma(4.0, 0.2, 400_000) + generator.uniform(0.5, 1.0, 400_000)
    cases = (
        (ScaleMixtureNoise(law), generator.laplace(0, 1 / scales)),
        (LaplaceNoise(2.0), generator.laplace(0, math.sqrt(2), 400_000)),
        (GaussianNoise(2.0), generator.normal(0, 2, 400_000)),
    )
    for mechanism, draws in cases:
        figures = Figures.of(mechanism, clipping_norm=3.0, radius=4.0)
        assert np.std(3 * draws) == pytest.approx(figures.deviation, rel=0.01)
        assert np.mean(np.abs(3 * draws)) == pytest.approx(figures.mean_absolute, rel=0.01)
        assert np.mean(np.abs(3 * draws) <= 4) == pytest.approx(figures.usefulness, abs=0.004)
        assert figures.beyond == pytest.approx(1 - figures.usefulness)
    # Closed forms: log(2 e b) for a Laplace, log(sigma sqrt(2 pi e)) for a Gaussian.
    laplace, gaussian = (Figures.of(one) for one in (LaplaceNoise(2.0), GaussianNoise(2.0)))
    assert laplace.entropy == pytest.approx(math.log(2 * math.e * math.sqrt(2)), abs=1e-9)
    assert gaussian.entropy == pytest.approx(math.log(2 * math.sqrt(2 * math.pi * math.e)))
    with pytest.raises(TypeError, match="GaussianNoise is not Laplace noise"):
        law_of(GaussianNoise(1.0))


def test_shapes_are_laws_of_mean_one_with_a_variance() -> None:
    generator = np.random.default_rng(1)
    for point in generator.normal(0, 20, (50, 4)):
        law = law_at(point)
        assert law.mean == pytest.approx(1)
        assert math.isfinite(law.deviation)
    assert law_at(np.array([0.0, LEAST - 9, MOST + 9, 0])) == law_at(np.array([0, LEAST, MOST, 0]))


def test_a_search_is_deterministic_keeps_its_budget_and_stops_where_it_is_hopeless() -> None:
    tried: list[ScaleLaw] = []

    def score(law: ScaleLaw) -> float:
        tried.append(law)
        return abs(law.exponential_mean - 0.3) + abs(law.uniform_low - 0.2)

    found, count = best_shape(score, budget=50, good_enough=math.inf)
    assert count == len(tried) <= 50
    assert score(found) < 0.02
    assert best_shape(score, budget=50, good_enough=math.inf)[0] == found
    assert best_shape(score, budget=3, good_enough=math.inf)[1] == 3
    assert best_shape(score, budget=50, good_enough=-1.0)[1] == len(STARTS)
    assert best_shape(lambda law: HOPELESS, budget=50, good_enough=math.inf)[1] == len(STARTS)


@pytest.mark.parametrize(
    ("more", "family", "words"),
    [
        ({}, "laplace", "privacy loss of Laplace noise is bounded"),
        ({"num_steps": 100}, "gaussian", "What 100 releases tell together"),
        ({"dimension": 1000, "norm": "l2"}, "gaussian", "spread over all 1000 coordinates"),
        ({"families": ("lmo",)}, "lmo", "No plain Laplace noise was asked for"),
        ({"families": ("gaussian",)}, "gaussian", "the only candidate"),
    ],
)
def test_the_reason_is_that_of_the_regime(more: dict[str, Any], family: str, words: str) -> None:
    found = searched(**more)
    assert found.winner.family == family
    text = "\n".join(found.why())
    assert words in text
    assert "Where Laplace noise wins" in text


def test_what_a_mixture_gained_is_said() -> None:
    found = searched(6.0, dimension=1, objective="mean_absolute", budget=4)
    assert found.winner.family == "lmo"
    assert "sharper peak at 0" in "\n".join(found.why())


def test_all_families_are_candidates_by_default() -> None:
    assert tuple(one.family for one in searched().candidates) == FAMILIES
    assert BUDGET == 60
    assert Gaussian(3.7307) == searched().candidates[0].mechanism.event()
