"""The benchmark of few numbers: settings are run as often as it says, and the README says what came out."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.few_parameters import (
    DELTA,
    EPSILONS,
    NORMS,
    RECIPES,
    RESULTS,
    Setting,
    published,
    settings,
    sized,
    summaries,
)
from hf_dp.accounting import accountant_named

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_every_setting_was_run_as_often_as_it_says(kept: dict[str, Any]) -> None:
    wanted = Counter(one for recipe in RECIPES for one in settings(recipe, EPSILONS))
    ran = Counter(Setting(row["recipe"], row["epsilon"], row["noise"]) for row in kept["rows"])
    assert ran == wanted
    assert min(recipe.runs for recipe in RECIPES) >= 10


def test_no_run_spent_more_than_its_target(kept: dict[str, Any]) -> None:
    spent = [(row["epsilon_spent"], row["epsilon"]) for row in kept["rows"] if row["epsilon"]]
    assert all(0.999 * target < epsilon <= target for epsilon, target in spent)


@pytest.mark.parametrize("family", ["gaussian", "laplace"])
def test_published_counts_have_the_guarantee_and_the_noise(
    family: Any, kept: dict[str, Any]
) -> None:
    noise = sized(family, 0.3, 16)
    epsilon = accountant_named("pld").guarantee(noise.event(), delta=DELTA).epsilon
    assert 0.299 < epsilon <= 0.3
    counts = torch.arange(16.0)
    errors = torch.stack([published(noise, counts) - counts for _ in range(400)])
    assert torch.equal(counts, torch.arange(16.0))
    # 6,400 draws: off by 6% with probability below 1e-5, Laplace noise's kurtosis included
    assert float(errors.std()) == pytest.approx(noise.noise_multiplier, rel=0.06)
    (row,) = (
        row
        for row in kept["releases"]
        if (row["bins"], row["epsilon"], row["noise"]) == (16, 0.3, family)
    )
    assert row["noise_multiplier"] == noise.noise_multiplier


def test_laplace_noise_is_least_for_counts_and_the_gaussian_for_training(
    kept: dict[str, Any],
) -> None:
    errors = {(r["counts"], r["epsilon"], r["noise"]): r["mean_error"] for r in kept["releases"]}
    for name, epsilon, noise in errors:
        if noise == "laplace":
            assert errors[name, epsilon, "gaussian"] > 3 * errors[name, epsilon, noise]
    found = summaries(kept["rows"])
    assert found[Setting("one step", 0.1, "laplace")].noise < 0.6
    assert found[Setting("one step", 0.1, "auto")].kind == "Laplace"
    assert found[Setting("fifty steps", 0.1, "laplace")].noise > 1.4
    assert found[Setting("fifty steps", 0.1, "auto")].kind == "Gaussian"


def test_the_readme_shows_what_was_measured(kept: dict[str, Any]) -> None:
    found = summaries(kept["rows"])
    for recipe in RECIPES:
        for epsilon in EPSILONS:
            cells = [f"{recipe.name}", f"{epsilon:g}"]
            for noise in NORMS:
                one = found[Setting(recipe.name, epsilon, noise)]
                cells.append(f"{one.mean:.1f} ({one.deviation:.1f})")
            one = found[Setting(recipe.name, epsilon, "laplace")]
            cells.append(f"{one.gain:+.1f} ({one.twice_standard_error:.1f})")
            assert f"| {' | '.join(cells)} |" in README
    text = " ".join(README.split())
    for noise, words in (("gaussian", "Gaussian noise"), ("laplace", "Laplace noise")):
        errors = [
            statistics.mean(
                row["mean_error"]
                for row in kept["releases"]
                if (row["noise"], row["epsilon"]) == (noise, epsilon)
            )
            for epsilon in EPSILONS
        ]
        assert f"{errors[0]:.0f}, {errors[1]:.0f} and {errors[2]:.0f} with {words}" in text


def test_what_is_said_to_be_more_than_chance_is(kept: dict[str, Any]) -> None:
    found = summaries(kept["rows"])

    def beyond(recipe: str, epsilon: float) -> bool:
        one = found[Setting(recipe, epsilon, "laplace")]
        return abs(one.gain) > one.twice_standard_error

    assert all(beyond("one step", epsilon) for epsilon in EPSILONS)
    assert [beyond("three steps", epsilon) for epsilon in EPSILONS] == [False, False, True]
    assert [beyond("fifty steps", epsilon) for epsilon in EPSILONS] == [False, True, False]
    without = [row["accuracy"] for row in kept["rows"] if row["noise"] == "none"]
    assert {round(100 * accuracy) for accuracy in without} == {71}
    assert found[Setting("three steps", 0.3, "laplace")].noise == pytest.approx(0.8, abs=0.05)


def test_difference_and_its_error_are_those_of_the_runs() -> None:
    def row(noise: str, accuracy: float, size: float) -> dict[str, Any]:
        setting = {"recipe": "one step", "epsilon": 0.1, "noise": noise, "kind": "LaplaceNoise"}
        sizes = {"noise_multiplier": size, "clipping_norm": 2.0}
        return {**setting, **sizes, "accuracy": accuracy, "loss": 0.5}

    rows = [row("gaussian", a, 4.0) for a in (0.5, 0.7)]
    rows += [row("laplace", a, 1.0) for a in (0.7, 0.8)]
    found = summaries(rows)[Setting("one step", 0.1, "laplace")]
    assert found.gain == pytest.approx(15.0)
    assert found.noise == 0.25
    assert found.twice_standard_error == pytest.approx(2 * (200 / 2 + 50 / 2) ** 0.5)
