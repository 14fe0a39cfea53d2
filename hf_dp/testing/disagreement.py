"""The error of a check that failed."""

from __future__ import annotations

from hf_dp.errors import HfDpError


class DisagreementError(HfDpError, AssertionError):
    """What was checked is not what it should be: plain autograd one example at a time, or a law."""
