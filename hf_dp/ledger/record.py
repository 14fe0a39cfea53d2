"""What a ledger says, read without touching it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_dp.events import Composed, PrivacyEvent, SelfComposed
from hf_dp.ledger.chain import Chain, verify
from hf_dp.ledger.durable import explained, read_file, real_path


@dataclass(frozen=True)
class LedgerRecord:
    """A verified ledger at the moment it was read.

    Attributes:
        header: the first line: the caller's mapping plus ``run_id``, ``created``, ``format``.
        run_id: which run this is; the same in every copy.
        releases: what was released, in order, equal neighbours counted together.
        num_releases: how many releases that is, a torn one included.
        num_recovered: how many of them are full lines that were once torn.
        last_step: global step of the last one (0 without one).
        torn: whether the last line is torn right now: the run was killed while writing it, or is
            writing it at this moment.
    """

    header: Mapping[str, Any]
    run_id: str
    releases: tuple[SelfComposed, ...]
    num_releases: int
    num_recovered: int
    last_step: int
    torn: bool

    def event(self) -> PrivacyEvent:
        """Everything that was released, as one event."""
        return Composed(self.releases)


def read_ledger(path: str | os.PathLike[str]) -> LedgerRecord:
    """Verify and read a ledger that may be in use; takes no lock and writes nothing.

    Args:
        path: the file, in an output directory or a checkpoint.

    Raises:
        LedgerCorruptError: if it was damaged or edited.
        LedgerError: if it cannot be read or understood.

    Guarantees:
        Never fewer releases than were durably appended before the call.
    """
    real = real_path(path)
    return as_record(verified(real))


def verified(path: Path) -> Chain:
    """The chain in a file, checked."""
    with explained("read it", path):
        data = read_file(path)
    return verify(data, path)


def as_record(chain: Chain) -> LedgerRecord:
    """A chain as its readers see it."""
    return LedgerRecord(
        header=chain.header,
        run_id=chain.header["run_id"],
        releases=chain.runs,
        num_releases=chain.num_releases,
        num_recovered=chain.num_recovered,
        last_step=chain.last_step,
        torn=chain.tail is not None,
    )
