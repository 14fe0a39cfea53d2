"""``hf-dp search-noise``: the winner, its rivals and the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = "search-noise --target-epsilon 1 --delta 1e-5 --shapes 6".split()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DP_CACHE", str(tmp_path))


def test_the_table_names_the_winner_its_rivals_and_the_reason(
    hf_dp_program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    answer = hf_dp_program(*WORDS, "--radius", "0.5")
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert "P(|noise| <= 0.5)" in lines[0]
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["Gaussian", "3.7307"],
        ["->", "Laplace"],
        ["scale-mixture", "(LMO)"],
    ]
    assert "Laplace noise has the least standard deviation: 1.414" in answer.out
    assert "Mechanism: LaplaceNoise(noise_multiplier=1.4143" in answer.out
    assert "6 tried. Every epsilon is a proven upper bound, by accountant 'pld'." in answer.out
    assert "kept from an earlier search" in hf_dp_program(*WORDS, "--radius", "0.5").out


def test_the_json_holds_every_candidate(hf_dp_program: Callable[..., Any]) -> None:
    words = (*WORDS, "--no-cache", "--dimension", "64", "--num-steps", "10", "--json")
    answer = hf_dp_program(*words, "--family", "gaussian", "--family", "laplace")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert found["winner"] == "gaussian"
    assert found["question"]["dimension"] == 64
    assert [one["family"] for one in found["candidates"]] == ["gaussian", "laplace"]
    assert all(one["epsilon"] <= 1 for one in found["candidates"])
    assert found["candidates"][1]["event"]["norm"] == "l2"


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("--norm", "l3"), "norm"),
        (("--objective", "std"), "objective"),
        (("--family", "cauchy"), "families"),
        (("--draw", "each"), "draw"),
    ],
)
def test_a_wrong_word_is_a_sentence(
    hf_dp_program: Callable[..., Any], words: tuple[str, str], field: str
) -> None:
    answer = hf_dp_program(*WORDS, *words)
    assert answer.code == 2
    assert f"search_noise.{field}=" in answer.err
