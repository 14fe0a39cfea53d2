"""``--noise laplace`` of ``hf-dp epsilon`` and ``hf-dp noise``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from hf_dp.accounting import accountant_named
from hf_dp.events import Laplace, PoissonSampled, SelfComposed

STEPS = ["--sampling-probability", "0.05", "--num-steps", "40", "--delta", "1e-6"]
EPSILON = ["epsilon", *STEPS, "--noise-multiplier", "2.5", "--noise", "laplace"]
NOISE = ["noise", *STEPS, "--target-epsilon", "2", "--noise", "laplace"]

Program = Callable[..., Any]


def expected(noise: Laplace, accountant: str = "pld") -> float:
    event = SelfComposed(PoissonSampled(0.05, noise), 40)
    return accountant_named(accountant).guarantee(event, delta=1e-6).epsilon


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
    ("options", "noise"),
    [
        ([], Laplace(2.5)),
        (["--norm", "l1", "--dimension", "7"], Laplace(2.5, "l1", 7)),
        (["--norm", "l2"], Laplace(2.5, "l2")),
        (["--norm", "l2", "--dimension", "3"], Laplace(2.5, "l2", 3)),
    ],
    ids=str,
)
def test_json_is_the_accountants_answer(
    hf_dp_program: Program, options: list[str], noise: Laplace, accountant: str
) -> None:
    answer = hf_dp_program(*EPSILON, *options, "--accountant", accountant, "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert found["epsilon"] == expected(noise, accountant)
    assert (found["noise"], found["norm"]) == ("laplace", noise.norm)
    assert found.get("dimension") == noise.dimension
    assert found["noise_multiplier"] == 2.5


def test_the_table_names_the_noise(hf_dp_program: Program) -> None:
    out = hf_dp_program(*EPSILON, "--norm", "l2", "--dimension", "3").out
    for part in ("laplace", "l2", "dimension"):
        assert part in out


@pytest.mark.parametrize("options", [[], ["--norm", "l2", "--dimension", "4"]], ids=str)
def test_the_noise_meets_the_target(hf_dp_program: Program, options: list[str]) -> None:
    found = json.loads(hf_dp_program(*NOISE, *options, "--json").out)
    norm, dimension = ("l2", 4) if options else ("l1", None)
    noise = Laplace(found["noise_multiplier"], norm, dimension)  # type: ignore[arg-type]
    assert found["epsilon"] == expected(noise) <= 2


def test_a_shuffled_run_counts_passes(hf_dp_program: Program) -> None:
    found = json.loads(hf_dp_program(*EPSILON, "--sampling", "shuffled", "--json").out)
    twice = accountant_named("pld").guarantee(SelfComposed(Laplace(2.5), 2), delta=1e-6)
    assert found["epsilon"] == twice.epsilon


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*EPSILON[:-1], "laplac"], "Did you mean 'laplace'?"),
        ([*EPSILON, "--norm", "l3"], "hf-dp.norm='l3'"),
        ([*EPSILON, "--dimension", "0"], "Laplace.dimension=0"),
        ([*EPSILON[:-2], "--norm", "l1"], "nothing with noise 'gaussian'"),
        ([*EPSILON[:-2], "--dimension", "3"], "nothing with noise 'gaussian'"),
        ([*EPSILON, "--sampling", "balls_in_bins"], "use sampling='poisson'"),
        ([*NOISE, "--sampling", "balls_in_bins"], "use sampling='poisson'"),
        ([*EPSILON, "--accountant", "edgeworth"], "Accountants that can cost it: pld, rdp"),
        (
            [*EPSILON, "--privacy-unit", "user", "--user-sampling", "examples",
             "--max-examples-per-user", "3"],
            "draw users instead of examples",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_has_no_proof_is_refused(
    hf_dp_program: Program, words: list[str], message: str
) -> None:
    answer = hf_dp_program(*words)
    assert answer.code != 0
    assert message in answer.err
    assert answer.out == ""
