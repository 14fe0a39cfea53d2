"""The writing end: durable before it returns, refused where it is not certain."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_dp.errors import (
    LedgerCorruptError,
    LedgerError,
    LedgerMismatchError,
)
from hf_dp.events import Composed, Gaussian, PrivacyEvent, SelfComposed
from hf_dp.ledger import LEDGER_NAME, Ledger, LedgerRecord, read_ledger


def test_a_run_can_be_read_back(
    tmp_path: Path, header: dict[str, Any], step_event: PrivacyEvent
) -> None:
    path = tmp_path / "missing" / "parents" / LEDGER_NAME
    with Ledger.create(path, header) as ledger:
        assert ledger.event() == Composed(())
        assert [ledger.append(step_event, step=step) for step in (0, 1, 2)] == [1, 2, 3]
        record = read_ledger(path)
        assert record.event() == ledger.event() == Composed((SelfComposed(step_event, 3),))
        assert record.num_releases == ledger.num_releases == 3
        assert record.header == ledger.header
        assert record.run_id == ledger.run_id
        assert record.last_step == 2
        assert not record.torn
        assert {key: record.header[key] for key in header} == header
        assert ledger.path == path
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["kind"] for entry in entries] == ["header"] + ["release"] * 3
    assert [entry.get("index") for entry in entries] == [None, 1, 2, 3]


def test_a_reopened_ledger_goes_on_with_its_chain(
    make_ledger: Callable[..., Path], step_event: PrivacyEvent
) -> None:
    path = make_ledger(3)
    run_id = read_ledger(path).run_id
    with Ledger.open(path) as ledger:
        assert ledger.append(step_event, step=3) == 4
        assert ledger.run_id == run_id
    assert read_ledger(path).event() == Composed((SelfComposed(step_event, 4),))


def test_a_record_cannot_be_changed(make_ledger: Callable[..., Path]) -> None:
    record = read_ledger(make_ledger(1))
    assert isinstance(record, LedgerRecord)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.num_releases = 0  # type: ignore[misc]


# Beginning and going on


def test_an_earlier_ledger_is_never_overwritten(make_ledger: Callable[..., Path]) -> None:
    path = make_ledger(2)
    before = path.read_bytes()
    with pytest.raises(LedgerMismatchError) as raised:
        Ledger.create(path, {})
    for remedy in ("new output_dir", "resume_from_checkpoint", "DPArguments.ledger='continue'"):
        assert remedy in str(raised.value)
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*.tmp"))


def without_links(*_: object) -> None:
    raise OSError(95, "Operation not supported")


def test_without_hard_links_a_ledger_is_created_but_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", without_links)
    path = tmp_path / "ledger"
    with Ledger.create(path, {}) as ledger:
        run_id = ledger.run_id
    with pytest.raises(LedgerMismatchError):
        Ledger.create(path, {})
    assert read_ledger(path).run_id == run_id
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ledger", "ledger.lock"]


@pytest.mark.parametrize("call", ["write", "fsync", "open"])
def test_a_ledger_that_cannot_be_created_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(
            LedgerError, match=r"not possible to .*: No space left on device\. Free"
        ):
            Ledger.create(tmp_path / "run" / "ledger", {})
    assert {p.name for p in (tmp_path / "run").iterdir()} <= {"ledger.lock"}
    Ledger.create(tmp_path / "run" / "ledger", {}).close()


def test_what_is_no_file_is_refused(tmp_path: Path, make_ledger: Callable[..., Path]) -> None:
    path = make_ledger(1)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "blocked" / LEDGER_NAME).mkdir(parents=True)
    for use in (
        lambda: Ledger.open(tmp_path),
        lambda: read_ledger(tmp_path),
        lambda: Ledger.create(tmp_path, {}),
        lambda: Ledger.open(path).copy_to(tmp_path / "blocked"),
    ):
        with pytest.raises(LedgerError, match="it is a folder; give the file inside it"):
            use()
    for use in (lambda: Ledger.open(tmp_path / "pipe"), lambda: read_ledger(tmp_path / "pipe")):
        with pytest.raises(LedgerError, match="it is not a regular file"):
            use()
    with pytest.raises(LedgerError, match=r"create it: (File exists|Not a directory)"):
        Ledger.create(path / "below" / "a file", {})


def test_a_ledger_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="expected an existing ledger"):
        Ledger.open(tmp_path / "none" / LEDGER_NAME)
    with pytest.raises(LedgerError, match="not possible to read it: No such file"):
        read_ledger(tmp_path / "none" / LEDGER_NAME)
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_that_may_not_be_written_is_refused(
    make_ledger: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_ledger(1)
    system_open = os.open

    def read_only(name: Any, flags: int, *rest: int) -> int:
        if Path(name) == path and flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(13, "Permission denied")
        return system_open(name, flags, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", read_only)
        with pytest.raises(LedgerError, match="open it for appending: Permission denied"):
            Ledger.open(path)
    Ledger.open(path).close()


def test_a_symbolic_link_to_a_ledger_stays_one(
    make_ledger: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_ledger(2)
    path.write_bytes(path.read_bytes()[:-9])
    link = tmp_path / "link"
    link.symlink_to(path)
    with Ledger.open(link) as ledger:
        assert ledger.path == path
        assert ledger.copy_to(tmp_path / "checkpoint").name == "link"
    assert link.is_symlink()
    assert read_ledger(path).num_recovered == 1


# Copies


def test_a_copy_is_the_ledger_at_that_moment(
    make_ledger: Callable[..., Path], step_event: PrivacyEvent, tmp_path: Path
) -> None:
    with Ledger.open(make_ledger(2)) as ledger:
        for _ in range(2):  # the second replaces the first
            copy = ledger.copy_to(tmp_path / "new" / "checkpoint-2")
            assert copy == tmp_path / "new" / "checkpoint-2" / LEDGER_NAME
            assert copy.read_bytes() == ledger.path.read_bytes()
            ledger.append(step_event, step=2)
        assert read_ledger(copy).num_releases == 3
        assert [p.name for p in copy.parent.iterdir()] == [LEDGER_NAME]


def test_a_copy_to_its_own_folder_leaves_the_ledger_open(
    make_ledger: Callable[..., Path], step_event: PrivacyEvent
) -> None:
    with Ledger.open(make_ledger(2)) as ledger:
        assert ledger.copy_to(ledger.path.parent) == ledger.path
        assert ledger.append(step_event, step=2) == 3


def test_a_ledger_edited_under_the_run_is_not_copied(
    make_ledger: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_ledger(2)
    with Ledger.open(path) as ledger:
        with path.open("r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(b"!")
        with pytest.raises(LedgerCorruptError, match="Somebody else changed the file"):
            ledger.copy_to(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


# Long runs


def test_long_ledgers_open_fast_and_append_in_constant_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: dict[str, Any]
) -> None:
    events = (Gaussian(1.0), Gaussian(2.0))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    seconds = []
    with Ledger.create(tmp_path / "ledger", header) as ledger:
        for part in range(10):
            began = time.process_time()
            for step in range(3_000):
                ledger.append(events[part % 2], step=step)
            seconds.append(time.process_time() - began)
    # Appends that cost time in proportion to the length would take the last part 19 times the first.
    assert min(seconds[5:]) < 3 * min(seconds[:5])
    began = time.process_time()
    with Ledger.open(tmp_path / "ledger") as ledger:
        assert time.process_time() - began < 2
        assert ledger.num_releases == 30_000
