"""``hf-dp plan-users`` prints what `plan_users` says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_dp.accounting.user_planner import plan_users

WORDS = ["--examples-per-step", 20, "--num-steps", 50, "--target-epsilon", 4, "--delta", 1e-4]
ALIKE = ["--num-users", 100, "--examples-per-user", 3]


def expected(sizes: list[int]) -> Any:
    plan = plan_users(
        sizes, examples_per_step=20, num_steps=50, target_epsilon=4.0, target_delta=1e-4
    )
    return json.loads(json.dumps(dataclasses.asdict(plan)))


def test_json_is_the_plan(hf_dp_program: Callable[..., Any], tmp_path: Path) -> None:
    answer = hf_dp_program("plan-users", *WORDS, *ALIKE, "--json")
    assert (answer.code, answer.err) == (0, "")
    assert json.loads(answer.out) == expected([3] * 100)


@pytest.mark.parametrize("text", ["1\n2\n3\n" * 30, json.dumps([1, 2, 3] * 30)])
def test_sizes_are_read_from_a_file(
    hf_dp_program: Callable[..., Any], tmp_path: Path, text: str
) -> None:
    path = tmp_path / "sizes"
    path.write_text(text)
    answer = hf_dp_program("plan-users", *WORDS, "--user-sizes", path, "--json")
    assert json.loads(answer.out) == expected([1, 2, 3] * 30)


def test_the_table_marks_the_best_row_and_says_what_was_assumed(
    hf_dp_program: Callable[..., Any],
) -> None:
    out = hf_dp_program("plan-users", *WORDS, *ALIKE).out
    assert sum(line.startswith("->") for line in out.splitlines()) == 1
    for words in ("for each of 100 users", "taken as public or assumed", "Draw users"):
        assert words in out
    crowded = ["--examples-per-step", 150, *WORDS[2:], *ALIKE]
    assert "more than the 100 that are kept" in hf_dp_program("plan-users", *crowded).out


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--num-users", 5],
        ["--user-sizes", "none.txt"],
        ["--user-sizes", "none.txt", *ALIKE],
        ["--num-users", 0, "--examples-per-user", 3],
        ["--num-users", 5, "--examples-per-user", 0],
    ],
)
def test_users_are_described_once(hf_dp_program: Callable[..., Any], options: list[object]) -> None:
    answer = hf_dp_program("plan-users", *WORDS, *options)
    assert answer.code == 2
    assert "users" in answer.err


def test_a_file_of_words_is_refused(hf_dp_program: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "sizes.txt"
    path.write_text("three\n")
    answer = hf_dp_program("plan-users", *WORDS, "--user-sizes", path)
    assert answer.code == 2
    assert "sizes.txt" in answer.err
