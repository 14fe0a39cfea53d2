"""Law 3, ledger before effect: a kill at any instant can only over-count."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_dp.ledger import LEDGER_NAME, Ledger, read_ledger

KILLS = 20


def test_a_kill_at_random_moments_never_loses_an_acknowledged_append(
    writers: Any, tmp_path: Path
) -> None:
    path = tmp_path / LEDGER_NAME
    moments = random.Random(20)
    acknowledged = torn = survivors = 0
    for kill in range(KILLS):
        outcome = writers.ask(
            "kill_appending", path=path, after=moments.uniform(0.01, 0.2), slowly=kill % 2
        )
        assert outcome["signal"] == 9
        acknowledged = max(acknowledged, outcome["acknowledged"])
        if not path.exists():
            continue
        record = read_ledger(path)
        assert record.num_releases >= acknowledged
        torn += record.torn
        if kill % 4 == 3:  # else the next writer meets the ledger as the kill left it
            with Ledger.open(path) as ledger:
                assert ledger.num_releases == record.num_releases
                survivors = ledger.num_releases
    # Nearly all the time of a slow writer passes within a line, so all 10 miss with chance < 1e-6.
    assert torn, "no kill tore a line: this test has no power"
    assert survivors > KILLS
    copy = read_ledger(tmp_path / "checkpoint" / LEDGER_NAME)
    assert not copy.torn
    assert copy.run_id == record.run_id
    assert copy.num_releases <= record.num_releases


def test_over_counting_by_a_kill_is_at_most_one_release(writers: Any, tmp_path: Path) -> None:
    path = tmp_path / LEDGER_NAME
    Ledger.create(path, {}).close()
    outcome = writers.ask("kill_appending", path=path, after=0.1, slowly=True)
    assert outcome["acknowledged"] > 0
    assert read_ledger(path).num_releases - outcome["acknowledged"] in (0, 1)


def calls_until_finished(ask: Callable[[int], dict[str, Any]]) -> int:
    """Kill in system call 1, 2, 3, ... until the work is done before the kill."""
    for call in range(1, 100):
        if ask(call)["finished"]:
            return call - 1
    raise AssertionError("the work never finished")


def test_a_kill_in_any_system_call_of_create_leaves_no_ledger_or_a_sound_one(
    writers: Any, tmp_path: Path
) -> None:
    def ask(call: int) -> dict[str, Any]:
        path = tmp_path / str(call) / "deep" / LEDGER_NAME
        outcome: dict[str, Any] = writers.ask(
            "kill_in", scenario="create", path=path, other="", call=call
        )
        if path.exists():
            assert read_ledger(path).num_releases >= outcome["acknowledged"]
            Ledger.open(path).close()
        else:
            assert outcome["acknowledged"] == 0
            Ledger.create(path, {}).close()
        assert [p.name for p in path.parent.iterdir() if p.suffix == ".tmp"] == []
        return outcome

    assert calls_until_finished(ask) >= 15


@pytest.mark.parametrize("torn", [False, True])
def test_a_kill_in_any_system_call_of_a_continued_run_never_under_counts(
    writers: Any, tmp_path: Path, make_ledger: Callable[..., Path], torn: bool
) -> None:
    origin = make_ledger(3)
    if torn:
        origin.write_bytes(origin.read_bytes()[:-40])

    def ask(call: int) -> dict[str, Any]:
        folder = tmp_path / str(call)
        folder.mkdir()
        path = Path(shutil.copy(origin, folder))
        outcome: dict[str, Any] = writers.ask(
            "kill_in", scenario="continue", path=path, other=folder / "checkpoint", call=call
        )
        expected = max(3, outcome["acknowledged"])
        assert expected <= read_ledger(path).num_releases <= expected + 1
        copy = folder / "checkpoint" / LEDGER_NAME
        if copy.exists():
            assert read_ledger(copy).num_releases == 4
        with Ledger.open(path) as ledger:
            assert ledger.num_releases >= expected
        assert [p.name for p in folder.iterdir() if p.suffix == ".tmp"] == []
        return outcome

    assert calls_until_finished(ask) >= 10


def test_a_kill_in_any_system_call_of_a_merge_keeps_the_larger_count_within_reach(
    writers: Any, tmp_path: Path, make_ledger: Callable[..., Path]
) -> None:
    short = make_ledger(2)
    shutil.copytree(short.parent, tmp_path / "long")
    long = tmp_path / "long" / LEDGER_NAME
    with Ledger.open(long) as ledger:
        ledger.append(ledger.event().events[0].event, step=2)  # type: ignore[attr-defined]

    def ask(call: int) -> dict[str, Any]:
        folder = tmp_path / str(call)
        folder.mkdir()
        path = Path(shutil.copy(short, folder))
        outcome: dict[str, Any] = writers.ask(
            "kill_in", scenario="merge", path=path, other=long, call=call
        )
        assert read_ledger(path).num_releases == 3 or outcome["acknowledged"] == 0
        assert read_ledger(path).num_releases >= 2
        assert read_ledger(long).num_releases == 3
        return outcome

    assert calls_until_finished(ask) >= 5
