"""Accounting by Edgeworth series: cumulants, the series, bounds on its error, the accountant."""

from __future__ import annotations

from hf_dp.accounting.edgeworth.accountant import EdgeworthAccountant

__all__ = ["EdgeworthAccountant"]
