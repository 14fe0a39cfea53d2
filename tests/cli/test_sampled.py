"""``--sampling``: the command line asks the accountants what DPTrainer would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_dp.accounting import accountant_named
from hf_dp.cli.answer import _SAMPLINGS
from hf_dp.cli.run import PoissonRun
from hf_dp.cli.sampled import RELATIONS, SampledRun, run_of
from hf_dp.errors import ConfigurationError
from hf_dp.events import NeighboringRelation

WORDS = ["--sampling-probability", 0.1, "--num-steps", 25, "--delta", 1e-5, "--json"]
MORE: dict[str, list[object]] = {
    "balls_in_bins": [],
    "shuffled": [],
    "truncated_poisson": ["--num-examples", 80],
    "fixed_size": ["--num-examples", 80],
}


@pytest.mark.parametrize("sampling", RELATIONS)
def test_the_command_line_plans_as_the_trainer_does(sampling: str, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from hf_dp import DPArguments
    from hf_dp.training.arguments import SAMPLINGS
    from hf_dp.training.planning import plan_for, schedule

    dp_args = DPArguments(noise_multiplier=2.0, sampling=sampling, expected_batch_size=8)
    host = TrainingArguments(str(tmp_path), max_steps=25, use_cpu=True, report_to=[])
    when = schedule(host, dp_args, given=None, accumulation=1, num_examples=80)
    plan = plan_for(dp_args, when, accountant_named("pld"), 1.0)
    units = 80 if sampling in ("truncated_poisson", "fixed_size") else None
    asked = run_of(sampling, 0.1, 25, num_examples=units, noise_multiplier=2.0)
    assert asked.event() == plan.event()
    assert set(SAMPLINGS) == set(RELATIONS) == set(_SAMPLINGS)


@pytest.mark.parametrize("sampling", MORE)
def test_json_is_the_accountants_answer(hf_dp_program: Callable[..., Any], sampling: str) -> None:
    options = ["--sampling", sampling, *MORE[sampling]]
    answer = hf_dp_program("epsilon", "--noise-multiplier", 2, *WORDS, *options)
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    run = run_of(
        sampling, 0.1, 25, num_examples=80 if MORE[sampling] else None, noise_multiplier=2.0
    )
    exact = accountant_named("pld").guarantee(run.event(), delta=1e-5, relation=run.relation)
    assert found["epsilon"] == exact.epsilon
    assert (found["sampling"], found["relation"]) == (sampling, str(RELATIONS[sampling]))


@pytest.mark.parametrize("sampling", MORE)
def test_the_noise_meets_the_target(hf_dp_program: Callable[..., Any], sampling: str) -> None:
    options = ["--sampling", sampling, *MORE[sampling]]
    answer = hf_dp_program("noise", "--target-epsilon", 2, *WORDS, *options)
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert 1.99 < found["epsilon"] <= 2.0
    assert found["noise_multiplier"] > 0


def test_shuffling_and_full_batches_take_more_noise(hf_dp_program: Callable[..., Any]) -> None:
    def noise(sampling: str) -> float:
        options = ["--sampling", sampling, *MORE.get(sampling, [])]
        answer = hf_dp_program("noise", "--target-epsilon", 2, *WORDS, *options)
        return float(json.loads(answer.out)["noise_multiplier"])

    poisson = noise("poisson")
    assert noise("shuffled") > 2 * poisson
    assert noise("fixed_size") > 1.9 * poisson
    assert 0.8 * poisson < noise("balls_in_bins") < 1.2 * poisson


def test_the_table_says_how_batches_are_drawn(hf_dp_program: Callable[..., Any]) -> None:
    words = [*WORDS[:-1], "--noise-multiplier", 2, "--sampling", "shuffled"]
    answer = hf_dp_program("epsilon", *words)
    assert "shuffled passes, from which privacy gains nothing" in answer.out
    assert "replaced by one that contributes nothing" in answer.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sampling", "poison"], "Did you mean 'poisson'?"),
        (["--sampling", "fixed_size"], "num_examples=None"),
        (["--sampling", "truncated_poisson"], "num_examples=None"),
        (["--sampling", "fixed_size", "--num-examples", 85], "a whole number of 85 examples"),
        (["--max-batch-size", 5], "Only 'truncated_poisson' has a cap"),
        (["--sampling", "shuffled", "--num-steps", 0], "num_steps=0"),
        (["--sampling", "balls_in_bins", "--sampling-probability", 2], "probability=2.0"),
        (["--sampling", "balls_in_bins", "--accountant", "rdp"], "can cost it: pld"),
    ],
)
def test_what_does_not_fit_is_explained(
    hf_dp_program: Callable[..., Any], options: list[object], message: str
) -> None:
    answer = hf_dp_program("epsilon", "--noise-multiplier", 2, *WORDS, *options)
    assert answer.code == 2
    assert answer.err.startswith("Error: ")
    assert message in answer.err
    assert answer.out == ""


def test_a_run_with_the_usual_sampling_is_what_it_was() -> None:
    assert run_of("poisson", 0.1, 25, noise_multiplier=2.0) == PoissonRun(0.1, 25, 2.0)
    assert RELATIONS["poisson"] is NeighboringRelation.ADD_OR_REMOVE_ONE
    with pytest.raises(ConfigurationError):
        SampledRun("fixed_size", 0.1, 5).event()


def test_a_cap_of_nobody_is_refused_and_not_replaced_by_the_default() -> None:
    with pytest.raises(ConfigurationError, match="max_batch_size=0"):
        run_of("truncated_poisson", 0.1, 25, num_examples=80, max_batch_size=0).event()


@pytest.mark.parametrize("sampling", ["fixed_size", "truncated_poisson"])
@pytest.mark.parametrize("units", [0, -5])
def test_data_of_no_size_is_refused(sampling: str, units: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"hf-dp\.num_examples={units}"):
        run_of(sampling, 0.1, 25, num_examples=units).event()
