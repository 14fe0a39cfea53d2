"""The benchmark of proofs measures proofs."""

from __future__ import annotations

import pytest

from benchmarks.cases import Case
from benchmarks.proofs import measure


@pytest.mark.parametrize("kind", ["bert", "llama"])  # with dropout to replace, and without
def test_only_code_of_one_s_own_is_proved(kind: str) -> None:
    nothing, loss, module = measure(Case(kind, 64, 16, 2), rounds=1)
    assert module["flops"] > nothing["flops"] + 0.25
    assert nothing["flops"] <= loss["flops"] < nothing["flops"] + 0.1
