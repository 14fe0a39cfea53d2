"""The arithmetic of norms and sums: full precision, whatever the training around it chose."""

from __future__ import annotations

import contextlib
from types import TracebackType

import torch

_BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


class full_precision(contextlib.AbstractContextManager[None]):
    """No gradients, no autocast, and matrix products in IEEE arithmetic.

    A norm taken from products in TF32 or bfloat16 can be off by several percent where positions
    cancel, and a clipping bound computed from it would be exceeded by as much.

    It is entered for every call of every tapped module, so it is a class that changes only what must.
    """

    def __init__(self, device: torch.device) -> None:
        """For arithmetic on `device`."""
        self._device = device.type

    def __enter__(self) -> None:
        self._gradients = torch.is_grad_enabled()
        self._autocast = torch.is_autocast_enabled(self._device)
        self._precision = [backend.fp32_precision for backend in _BACKENDS]
        if self._gradients:
            torch.set_grad_enabled(False)
        if self._autocast:
            torch.set_autocast_enabled(self._device, False)
        for backend, precision in zip(_BACKENDS, self._precision, strict=True):
            if precision != "ieee":
                backend.fp32_precision = "ieee"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for backend, precision in zip(_BACKENDS, self._precision, strict=True):
            if precision != "ieee":
                backend.fp32_precision = precision
        if self._autocast:
            torch.set_autocast_enabled(self._device, True)
        if self._gradients:
            torch.set_grad_enabled(True)
