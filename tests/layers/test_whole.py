"""Modules that are run again: what is said of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

ATTENTION = """
import torch
from torch.nn.functional import scaled_dot_product_attention
{}
q = torch.ones(2, 1, 1, 2, 4)
torch.func.vmap(lambda q: scaled_dot_product_attention(q, q, q))(q)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ours", [True, False])
def test_torch_does_not_complain_of_its_own_kernels(ours: bool) -> None:
    code = ATTENTION.format("import hf_dp.layers.whole" if ours else "")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == ours, done.stderr
    assert ("There is a performance drop" in done.stderr) == (not ours)
