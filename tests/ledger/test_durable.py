"""On the disk before it returns; and when that is not certain, no release goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_dp.errors import ConfigurationError, LedgerError
from hf_dp.events import PrivacyEvent
from hf_dp.ledger import Ledger, read_ledger


def durable_after_each_append(path: Path, log: Any, event: PrivacyEvent) -> bool:
    with Ledger.create(path, {}) as ledger:
        secured = [log.secured(path)]
        for step in range(3):
            ledger.append(event, step=step)
            secured.append(log.secured(path))
    return all(secured)


def test_every_line_is_on_the_disk_when_append_returns(
    tmp_path: Path, disk_log: Any, step_event: PrivacyEvent
) -> None:
    assert durable_after_each_append(tmp_path / "ledger", disk_log, step_event)


def append_without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_only(self: Any, line: bytes) -> None:
        os.write(self._descriptor, line)
        self._size += len(line)
        self._content_hash.update(line)

    monkeypatch.setattr(Ledger, "_write", write_only)


def fsync_before_the_write(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_late(descriptor: int, data: bytes) -> None:
        os.fsync(descriptor)
        os.write(descriptor, data)

    monkeypatch.setattr("hf_dp.ledger.file.write_all", write_late)
    monkeypatch.setattr("hf_dp.ledger.file.os.fsync", lambda _: None)


def folder_without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_dp.ledger.durable._sync_folder", lambda _: None)


@pytest.mark.parametrize(
    "fault", [append_without_fsync, fsync_before_the_write, folder_without_fsync]
)
def test_the_durability_check_sees_planted_faults(
    tmp_path: Path,
    disk_log: Any,
    step_event: PrivacyEvent,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:
    fault(monkeypatch)
    assert not durable_after_each_append(tmp_path / "ledger", disk_log, step_event)


def test_created_folders_are_on_the_disk_before_the_ledger_is_used(
    tmp_path: Path, disk_log: Any
) -> None:
    with Ledger.create(tmp_path / "a" / "b" / "ledger", {}):
        synced = {inode for call, inode, _ in disk_log.calls if call == "fsync"}
        for folder in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"):
            assert folder.stat().st_ino in synced


def test_recovery_and_copies_are_on_the_disk_when_they_return(
    make_ledger: Callable[..., Path], disk_log: Any, tmp_path: Path
) -> None:
    path = make_ledger(3)
    path.write_bytes(path.read_bytes()[:-9])
    with Ledger.open(path) as ledger:
        assert disk_log.secured(path)
        assert disk_log.secured(ledger.copy_to(tmp_path / "checkpoint"))


def test_a_line_is_one_write(
    make_ledger: Callable[..., Path], step_event: PrivacyEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    system_write = os.write

    def noted(descriptor: int, data: Any) -> int:
        written.append(bytes(data))
        return system_write(descriptor, data)

    with Ledger.open(make_ledger(1)) as ledger:
        monkeypatch.setattr(os, "write", noted)
        ledger.append(step_event, step=1)
        assert written == [ledger.path.read_bytes().splitlines(keepends=True)[-1]]


def test_short_writes_are_continued(
    make_ledger: Callable[..., Path], step_event: PrivacyEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    system_write = os.write
    with Ledger.open(make_ledger(1)) as ledger:
        monkeypatch.setattr(os, "write", lambda fd, data: system_write(fd, data[:7]))
        ledger.append(step_event, step=1)
        assert read_ledger(ledger.path).num_releases == 2
        assert not read_ledger(ledger.path).torn


# When an append fails


@pytest.mark.parametrize("call", ["write", "fsync", "stat"])
def test_after_a_failed_append_no_release_goes_on(
    make_ledger: Callable[..., Path],
    step_event: PrivacyEvent,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    call: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    path = make_ledger(2)
    with Ledger.open(path) as ledger:
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            with pytest.raises(LedgerError, match="append to it: Input/output error"):
                ledger.append(step_event, step=2)
        for use in (lambda: ledger.append(step_event, step=2), lambda: ledger.copy_to(tmp_path)):
            with pytest.raises(LedgerError, match=r"an append failed \(Input/output error\)"):
                use()
    with Ledger.open(path) as ledger:
        assert ledger.num_releases >= 2
        ledger.append(step_event, step=2)


def test_a_full_disk_in_the_middle_of_a_line_counts_once_and_stops_the_run(
    make_ledger: Callable[..., Path], writers: Any
) -> None:
    path = make_ledger(2)
    first, second = writers.ask("run_out_of_space", path=path, room=100)
    assert first.startswith("LedgerError")
    assert "File too large" in first
    assert "an append failed" in second
    assert read_ledger(path).torn
    with Ledger.open(path) as ledger:
        assert ledger.num_releases == 3
    record = read_ledger(path)
    assert record.num_recovered == 1
    assert not record.torn


def test_an_interrupted_append_poisons_the_ledger(
    make_ledger: Callable[..., Path], step_event: PrivacyEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    path = make_ledger(2)
    with Ledger.open(path) as ledger:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", interrupt)
            with pytest.raises(KeyboardInterrupt):
                ledger.append(step_event, step=2)
        with pytest.raises(LedgerError, match="an append was interrupted"):
            ledger.append(step_event, step=2)
    assert read_ledger(path).num_releases == 3


def delete(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    data = path.read_bytes()
    path.with_name("new").write_bytes(data)
    os.replace(path.with_name("new"), path)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    ("change", "problem"),
    [(delete, "No such file"), (replace, "replaced by another"), (lengthen, "changed by somebody")],
)
def test_a_ledger_changed_under_the_run_stops_it(
    make_ledger: Callable[..., Path],
    step_event: PrivacyEvent,
    change: Callable[[Path], None],
    problem: str,
) -> None:
    path = make_ledger(2)
    with Ledger.open(path) as ledger:
        change(path)
        for _ in range(2):
            with pytest.raises(LedgerError, match=problem):
                ledger.append(step_event, step=2)


def test_a_wrong_argument_writes_nothing_and_the_ledger_goes_on(
    make_ledger: Callable[..., Path], step_event: PrivacyEvent
) -> None:
    with Ledger.open(make_ledger(2)) as ledger:
        before = ledger.path.read_bytes()
        for step in (-1, 1.0, True, "1"):
            with pytest.raises(ConfigurationError, match=r"Ledger.append.step=.*whole number >= 0"):
                ledger.append(step_event, step=step)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match=r"Ledger.append.event='object'"):
            ledger.append(object(), step=1)  # type: ignore[arg-type]
        assert ledger.path.read_bytes() == before
        assert ledger.append(step_event, step=2) == 3


def test_a_closed_ledger_takes_nothing(
    make_ledger: Callable[..., Path], step_event: PrivacyEvent
) -> None:
    ledger = Ledger.open(make_ledger(1))
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match=r"a ledger in working order \(it is closed\)"):
        ledger.append(step_event, step=1)
