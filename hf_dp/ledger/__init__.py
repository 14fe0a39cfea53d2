"""The record of what was released: one line per release, on the disk before the release is used.

The ledger is the only memory of a run's privacy loss. It stores events (``hf_dp.events``) and knows
no accountant: whoever wants an epsilon asks one for ``record.event()``.
"""

from __future__ import annotations

from hf_dp.ledger.file import Ledger
from hf_dp.ledger.merge import merge_ledgers
from hf_dp.ledger.record import LedgerRecord, read_ledger

LEDGER_NAME = "privacy_ledger.jsonl"
"""Name of the ledger in an output directory and of its copy in every checkpoint."""

__all__ = ["LEDGER_NAME", "Ledger", "LedgerRecord", "merge_ledgers", "read_ledger"]
