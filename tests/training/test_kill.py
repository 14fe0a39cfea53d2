"""Laws 3 and 4 under ``kill -9``: whatever the moment, nothing released is forgotten, and a run goes on."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kill_server import MAX_STEPS, POINTS

from hf_dp.errors import ConfigurationError
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.training.checkpoints import resolve_checkpoint

KILLS = 20

Ask = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """A real run of DPTrainer in a process of its own, killed as asked."""
    here = Path(__file__).parent
    errors = tmp_path_factory.mktemp("server") / "stderr"
    answers, replies = os.pipe()
    with errors.open("w") as sink, os.fdopen(answers) as incoming:
        server = subprocess.Popen(
            [sys.executable, str(here / "kill_server.py"), str(replies)],
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=sink,
            pass_fds=[replies],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here)])},
            text=True,
        )
        os.close(replies)
        assert server.stdin is not None

        def ask(path: Path, **options: Any) -> dict[str, Any]:
            assert server.stdin is not None
            server.stdin.write(json.dumps({"path": str(path), **options}) + "\n")
            server.stdin.flush()
            reply = incoming.readline()
            assert reply, errors.read_text()[-3000:]
            answer: dict[str, Any] = json.loads(reply)
            assert answer["error"] is None, answer["error"]
            return answer

        yield ask
        server.stdin.close()
        server.wait(timeout=60)


def counted(folder: Path) -> int:
    """Releases in the ledger, whose chain is verified by the reading; none if it was never begun."""
    path = folder / LEDGER_NAME
    return read_ledger(path).num_releases if path.exists() else 0


def go_on(run: Ask, folder: Path, before: int) -> None:
    """Resume from the newest whole checkpoint, or anew where there is none; everything is counted."""
    try:
        start = int(str(resolve_checkpoint(True, str(folder))).rsplit("-", 1)[1])
    except ConfigurationError:
        start = 0
    resumed = run(folder, resume=True) if start else run(folder, ledger="continue")
    assert resumed["finished"] == MAX_STEPS
    assert resumed["releases"] == resumed["steps"] == MAX_STEPS - start
    assert counted(folder) == before + resumed["releases"]
    final = read_ledger(folder / f"checkpoint-{MAX_STEPS}" / LEDGER_NAME)
    assert final.num_releases == counted(folder)


def test_a_kill_at_random_moments_never_under_counts_and_the_run_resumes(
    run: Ask, tmp_path: Path
) -> None:
    """Kills are spread over 1.2 times what a whole run takes, so that some hit it anywhere."""
    whole = run(tmp_path / "whole")
    assert whole["finished"] == whole["releases"] == counted(tmp_path / "whole") == MAX_STEPS
    moments, in_the_middle = random.Random(), 0
    for kill in range(KILLS):
        folder = tmp_path / str(kill)
        outcome = run(folder, after=moments.uniform(0.05, 1.2) * whole["seconds"])
        before = counted(folder)
        assert outcome["steps"] <= outcome["releases"] <= before <= outcome["releases"] + 1
        in_the_middle += 0 < before < MAX_STEPS
        if outcome["finished"] is None:
            go_on(run, folder, before)
    # A run of twice or half the speed still gets a third of the kills between its first and last step.
    assert in_the_middle, "no kill hit a step: this test has no power"


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_right_after_each_part_of_a_step_or_a_save(
    run: Ask, tmp_path: Path, point: str
) -> None:
    outcome = run(tmp_path, point=point, count=3)
    assert outcome["killed"]
    before = counted(tmp_path)
    assert outcome["releases"] <= before <= outcome["releases"] + 1
    assert (before > outcome["releases"]) == (point == "ledger"), "recorded, not yet released"
    go_on(run, tmp_path, before)


def test_a_ledger_written_after_the_noise_would_be_caught(run: Ask, tmp_path: Path) -> None:
    outcome = run(tmp_path, point="noise", count=3, fault=True)
    assert outcome["releases"] == 3
    assert counted(tmp_path) == 2
