"""``hf-dp steps``, ``batch-size``, ``tuning`` and what ``epsilon`` says of estimates."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from hf_dp.accounting import accountant_named

Program = Callable[..., Any]
TARGET = ["--target-epsilon", "2", "--delta", "1e-6", "--noise-multiplier", "1.0"]
RUN = ["--sampling-probability", "0.01", "--noise-multiplier", "1.0", "--num-steps", "500"]


def test_steps_are_within_the_target(hf_dp_program: Program) -> None:
    answer = hf_dp_program("steps", "--sampling-probability", 0.01, *TARGET, "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert found["num_steps"] > 100
    assert 1.99 < found["epsilon"] <= 2.0
    assert (
        str(found["num_steps"])
        in hf_dp_program("steps", "--sampling-probability", 0.01, *TARGET).out
    )


def test_batches_are_within_the_target(hf_dp_program: Program) -> None:
    words = ["batch-size", "--num-examples", 10_000, "--num-steps", 300, *TARGET]
    found = json.loads(hf_dp_program(*words, "--json").out)
    assert found["expected_batch_size"] == pytest.approx(1e4 * found["sampling_probability"])
    assert 1.99 < found["epsilon"] <= 2.0


def test_the_price_of_the_best_run(hf_dp_program: Program) -> None:
    words = ["tuning", *RUN, "--delta", "1e-6", "--num-runs", "8"]
    found = json.loads(hf_dp_program(*words, "--json").out)
    assert found["epsilon_of_one_run"] < found["epsilon"] < found["epsilon_of_all_runs"]
    table = hf_dp_program(*words).out
    assert "the best of about 8 runs" in table
    assert "Proven upper bounds" in table
    assert "RandomRepeats.mean" in hf_dp_program(*words[:-1], "1", "--json").err


def test_an_estimate_is_printed_as_one(hf_dp_program: Program) -> None:
    words = ["epsilon", *RUN, "--delta", "1e-6", "--accountant"]
    found = json.loads(hf_dp_program(*words, "gdp", "--json").out)
    assert (found["epsilon"], found["is_upper_bound"]) == (None, False)
    table = hf_dp_program(*words, "gdp").out
    assert "estimate" in table
    assert "bounds nothing" in table
    assert "no epsilon is guaranteed" in table


def test_edgeworth_prints_all_three_numbers(hf_dp_program: Program) -> None:
    words = ["epsilon", *RUN, "--delta", "1e-5", "--accountant", "edgeworth"]
    found = json.loads(hf_dp_program(*words, "--json").out)
    assert 0 < found["lower"] < found["epsilon"]
    assert found["estimate"] != found["epsilon"]
    table = hf_dp_program(*words).out
    assert "proven: no smaller epsilon holds" in table
    assert "bounds nothing" in table


def test_an_estimator_chooses_nothing(hf_dp_program: Program) -> None:
    answer = hf_dp_program("steps", "--sampling-probability", 0.01, *TARGET, "--accountant", "gdp")
    assert answer.code == 2
    assert "Use accountant='pld'" in answer.err
    with pytest.raises(Exception, match="gdp"):
        accountant_named("gdp")
