"""``hf-dp explain`` prints the plan for a model, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Program = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPT2Config

    found = tmp_path_factory.mktemp("gpt2")
    GPT2Config(
        vocab_size=60, n_embd=16, n_layer=2, n_head=2, architectures=["GPT2LMHeadModel"]
    ).save_pretrained(found)
    return found


def test_the_table_names_rules_forms_and_costs(
    hf_dp_program: Program, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    answer = hf_dp_program("explain", folder, "--length", "8")
    assert answer.code == 0
    for word in (
        "engine book_keeping at length 8",
        "transformer.h.*.mlp.c_fc.weight",
        "Predicted:",
    ):
        assert word in answer.out


def test_json_is_one_object(hf_dp_program: Program, folder: Path) -> None:
    words = ("--json", "--length", "8", "--engine", "two_pass")
    found = json.loads(hf_dp_program("explain", folder, *words).out)
    assert found["engine"] == "two_pass"
    assert found["length"] == 8
    rules = {row["parameters"]: row["rule"] for row in found["rows"]}
    assert rules["transformer.h.*.mlp.c_fc.weight"] == "transposed_linear"


def test_errors_are_sentences(
    hf_dp_program: Program, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (("explain", tmp_path / "none"), ("explain", folder, "--engine", "magic")):
        answer = hf_dp_program(*words)
        assert answer.code == 2
        assert answer.err.startswith("Error: ")
        assert "expected" in answer.err
