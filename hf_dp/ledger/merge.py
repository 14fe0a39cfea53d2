"""Two copies of one run's ledger become the one that counts most."""

from __future__ import annotations

import os
from pathlib import Path

from hf_dp.errors import LedgerMismatchError, explain
from hf_dp.ledger.chain import Chain
from hf_dp.ledger.durable import explained, make_folder, real_path, write_file
from hf_dp.ledger.entry import parse
from hf_dp.ledger.lock import WriterLock
from hf_dp.ledger.record import LedgerRecord, as_record, verified


def merge_ledgers(
    local: str | os.PathLike[str], checkpoint: str | os.PathLike[str]
) -> LedgerRecord:
    """Before a resume: make the local ledger hold every release that either copy knows.

    The checkpoint's copy is the longer one where the run was moved to another output directory; the
    local ledger is the longer one where releases were made after the checkpoint. Either file may be
    missing, not both. The checkpoint is only read.

    Args:
        local: the ledger in the output directory; replaced atomically if the other counts more.
        checkpoint: the copy in the checkpoint that is resumed.

    Returns:
        What `local` now holds.

    Raises:
        LedgerMismatchError: if both are missing, if they are of different runs, or if each has a
            release that the other lacks.
        LedgerInUseError: if another writer holds `local`.
        LedgerCorruptError: if either is damaged or was edited.

    Guarantees:
        At least as many releases as the larger of the two, at any instant, whatever interrupts it.
    """
    ours, theirs = real_path(local), real_path(checkpoint)
    with explained("look for it", ours):
        if not os.path.lexists(ours) and not os.path.lexists(theirs):
            raise _nothing(ours, theirs)
        make_folder(ours.parent)
    lock = WriterLock(ours)
    try:
        return as_record(_merged(ours, theirs))
    finally:
        lock.release()


def _merged(ours: Path, theirs: Path) -> Chain:
    if not os.path.lexists(theirs):
        return verified(ours)
    remote = verified(theirs)
    if os.path.lexists(ours):
        here = verified(ours)
        _check_same_run(here, remote, ours, theirs)
        if _extends(here, remote):
            return here
        if not _extends(remote, here):
            raise _diverged(ours, theirs)
    with explained("bring it up to date", ours):
        write_file(ours, remote.repaired(), replace=True)
    return verified(ours)


def _extends(longer: Chain, shorter: Chain) -> bool:
    """Whether `longer` counts every release of `shorter`."""
    count = len(shorter.lines)
    if longer.lines[:count] != shorter.lines:
        return False
    if shorter.tail is None:
        return True
    # What is left of the torn line must fit: the other's line begins so, or was put in its place.
    if count < len(longer.lines):
        whole = longer.lines[count]
        return whole.startswith(shorter.tail) or "recovered" in parse(whole)
    return longer.tail is not None and longer.tail.startswith(shorter.tail)


def _check_same_run(here: Chain, remote: Chain, ours: Path, theirs: Path) -> None:
    if here.header["run_id"] != remote.header["run_id"]:
        raise LedgerMismatchError(
            explain(
                "Ledger.path",
                str(ours),
                f"a ledger of the run that wrote {theirs}",
                "It belongs to another run, and what that run released would be lost from view.",
                "Resume in the output_dir of the run that wrote the checkpoint, or in a new one.",
            )
        )


def _diverged(ours: Path, theirs: Path) -> LedgerMismatchError:
    return LedgerMismatchError(
        explain(
            "Ledger.path",
            str(ours),
            f"a continuation of {theirs}, or the other way round",
            "The run was continued twice from the same point: both released more about the same "
            "data, and neither ledger counts the other's releases.",
            "Resume in the output_dir where the checkpoint was written; to publish both results, "
            "account for the releases of both ledgers.",
        )
    )


def _nothing(ours: Path, theirs: Path) -> LedgerMismatchError:
    return LedgerMismatchError(
        explain(
            "Ledger.path",
            str(ours),
            f"a ledger there or at {theirs}",
            "Without one nobody knows what the checkpoint's weights have released so far.",
            "Restore the ledger, or start a new run from the model with a new output_dir.",
        )
    )
