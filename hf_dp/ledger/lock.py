"""One writer at a time.

A POSIX record lock on a file beside the ledger. It belongs to the process and not to the open file,
so it dies with its holder however that dies, and DataLoader workers forked from the trainer do not
keep it alive (an inherited ``flock`` would). It has two weaknesses. It does not exclude a second
user within the same process, hence the register. And closing *any* descriptor of the file drops
it, hence a file of its own, and `renew`: whoever uploads the folder opens that file as well.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from hf_dp.errors import LedgerInUseError, explain
from hf_dp.ledger.durable import explained

_HELD: dict[tuple[int, Path], object] = {}


class WriterLock:
    """The right to write one ledger, held from construction until `release`.

    Args:
        ledger: the real path of the ledger; its folder must exist. The lock file stays behind:
            removing it could let two processes lock two different files.

    Raises:
        LedgerInUseError: if this or another process holds it.
        LedgerError: if the file system cannot lock.
    """

    def __init__(self, ledger: Path) -> None:
        # The process is part of the key: a forked child inherits the register but not the locks.
        self._key = (os.getpid(), ledger)
        if _HELD.setdefault(self._key, self) is not self:
            raise _in_use(ledger, "this process")
        try:
            with explained("open or lock its .lock file", ledger):
                self._descriptor = self._locked(ledger)
        except BaseException:
            del _HELD[self._key]
            raise

    def renew(self) -> None:
        """Make sure of the lock again; costs a system call.

        Raises:
            LedgerInUseError: if it was lost and another process has it.
        """
        _lock(self._descriptor, self._key[1])

    def release(self) -> None:
        """Let others write. In a forked child this only drops the child's copy."""
        # In this order: closing after another thread took the lock would drop that thread's.
        os.close(self._descriptor)
        if self._key[0] == os.getpid():
            del _HELD[self._key]

    @staticmethod
    def _locked(ledger: Path) -> int:
        path = ledger.with_name(f"{ledger.name}.lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, ledger)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _lock(descriptor: int, ledger: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        raise _in_use(ledger, f"process {holder}") from error


def _in_use(ledger: Path, holder: str) -> LedgerInUseError:
    return LedgerInUseError(
        explain(
            "Ledger.path",
            str(ledger),
            f"a ledger that nobody else is writing (it is open in {holder})",
            "Two writers would break its chain and lose count.",
            "Wait for that run to end, close its ledger, or choose another output_dir.",
        )
    )
