"""One writer at a time, and no writer that outlives its process."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_dp.errors import LedgerError, LedgerInUseError
from hf_dp.events import PrivacyEvent
from hf_dp.ledger import Ledger, merge_ledgers, read_ledger
from hf_dp.ledger.lock import WriterLock


def test_a_second_writer_in_the_same_process_is_refused(make_ledger: Callable[..., Path]) -> None:
    path = make_ledger(1)
    with Ledger.open(path) as ledger:
        for attempt in (Ledger.open, lambda p: Ledger.create(p, {}), lambda p: merge_ledgers(p, p)):
            with pytest.raises(LedgerInUseError, match="open in this process"):
                attempt(path)
        assert read_ledger(path).num_releases == ledger.num_releases
    Ledger.open(path).close()


def test_another_name_of_the_ledger_does_not_let_a_second_writer_in(
    make_ledger: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_ledger(1)
    alias = tmp_path / "alias"
    alias.symlink_to(path.parent)
    with Ledger.open(path), pytest.raises(LedgerInUseError):
        Ledger.open(alias / path.name)


def test_a_second_writer_in_another_process_is_refused(
    make_ledger: Callable[..., Path], writers: Any
) -> None:
    path = make_ledger(1)
    with Ledger.open(path):
        error, message = writers.ask("open_in_child", path=path)
        assert error == "LedgerInUseError"
        assert f"open in process {os.getpid()}" in message
    assert writers.ask("open_in_child", path=path) == 1


def test_a_killed_holder_leaves_no_lock_even_if_its_forked_worker_lives(
    make_ledger: Callable[..., Path], writers: Any
) -> None:
    path = make_ledger(1)
    held = writers.ask("hold", path=path, with_worker=True)
    try:
        with pytest.raises(LedgerInUseError, match=f"open in process {held['holder']}"):
            Ledger.open(path)
        writers.ask("kill_holder")
        os.kill(held["worker"], 0)  # raises if the worker is gone
        Ledger.open(path).close()
    finally:
        writers.ask("kill_worker", worker=held["worker"])


def test_a_forked_child_cannot_use_the_ledger_and_does_the_parent_no_harm(
    make_ledger: Callable[..., Path], writers: Any
) -> None:
    met = writers.ask("use_inherited", path=make_ledger(1))
    for use in ("append", "copy_to"):
        assert met[use][0] == "LedgerError"
        assert "opened by the parent" in met[use][1]
    assert met["close_and_open"][0] == "LedgerInUseError"
    assert met["other_process"][0] == "LedgerInUseError"
    assert met["parent"] == 2


def test_of_many_that_create_at_once_one_succeeds(writers: Any, tmp_path: Path) -> None:
    for attempt in range(5):
        path = tmp_path / str(attempt) / "deep" / "ledger"
        outcomes = writers.ask("create_at_once", path=path, num_writers=6)
        assert len(outcomes) == 6
        (run_id,) = set(outcomes) - {"LedgerInUseError", "LedgerMismatchError"}
        assert outcomes.count(run_id) == 1
        assert read_ledger(path).run_id == run_id


def drop_lock(path: Path) -> None:
    """What an upload of the whole folder from within this process does to a POSIX lock."""
    path.with_name(path.name + ".lock").read_bytes()


def test_a_lock_dropped_by_accident_is_taken_again_at_the_next_append(
    make_ledger: Callable[..., Path], writers: Any, step_event: PrivacyEvent
) -> None:
    path = make_ledger(1)
    with Ledger.open(path) as ledger:
        drop_lock(path)
        ledger.append(step_event, step=1)
        assert writers.ask("open_in_child", path=path)[0] == "LedgerInUseError"


def test_a_writer_that_lost_its_lock_to_another_stops(
    make_ledger: Callable[..., Path], writers: Any, step_event: PrivacyEvent
) -> None:
    path = make_ledger(1)
    with Ledger.open(path) as ledger:
        drop_lock(path)
        writers.ask("hold", path=path, with_worker=False)
        with pytest.raises(LedgerInUseError, match="open in process"):
            ledger.append(step_event, step=1)
        writers.ask("kill_holder")
        with pytest.raises(LedgerError, match="an append was interrupted"):
            ledger.append(step_event, step=1)
    assert read_ledger(path).num_releases == 1


def test_a_forgotten_ledger_is_closed_with_its_object(make_ledger: Callable[..., Path]) -> None:
    path = make_ledger(1)
    Ledger.open(path)
    gc.collect()
    Ledger.open(path).close()


def test_a_failure_to_open_gives_the_lock_back(make_ledger: Callable[..., Path]) -> None:
    path = make_ledger(1)
    whole = path.read_bytes()
    path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(LedgerError, match="Line 1 is not a whole header"):
            Ledger.open(path)
    path.write_bytes(whole)
    Ledger.open(path).close()


def test_a_file_system_that_cannot_lock_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patched:
        patched.setattr("fcntl.lockf", no_locks)
        with pytest.raises(LedgerError, match=r"open or lock its \.lock file: No locks available"):
            Ledger.create(tmp_path / "ledger", {})
    Ledger.create(tmp_path / "ledger", {}).close()


def test_the_register_forgets_released_locks(tmp_path: Path) -> None:
    for _ in range(2):
        WriterLock(tmp_path / "ledger").release()
