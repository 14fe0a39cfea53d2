"""``hf-dp epsilon``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from hf_dp.accounting import Guarantee, accountant_named
from hf_dp.accounting.shown import rounded_up
from hf_dp.cli.answer import show
from hf_dp.cli.run import PoissonRun

OPTIONS = {
    "--sampling-probability": "0.01",
    "--noise-multiplier": "0.9",
    "--num-steps": "500",
    "--delta": "1e-6",
}
RUN = PoissonRun(0.01, 500, 0.9)


def words(options: dict[str, str]) -> list[str]:
    return ["epsilon", *(word for pair in options.items() for word in pair)]


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_json_is_the_accountants_answer(hf_dp_program: Callable[..., Any], accountant: str) -> None:
    answer = hf_dp_program(*words(OPTIONS), "--accountant", accountant, "--json")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.count("\n") == 1
    expected = accountant_named(accountant).guarantee(RUN.event(), delta=1e-6)
    assert json.loads(answer.out) == {
        "epsilon": expected.epsilon,
        "delta": 1e-6,
        "noise_multiplier": 0.9,
        "sampling": "poisson",
        "sampling_probability": 0.01,
        "num_steps": 500,
        "accountant": accountant,
        "is_upper_bound": True,
        "unit": "example",
        "relation": "add_or_remove_one",
    }


def test_the_default_accountant_is_pld(hf_dp_program: Callable[..., Any]) -> None:
    assert json.loads(hf_dp_program(*words(OPTIONS), "--json").out)["accountant"] == "pld"


def test_the_table_says_what_epsilon_is_about(hf_dp_program: Callable[..., Any]) -> None:
    answer = hf_dp_program(*words(OPTIONS))
    assert (answer.code, answer.err) == (0, "")
    epsilon = accountant_named("pld").guarantee(RUN.event(), delta=1e-6).epsilon
    for part in (rounded_up(epsilon, digits=5), "1e-06", "0.9", "0.01", "500"):
        assert part in answer.out
    for part in ("proven upper bound", "'pld'", "by one example, there or not", "Poisson"):
        assert part in answer.out


@pytest.mark.parametrize("missing", OPTIONS)
def test_every_number_must_be_given(hf_dp_program: Callable[..., Any], missing: str) -> None:
    given = {name: value for name, value in OPTIONS.items() if name != missing}
    answer = hf_dp_program(*words(given), "--json")
    assert answer.code == 2
    assert f"Missing option '{missing}'" in answer.err
    assert answer.out == ""


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--sampling-probability", "0", "PoissonSampled.sampling_probability=0.0"),
        ("--sampling-probability", "1.5", "PoissonSampled.sampling_probability=1.5"),
        ("--noise-multiplier", "0", "Gaussian.noise_multiplier=0.0"),
        ("--noise-multiplier", "nan", "Gaussian.noise_multiplier=nan"),
        ("--num-steps", "0", "SelfComposed.count=0"),
        ("--delta", "1", "PLDAccountant.delta=1.0"),
        ("--delta", "1e-14", "Use the accountant 'rdp'"),
        ("--accountant", "pdl", "Did you mean 'pld'?"),
    ],
)
def test_numbers_out_of_range_are_explained(
    hf_dp_program: Callable[..., Any], option: str, value: str, message: str
) -> None:
    answer = hf_dp_program(*words({**OPTIONS, option: value}), "--json")
    assert answer.code == 2
    assert answer.err.startswith("Error: ")
    assert message in answer.err
    assert answer.out == ""


@pytest.mark.parametrize("epsilon", [1.8282301, 0.0173212, 9.99996, 123.4561, 2.0, 1e-9])
def test_a_printed_bound_is_still_a_bound(epsilon: float) -> None:
    assert epsilon <= float(rounded_up(epsilon, digits=5)) <= epsilon * 1.0001


def test_an_infinite_epsilon_is_null_in_json_and_inf_in_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    unbounded = Guarantee(float("inf"), 1e-6, True, "pld")
    show(RUN, unbounded, as_json=True)
    assert json.loads(capsys.readouterr().out)["epsilon"] is None
    show(RUN, unbounded, as_json=False)
    assert "inf" in capsys.readouterr().out


def test_what_is_not_proven_is_not_called_a_bound(capsys: pytest.CaptureFixture[str]) -> None:
    show(RUN, Guarantee(1.0, 1e-6, False, "other"), as_json=False)
    assert "not proven to be an upper bound" in capsys.readouterr().out


def test_a_delta_that_may_reveal_anything_is_pointed_out(hf_dp_program: Callable[..., Any]) -> None:
    words = ["epsilon", "--sampling-probability", "0.01", "--noise-multiplier", "1"]
    words += ["--num-steps", "10", "--delta"]
    assert "anything may be revealed" in hf_dp_program(*words, "0.5").out
    assert "anything may be revealed" not in hf_dp_program(*words, "1e-6").out
