"""The arithmetic of norms and sums: full precision, whatever the training around it chose."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and matrix products in IEEE arithmetic.

    A norm taken from products in TF32 or bfloat16 can be off by several percent where positions
    cancel, and a clipping bound computed from it would be exceeded by as much.
    """
    on_cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    backends = (torch.backends.cuda.matmul, on_cpu)
    before = [backend.fp32_precision for backend in backends]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
