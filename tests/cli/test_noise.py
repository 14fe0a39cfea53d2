"""``hf-dp noise``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from hf_dp.accounting import accountant_named
from hf_dp.cli.run import PoissonRun

WORDS = ["noise", "--sampling-probability", "0.01", "--num-steps", "300", "--delta", "1e-6"]


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_the_noise_meets_the_target(hf_dp_program: Callable[..., Any], accountant: str) -> None:
    answer = hf_dp_program(*WORDS, "--target-epsilon", 2, "--accountant", accountant, "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    run = PoissonRun(0.01, 300, found["noise_multiplier"])
    expected = accountant_named(accountant).guarantee(run.event(), delta=1e-6).epsilon
    assert found["epsilon"] == expected <= 2.0
    less = run.with_noise_multiplier(run.noise_multiplier * 0.999)
    assert accountant_named(accountant).guarantee(less.event(), delta=1e-6).epsilon > 2.0
    assert (found["accountant"], found["is_upper_bound"]) == (accountant, True)
    assert (found["delta"], found["num_steps"], found["sampling_probability"]) == (1e-6, 300, 0.01)


def test_the_table_shows_the_noise(hf_dp_program: Callable[..., Any]) -> None:
    as_json = hf_dp_program(*WORDS, "--target-epsilon", 2, "--json")
    noise = json.loads(as_json.out)["noise_multiplier"]
    assert str(noise) in hf_dp_program(*WORDS, "--target-epsilon", 2).out


@pytest.mark.parametrize("target", [0, -1, "nan", "1e-9"])
def test_targets_that_cannot_be_met_are_explained(
    hf_dp_program: Callable[..., Any], target: object
) -> None:
    many = ("--sampling-probability", 0.5, "--num-steps", 10**6, "--delta", 1e-9)
    answer = hf_dp_program(*WORDS, *many, "--target-epsilon", target, "--json")
    assert answer.code == 2
    assert "target_epsilon" in answer.err
    assert answer.out == ""
