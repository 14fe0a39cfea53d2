"""The ledger that a run writes to: locked, append-only, on the disk before a release goes on."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hf_dp.errors import (
    ConfigurationError,
    LedgerCorruptError,
    LedgerError,
    LedgerMismatchError,
    explain,
)
from hf_dp.events import Composed, PrivacyEvent, SelfComposed
from hf_dp.ledger.chain import Chain, verify
from hf_dp.ledger.durable import (
    check_regular,
    explained,
    make_folder,
    read_file,
    real_path,
    remove_unfinished,
    write_all,
    write_file,
)
from hf_dp.ledger.entry import event_fields, header_line, line_hash, new_writer, release_line
from hf_dp.ledger.lock import WriterLock


class Ledger:
    """One run's record of releases, open for appending by one thread of one process.

    Use `create` for a new run and `open` to go on with one; close it, or use it in a ``with``
    block.

    Guarantees:
        When `append` returns, the release is on the disk: no kill or power cut loses it.
        When `append` raises, no further append succeeds: a run cannot go on uncounted.
        An existing ledger is never replaced by a new one.
    """

    def __init__(self, path: Path, name: str, data: bytes, chain: Chain, lock: WriterLock) -> None:
        """Used by `create` and `open`; `data` is the file's verified content."""
        self._path = path
        self._name = name
        self._header = chain.header
        self._releases = list(chain.runs)
        self._num_releases = chain.num_releases
        self._last_line_hash = line_hash(chain.lines[-1])
        self._size = len(data)
        self._content_hash = hashlib.sha256(data)
        self._event: tuple[PrivacyEvent, Mapping[str, Any]] | None = None
        self._writer = new_writer()
        self._process = os.getpid()
        self._trouble: str | None = None
        self._lock = lock
        with explained("open it for appending", path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        # An interrupted run in a notebook leaves its ledger behind: let it go with the object.
        self._finalizer = weakref.finalize(self, _shut, self._descriptor, lock)

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: Mapping[str, Any]) -> Self:
        """Begin the ledger of a new run; missing folders are created.

        Args:
            path: where; nothing may be there yet.
            header: JSON values that describe the run, for whoever reads the ledger later.
                ``step_event`` is the JSON form (``to_json``) of the event of one step.

        Raises:
            LedgerMismatchError: if there is a ledger already.
            LedgerInUseError: if another writer is at work there.
            LedgerError: if the file system refuses.
            ConfigurationError: if the header is not strict JSON.
        """
        line = header_line(header) + b"\n"
        real = real_path(path)
        with explained("create it", real):
            make_folder(real.parent)
            if real.is_dir():
                check_regular(real)
        lock = WriterLock(real)
        try:
            with explained("create it", real):
                try:
                    write_file(real, line, replace=False)
                except FileExistsError as error:
                    raise _exists(real) from error
            return cls(real, Path(path).name, line, verify(line, real), lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Go on with a ledger, after verifying it. A torn last line is counted and made whole.

        Raises:
            LedgerInUseError: if another writer holds it.
            LedgerCorruptError: if it was damaged or edited.
            LedgerError: if there is none, or it cannot be read or understood.
        """
        real = real_path(path)
        if not os.path.lexists(real):
            raise _absent(real)
        with explained("open it", real):
            check_regular(real)
        lock = WriterLock(real)
        try:
            with explained("read it", real):
                remove_unfinished(real)
                data = read_file(real)
            chain = verify(data, real)
            if chain.tail is not None:
                data = chain.repaired()
                chain = verify(data, real)
                with explained("make its torn last line whole", real):
                    write_file(real, data, replace=True)
            return cls(real, Path(path).name, data, chain, lock)
        except BaseException:
            lock.release()
            raise

    @property
    def path(self) -> Path:
        """The file (symbolic links resolved)."""
        return self._path

    @property
    def header(self) -> Mapping[str, Any]:
        """The first line: what `create` was given, plus ``run_id``, ``created``, ``format``."""
        return self._header

    @property
    def run_id(self) -> str:
        """Names the run; every copy of its ledger has the same."""
        return str(self._header["run_id"])

    @property
    def num_releases(self) -> int:
        """How many releases are counted."""
        return self._num_releases

    def event(self) -> PrivacyEvent:
        """Everything released so far: a ``Composed`` of ``SelfComposed`` runs, in order."""
        return Composed(tuple(self._releases))

    def append(self, event: PrivacyEvent, *, step: int) -> int:
        """Record one release, durably, before it is made. The cost does not grow with the ledger.

        Args:
            event: what is about to be released.
            step: the global step it belongs to.

        Returns:
            The number of releases, this one included.

        Raises:
            LedgerError: if it is not certain that the release is on the disk. Then the release must
                not be made, and neither must any later one through this object.
            ConfigurationError: if the event or the step cannot be recorded; nothing was written.
        """
        self._check_usable()
        _check_step(step)
        index = self._num_releases + 1
        line = release_line(
            self._fields(event),
            index=index,
            step=step,
            previous=self._last_line_hash,
            writer=self._writer,
        )
        self._write(line + b"\n")
        self._last_line_hash = line_hash(line)
        self._num_releases = index
        self._count(event)
        self._trouble = None
        return index

    def copy_to(self, folder: str | os.PathLike[str]) -> Path:
        """Copy the ledger into a checkpoint, atomically and durably, under its own name.

        Returns:
            The copy; the ledger itself if `folder` is where it lives.

        Raises:
            LedgerCorruptError: if the file is not what this object wrote and verified.
            LedgerError: if the ledger is not usable or the file system refuses.
        """
        self._check_usable()
        with explained("read it", self._path):
            data = read_file(self._path)
        if hashlib.sha256(data).digest() != self._content_hash.digest():
            raise LedgerCorruptError(_changed(self._path))
        copy = real_path(Path(folder) / self._name)
        if copy != self._path:
            with explained("copy the ledger there", copy):
                make_folder(copy.parent)
                if copy.exists():
                    check_regular(copy)
                write_file(copy, data, replace=True)
        return copy

    def close(self) -> None:
        """Close the file and let others write it. Closing twice is harmless."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        # Whatever interrupts this, even a signal, leaves the trouble standing; append clears it.
        self._trouble = "an append was interrupted"
        try:
            self._lock.renew()
            found = os.stat(self._path)
            if not os.path.samestat(found, os.fstat(self._descriptor)):
                raise OSError("the file was replaced by another one")
            if found.st_size != self._size:
                raise OSError("the file was changed by somebody else")
            write_all(self._descriptor, line)
            os.fsync(self._descriptor)
        except OSError as error:
            self._trouble = f"an append failed ({error.strerror or error})"
            with explained("append to it", self._path):
                raise
        self._size += len(line)
        self._content_hash.update(line)

    def _fields(self, event: PrivacyEvent) -> Mapping[str, Any]:
        if self._event is None or self._event[0] != event:
            self._event = (event, event_fields(event))
        return self._event[1]

    def _count(self, event: PrivacyEvent) -> None:
        if self._releases and self._releases[-1].event == event:
            self._releases[-1] = SelfComposed(event, self._releases[-1].count + 1)
        else:
            self._releases.append(SelfComposed(event, 1))

    def _check_usable(self) -> None:
        trouble = self._trouble
        if not self._finalizer.alive:
            trouble = "it is closed"
        elif os.getpid() != self._process:
            trouble = "it was opened by the parent of this process"
        if trouble is not None:
            raise LedgerError(
                explain(
                    "Ledger.path",
                    str(self._path),
                    f"a ledger in working order ({trouble})",
                    "A release that is not on the disk must not be made.",
                    "Remove the cause, open the ledger again with Ledger.open and resume.",
                )
            )


def _shut(descriptor: int, lock: WriterLock) -> None:
    os.close(descriptor)
    lock.release()


def _check_step(step: object) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ConfigurationError(
            explain(
                "Ledger.append.step",
                step,
                "a whole number >= 0",
                "It says where in the training the release was made.",
                "Use state.global_step.",
            )
        )


def _absent(path: Path) -> LedgerError:
    return LedgerError(
        explain(
            "Ledger.path",
            str(path),
            "an existing ledger",
            "There is nothing to go on with.",
            "Begin a new run with Ledger.create, or give the path of the run to go on with.",
        )
    )


def _changed(path: Path) -> str:
    return explain(
        "Ledger.path",
        str(path),
        "what this run wrote",
        "Somebody else changed the file while it was in use, so releases may be missing from it.",
        "Stop whatever writes there, restore the file from the newest checkpoint and resume.",
    )


def _exists(path: Path) -> LedgerMismatchError:
    return LedgerMismatchError(
        explain(
            "Ledger.path",
            str(path),
            "no ledger of an earlier run",
            "Its releases count against data that this run may use again, so it is neither "
            "overwritten nor silently taken over.",
            "Choose a new output_dir, resume that run with resume_from_checkpoint, or add to its "
            "ledger with DPArguments.ledger='continue'.",
        )
    )
