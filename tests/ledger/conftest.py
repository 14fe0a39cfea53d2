"""What the ledger's tests share: small ledgers, a record of disk calls, a server for forked writers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hf_dp
from hf_dp.events import Gaussian, PoissonSampled, PrivacyEvent, to_json
from hf_dp.ledger import LEDGER_NAME, Ledger


@pytest.fixture
def step_event() -> PrivacyEvent:
    return PoissonSampled(0.25, Gaussian(1.5))


@pytest.fixture
def header(step_event: PrivacyEvent) -> dict[str, Any]:
    return {"plan": {"num_steps": 9, "place": "Zürich"}, "step_event": to_json(step_event)}


@pytest.fixture
def make_ledger(
    tmp_path: Path, header: dict[str, Any], step_event: PrivacyEvent
) -> Callable[..., Path]:
    """Write a closed ledger with `num_releases` equal releases; returns its path."""

    def make(num_releases: int, folder: str = "run") -> Path:
        path = tmp_path / folder / LEDGER_NAME
        with Ledger.create(path, header) as ledger:
            for step in range(num_releases):
                ledger.append(step_event, step=step)
        return path

    return make


class DiskLog:
    """Every call that changes the disk or secures it, in order, as (call, inode, size then)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def note(self, call: str, found: os.stat_result) -> None:
        self.calls.append((call, found.st_ino, found.st_size))

    def secured(self, path: Path) -> bool:
        """Whether all that is in `path` now was fsynced, and its name too."""
        found = path.stat()
        folder = path.parent.stat().st_ino
        content = ("fsync", found.st_ino, found.st_size) in self.calls
        named = [
            i for i, c in enumerate(self.calls) if c[:2] in (("link", folder), ("replace", folder))
        ]
        last_name = named[-1] if named else -1
        return content and any(c[:2] == ("fsync", folder) for c in self.calls[last_name + 1 :])


@pytest.fixture
def disk_log(monkeypatch: pytest.MonkeyPatch) -> DiskLog:
    log = DiskLog()
    fsync, link, replace = os.fsync, os.link, os.replace

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        log.note("fsync", os.fstat(descriptor))

    def noted_link(source: Path, target: Path) -> None:
        link(source, target)
        log.note("link", os.stat(target.parent))

    def noted_replace(source: Path, target: Path) -> None:
        replace(source, target)
        log.note("replace", os.stat(target.parent))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "link", noted_link)
    monkeypatch.setattr(os, "replace", noted_replace)
    return log


class WriterServer:
    """Asks `writer_server.py`, a process without threads, to fork writers and tell what they met."""

    def __init__(self) -> None:
        server = Path(__file__).with_name("writer_server.py")
        package_parent = str(Path(hf_dp.__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", str(server)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": package_parent},
        )

    def ask(self, command: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"command": command, **arguments}
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=10)


@pytest.fixture(scope="session")
def writers() -> Iterator[WriterServer]:
    server = WriterServer()
    yield server
    server.close()
