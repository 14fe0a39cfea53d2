"""The benchmark of users' accountants compares the same run."""

from __future__ import annotations

import pytest

from benchmarks.user_accountants import rows


def test_both_accountants_cost_the_same_run() -> None:
    (row,) = rows([(0.01, 3, 2.0, 100)])
    assert row["hf_dp_epsilon"] == pytest.approx(row["dp_accounting_epsilon"], rel=2e-3)
    assert row["hf_dp_epsilon"] <= row["dp_accounting_epsilon"]
    assert min(row["hf_dp_seconds"], row["dp_accounting_seconds"]) > 0
