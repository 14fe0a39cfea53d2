"""FSDP2 with real processes: sums over the examples of all ranks, in shards, equal to a plain loop's."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RANKS = Path(__file__).with_name("fsdp_ranks.py")
WORLD = 2


def run(case: str) -> dict[str, object]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = str(RANKS.parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(rank), str(WORLD), port, case],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(WORLD)
    ]
    try:
        told = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), told[0][1] + told[1][1]
    answer: dict[str, object] = json.loads(told[0][0].strip().splitlines()[-1])
    return answer


@pytest.mark.parametrize(
    "case", ["gpt2", "checkpointed", "bert", "llama_lora", "gpt2 in l1", "llama_lora in l1"]
)
def test_sums_over_ranks_are_those_of_a_loop_over_all_examples(case: str) -> None:
    """Tied weights, checkpointing, full and LoRA; three steps each, which also follow the updates."""
    answer = run(case)
    assert answer["error"] < 1e-10  # type: ignore[operator]
    assert answer["sharded"]
    assert answer["engine"] == "two_pass"


def test_what_ranks_cannot_do_together_is_refused_by_all() -> None:
    refused = run("bert")["refused"]
    assert "engine='two_pass'" in refused["sequential"]  # type: ignore[index]
    assert "engine='two_pass'" in refused["book_keeping"]  # type: ignore[index]
    assert "as many examples on every rank" in refused["auto"]  # type: ignore[index]
    assert "clipped once on each of them" in refused["two_pass"]  # type: ignore[index]


def test_a_use_outside_the_modules_is_refused() -> None:
    assert "is used outside its module" in str(run("outside")["failed"])


def test_what_one_rank_alone_cannot_do_ends_all_of_them() -> None:
    """The others would wait for it in the next layer's collective."""
    assert "another one could not" in str(run("one_cannot")["refused"])
