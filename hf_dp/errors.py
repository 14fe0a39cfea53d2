"""The errors of hf_dp, one class per remedy.

HfDpError
├── ConfigurationError        change an argument (also a ValueError)
├── PrivacyError              training on would break the guarantee
│   ├── UnsupportedEventError     choose another accountant or mechanism
│   ├── UncoveredParameterError   freeze the parameter, add a rule, or use the sequential engine
│   └── BudgetExhaustedError      the target epsilon is spent
├── testing.DisagreementError mend the layer rule, model or mechanism that was checked
└── LedgerError               the record of what was released cannot be trusted or used
    ├── LedgerCorruptError        restore the file from a copy
    ├── LedgerInUseError          another process is writing it
    └── LedgerMismatchError       it belongs to another run or another plan

Every message has the form ``Owner.field=value: expected X. Why it matters. What to do.``
"""

from __future__ import annotations


class HfDpError(Exception):
    """Base of every error that hf_dp raises on purpose."""


class ConfigurationError(HfDpError, ValueError):
    """An argument is wrong; nothing was trained."""


class PrivacyError(HfDpError, RuntimeError):
    """Going on would break the stated guarantee; never caught inside the library."""


class UnsupportedEventError(PrivacyError):
    """The accountant cannot bound this event."""


class UncoveredParameterError(PrivacyError):
    """A trainable parameter's gradient could not be clipped per unit."""


class BudgetExhaustedError(PrivacyError):
    """One more release would pass the target epsilon."""


class LedgerError(HfDpError, RuntimeError):
    """The ledger cannot be used."""


class LedgerCorruptError(LedgerError):
    """The ledger was edited or damaged: its hash chain is broken."""


class LedgerInUseError(LedgerError):
    """Another process holds the ledger's lock."""


class LedgerMismatchError(LedgerError):
    """The ledger was written by another run or for another plan."""


def explain(owner_field: str, value: object, expected: str, why: str, remedy: str) -> str:
    """Word a message in the one form that all messages have."""
    return f"{owner_field}={value!r}: expected {expected}. {why} {remedy}"
