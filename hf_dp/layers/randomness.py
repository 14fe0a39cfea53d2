"""The states of the generators that a module's forward may draw from."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Randomness:
    """The generators' states at one moment: torch on the CPU and one accelerator, Python, numpy."""

    cpu: Tensor
    accelerator: Tensor | None
    python: Any
    numpy: Any
    device: torch.device

    @classmethod
    def now(cls, device: torch.device) -> Randomness:
        """The states as they are."""
        numpy = sys.modules.get("numpy")
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            random.getstate(),
            None if numpy is None else numpy.random.get_state(legacy=True),
            device,
        )

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def same(self, other: Randomness) -> bool:
        """Whether nothing was drawn between the two."""
        return (
            torch.equal(self.cpu, other.cpu)
            and (
                self.accelerator is None
                or other.accelerator is None
                or torch.equal(self.accelerator, other.accelerator)
            )
            and self.python == other.python
            and _same_numpy(self.numpy, other.numpy)
        )


def _same_numpy(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return bool((one[1] == other[1]).all()) and one[2:] == other[2:]


@contextlib.contextmanager
def kept_randomness(device: torch.device) -> Iterator[None]:
    """Leave every generator as it was found."""
    before = Randomness.now(device)
    try:
        yield
    finally:
        before.restore()
