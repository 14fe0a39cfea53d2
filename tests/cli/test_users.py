"""``--privacy-unit user``: the accountant is asked about users, and the answer says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from hf_dp.accounting import accountant_named
from hf_dp.cli.sampled import RELATIONS, run_of
from hf_dp.cli.users import UserRun
from hf_dp.errors import ConfigurationError
from hf_dp.events import Gaussian, PoissonSampled, PoissonSampledContributions, SelfComposed

RUN = ["--sampling-probability", 0.01, "--num-steps", 100, "--delta", 1e-6]
USER = [*RUN, "--privacy-unit", "user"]
EXAMPLES = [*USER, "--user-sampling", "examples", "--max-examples-per-user", 8]
PLD = accountant_named("pld")


def test_a_users_examples_cost_what_the_accountant_says(hf_dp_program: Callable[..., Any]) -> None:
    answer = hf_dp_program("epsilon", *EXAMPLES, "--noise-multiplier", 3, "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    event = SelfComposed(PoissonSampledContributions(0.01, 8, Gaussian(3.0)), 100)
    assert found["epsilon"] == PLD.guarantee(event, delta=1e-6).epsilon
    plain = SelfComposed(PoissonSampled(0.01, Gaussian(3.0)), 100)
    assert found["epsilon"] > 3 * PLD.guarantee(plain, delta=1e-6).epsilon
    assert (found["unit"], found["user_sampling"]) == ("user", "examples")
    assert (found["max_examples_per_user"], found["sampling"]) == (8, "poisson")


@pytest.mark.parametrize("sampling", RELATIONS)
def test_drawn_users_cost_what_drawn_examples_do(
    hf_dp_program: Callable[..., Any], sampling: str
) -> None:
    options = ["--sampling", sampling, "--noise-multiplier", 3, "--json"]
    if sampling in ("fixed_size", "truncated_poisson"):
        options += ["--num-examples", 1000]
    of_users = json.loads(hf_dp_program("epsilon", *USER, *options).out)
    of_examples = json.loads(hf_dp_program("epsilon", *RUN, *options).out)
    assert of_users == of_examples | {"unit": "user", "user_sampling": "users"}
    capped = hf_dp_program("epsilon", *USER, *options, "--max-examples-per-user", 50)
    assert json.loads(capped.out)["epsilon"] == of_users["epsilon"]


def test_the_noise_for_users_meets_the_target(hf_dp_program: Callable[..., Any]) -> None:
    answer = hf_dp_program("noise", *EXAMPLES, "--target-epsilon", 2, "--json")
    found = json.loads(answer.out)
    event = PoissonSampledContributions(0.01, 8, Gaussian(found["noise_multiplier"]))
    assert PLD.guarantee(SelfComposed(event, 100), delta=1e-6).epsilon == found["epsilon"] <= 2


def test_the_sentence_speaks_of_users(hf_dp_program: Callable[..., Any]) -> None:
    drawn = hf_dp_program("epsilon", *USER, "--noise-multiplier", 3).out
    assert "differ by one user" in drawn
    assert "users being drawn" in drawn
    assert "example" not in drawn.split("Epsilon is")[1]
    owned = hf_dp_program("epsilon", *EXAMPLES, "--noise-multiplier", 3).out
    assert "differ by one user" in owned
    assert "examples, of which one user owns at most 8" in owned
    assert "max examples per user" in owned
    counted = (
        "the numbers of users and of the examples that they keep not being used to plan the run"
    )
    assert counted in " ".join(owned.split())
    assert "the number of users not being used to plan the run" in " ".join(drawn.split())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([*USER, "--user-sampling", "examples"], "Give --max-examples-per-user"),
        ([*EXAMPLES, "--sampling", "balls_in_bins"], "Give --sampling poisson, or --user-sampling"),
        ([*EXAMPLES[:-1], 0], "hf-dp.max_examples_per_user=0"),
        ([*USER, "--max-examples-per-user", 0], "hf-dp.max_examples_per_user=0"),
        ([*RUN, "--max-examples-per-user", 8], "Give --privacy-unit user"),
        ([*RUN, "--user-sampling", "users"], "Give --privacy-unit user"),
        ([*RUN, "--privacy-unit", "device"], "hf-dp.privacy_unit='device'"),
        ([*USER, "--user-sampling", "batches"], "hf-dp.user_sampling='batches'"),
        ([*EXAMPLES, "--accountant", "rdp"], "can cost it: pld"),
    ],
)
def test_what_does_not_fit_is_explained(
    hf_dp_program: Callable[..., Any], options: list[object], complaint: str
) -> None:
    for command in (["epsilon", "--noise-multiplier", 3], ["noise", "--target-epsilon", 2]):
        answer = hf_dp_program(*command, *options)
        assert answer.code == 2
        assert complaint in answer.err


def test_a_run_of_examples_without_a_cap_releases_nothing_that_can_be_costed() -> None:
    with pytest.raises(ConfigurationError, match="max_examples_per_user=None"):
        UserRun(run_of("poisson", 0.1, 5), "examples", None).event()
