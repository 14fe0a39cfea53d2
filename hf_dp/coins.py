"""Where randomness comes from: the operating system, or, in tests alone, a fixed generator.

Sampling and noise draw from `SecretCoins`, which reads the operating system's cryptographic generator
and has no state that could be saved, replayed or guessed from ``TrainingArguments.seed``. PyTorch's
CPU generator is no substitute: `torch.Generator.manual_seed` keeps 32 bits of the seed, and its
Mersenne Twister can be rebuilt from outputs that an observer sees whenever a coordinate's gradient is
known to be zero (an unused embedding row, an empty draw).

The many bits of the noise come from the cryptographic generator of the ``ssl`` module (AES-256 in
counter mode, NIST SP 800-90A), ten times as fast as a system call; fresh bits of the operating system
are mixed into it before every draw, so that a process restored from a snapshot draws anew.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import ModuleType
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

ssl: ModuleType | None
try:
    import ssl
except ImportError:  # a Python that was built without OpenSSL
    ssl = None

_BLOCK = 1 << 17  # values drawn at a time, so that they stay in the cache
_HALF = 1 << 52
_KEY_BYTES = 48  # what AES-256 in counter mode is seeded with


class Coins(ABC):
    """A source of independent draws."""

    is_secret: ClassVar[bool]

    @abstractmethod
    def bits(self, count: int) -> np.ndarray:
        """`count` independent uniform 64-bit integers, ``(count,)`` uint64."""

    @abstractmethod
    def normal_like(self, tensor: Tensor) -> Tensor:
        """Independent N(0, 1) draws of `tensor`'s shape and device, in its dtype."""

    @abstractmethod
    def signed_uniforms(self, count: int, device: torch.device) -> Tensor:
        """Independent uniform draws on (-1, 1), ``(count,)`` float64 on `device`; 53 bits each.

        Odd multiples of 2^-53, so none is 0 and none is 1; the device must know float64.
        """

    @contextlib.contextmanager
    def for_library_code(self) -> Iterator[None]:
        """Run code that draws from the global generators (dropout, collators) on these coins.

        The global state is put back afterwards, so code outside sees the stream it would have seen.
        A dropout mask that an observer can recompute from the public training seed would let the
        other units' gradients depend on one unit's presence.
        """
        seeds = self.bits(3)
        python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(seeds[0] >> np.uint64(1)))
            random.seed(int(seeds[1]))
            np.random.seed(int(seeds[2] & np.uint64(0xFFFFFFFF)))  # noqa: NPY002
            try:
                yield
            finally:
                random.setstate(python_state)
                np.random.set_state(numpy_state)  # noqa: NPY002


class SecretCoins(Coins):
    """Draws from the operating system; on an accelerator, from a generator keyed anew at each call.

    Guarantees:
        * No draw depends on any seed a user can set (test: test_secret_coins_ignore_every_seed).
        * On the CPU normal draws reach beyond 8 standard deviations: 53-bit uniforms, not 24-bit ones.
    """

    is_secret: ClassVar[bool] = True

    def bits(self, count: int) -> np.ndarray:
        return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)

    def normal_like(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            generator = torch.Generator(device=tensor.device)
            generator.manual_seed(int(self.bits(1)[0] >> np.uint64(1)))
            return torch.randn(
                tensor.shape, device=tensor.device, dtype=tensor.dtype, generator=generator
            )
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
        for start in range(0, flat.numel(), _BLOCK):
            _fill_normal(flat[start : start + _BLOCK])
        return flat.view(tensor.shape)

    def signed_uniforms(self, count: int, device: torch.device) -> Tensor:
        if device.type != "cpu":
            generator = torch.Generator(device=device)
            generator.manual_seed(int(self.bits(1)[0] >> np.uint64(1)))
            return _centred(
                torch.randint(-_HALF, _HALF, (count,), generator=generator, device=device)
            )
        if count == 0:
            return torch.empty(0, dtype=torch.float64)
        return _centred(torch.frombuffer(_secret_bytes(8 * count), dtype=torch.int64) >> 11)


def _centred(whole: Tensor) -> Tensor:
    """Whole numbers from [-2^52, 2^52) to the middles of as many cells of (-1, 1), exactly."""
    return whole.double().add_(0.5).mul_(1.0 / _HALF)


def _fill_normal(block: Tensor) -> None:
    """Box-Muller in float64, on 53 bits a draw; `block` is 1-d."""
    half = (block.numel() + 1) // 2
    words = torch.frombuffer(_secret_bytes(16 * half), dtype=torch.int64)
    # The shift keeps the sign: [-2^52, 2^52) becomes (0, 1]; 2^52 + 0.5 at once would be rounded to 0.
    uniform = (words >> 11).double().add_(2.0**52).add_(0.5).mul_(2.0**-53)
    radius = uniform[:half].log_().mul_(-2.0).sqrt_()
    angle = uniform[half:].mul_(2.0 * math.pi)
    block[:half] = angle.cos().mul_(radius)
    block[half:] = angle.sin_().mul_(radius)[: block.numel() - half]


def _secret_bytes(count: int) -> bytearray:
    """Bytes that nobody can predict, writable as torch wants them."""
    if ssl is None:
        return bytearray(os.urandom(count))
    ssl.RAND_add(os.urandom(_KEY_BYTES), float(_KEY_BYTES))
    return bytearray(ssl.RAND_bytes(count))


class FixedCoins(Coins):
    """Reproducible draws, for tests. A run on them is not private, and its ledger says so."""

    is_secret: ClassVar[bool] = False

    def __init__(self, generator: torch.Generator) -> None:
        """Draw from `generator`, a CPU generator."""
        self.generator = generator

    def bits(self, count: int) -> np.ndarray:
        halves = torch.randint(0, 1 << 32, (2, count), generator=self.generator)
        high, low = halves.numpy().astype(np.uint64)
        drawn: np.ndarray = (high << np.uint64(32)) | low
        return drawn

    def normal_like(self, tensor: Tensor) -> Tensor:
        draws = torch.randn(tensor.shape, generator=self.generator, dtype=tensor.dtype)
        return draws.to(tensor.device)

    def signed_uniforms(self, count: int, device: torch.device) -> Tensor:
        return _centred(torch.randint(-_HALF, _HALF, (count,), generator=self.generator)).to(device)
