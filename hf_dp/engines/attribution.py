"""Proof that the rows of every tapped call belong to the examples to which their place gives them.

A row is an example's own if its gradient depends on no other example's loss. A backward pass is linear in
the weights of the losses, so it is run twice over one graph: once with weights of one and once with a
power of two for each example, all different and in secret order. Multiplying by a power of two is exact
in floating point, so the rows of an example must come out as those of the first pass times its power.
A row of another example is off by a factor of two or more; one that mixes examples is off by at least
half of what the others bring.

What is smaller than rounding is not seen: what other examples' losses bring to a row passes below about
4e-6 of the row's length in float32, and below 3 % of it in bfloat16 and float16. A model that mixes
examples by less lets one example move each of its batch mates' rows by as little: next to its own share of
at most C, each mate's clipped gradient by up to about 6 % of C, or more where that mate's rows cancel.
Whole rows in the wrong place are off by all of their length and always seen. A preflight looks for mixing
by another way, in the losses; one example at a time there is none in any dtype.
"""

from __future__ import annotations

import functools
import random
import secrets
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hf_dp.engines.coverage import NotTappableError, TapPoint
from hf_dp.engines.tap import Call, Recording
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.base import UnitAxis
from hf_dp.layers.factors import wide

Backward = Callable[[Tensor, Callable[[Call], None]], None]
"""``backward(losses, on_call)`` runs a backward pass over one graph, as often as it is called."""

_Noted = tuple[Tensor, Tensor]
"""Random sums of rows, ``(B, R, sums)``, and the rows' lengths, ``(B, R, 1)``."""

_SUMS = 4  # random sums of a row; all of them miss a difference of its size once in 1e8 times
_LEVELS, _FEW_LEVELS = 64, 4  # powers of two in one pass; float16 overflows early
_EPSILONS = 32  # tolerance, for kernels that do not repeat their sums' order
_MOST = 0.03


class MixedRowsError(NotTappableError):
    """Rows of a tapped call depend on the loss of another example than their place says."""

    def __init__(self, point: TapPoint) -> None:
        """Say which call it is."""
        super().__init__(
            point,
            f"{point.described} has rows whose gradient depends on another example's loss: expected each "
            "row to belong to the example in its place. One example's gradient would be clipped as "
            "another's. Use engine='sequential', or freeze it.",
        )


class UnprovedError(UncoveredParameterError):
    """Gradients that are not finite do not show whose they are."""

    def __init__(self) -> None:
        """Name no example."""
        super().__init__(
            "a model that arranges rows by what they hold: expected finite gradients, which show whose "
            "row is whose. Without that one example's gradient cannot be told from another's. "
            "Use engine='sequential'."
        )


def prove(record: Recording, losses: Tensor, *, hidden: bool) -> bool:
    """Whether every example's rows were seen to be its own; the graph is kept.

    Args:
        record: A forward pass under taps.
        losses: What it gave, ``(B,)``, with their graph.
        hidden: Refuse finite losses with gradients that are not; else they leave it unproved.

    Raises:
        MixedRowsError: Some are not.
        UnprovedError: That cannot be seen.
    """
    return compare(functools.partial(record.backward, again=True), losses, hidden=hidden)


def compare(backward: Backward, losses: Tensor, *, hidden: bool) -> bool:
    """As `prove`, for whatever calls a backward pass hands over."""
    if len(losses) == 1 or not losses.requires_grad:
        return True
    proof = Proof(backward, losses)
    backward(losses, proof.note)
    return proof.verdict(hidden=hidden)


class Proof:
    """Random sums of the rows of every gradient in several passes over one graph, and what they show."""

    def __init__(self, backward: Backward, losses: Tensor) -> None:
        """Run the passes in which each example's loss has a weight of its own.

        Args:
            backward: Keeps the graph.
            losses: ``(B,)``, as the pass that `note` sees has them, with their graph.
        """
        self.units = len(losses)
        epsilon, tiny = (getattr(torch.finfo(_coarsest(losses)), n) for n in ("eps", "tiny"))
        self._tolerance = min(_EPSILONS * epsilon, _MOST)
        self._floor = tiny**0.8  # below it numbers underflow on the way
        self._finite = torch.isfinite(losses.detach())
        self._vectors: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        self._points: dict[int, TapPoint] = {}  # by call
        self._noted: dict[int, list[_Noted | None]] = {}
        self._found: list[tuple[Tensor, dict[int, list[Tensor | None]]]] = []
        for weights in _weights(self.units, losses):
            found: dict[int, list[Tensor | None]] = {}
            self._found.append((wide(weights)[:, None, None], found))
            backward(losses * weights, functools.partial(self._see, found))

    def note(self, call: Call) -> None:
        """The gradients of a call in the pass in which all losses have the weight one."""
        self._points[call.key] = call.point
        self._noted[call.key] = [
            None if rows is None else (self._sums(rows), _length(rows)) for rows in self._rows(call)
        ]

    def verdict(self, *, hidden: bool) -> bool:
        """Whether all is proved.

        Raises:
            MixedRowsError: Some row is not of the example in its place.
            UnprovedError: `hidden`, and some row of an example whose loss is finite does not show whose
                it is.
        """
        gaps = list(self._gaps())
        if not gaps:
            return True
        device = self._finite.device
        mixed = torch.stack([flag.to(device) for _, flag, _ in gaps])
        if bool(mixed.any()):
            raise MixedRowsError(gaps[int(mixed.nonzero()[0])][0])
        unseen = torch.stack([flags.to(device) for _, _, flags in gaps]).any(0)
        if not bool((unseen & self._finite).any()):  # others add nothing, whatever their gradient
            return not bool(unseen.any())
        if hidden:
            raise UnprovedError
        return False

    def _see(self, found: dict[int, list[Tensor | None]], call: Call) -> None:
        self._points[call.key] = call.point
        found[call.key] = [None if rows is None else self._sums(rows) for rows in self._rows(call)]

    def _gaps(self) -> Iterator[tuple[TapPoint, Tensor, Tensor]]:
        """By gradient and pass: whether a row is mixed, and which examples' rows, ``(B,)``, show nothing."""
        for scale, found in self._found:
            for key, point in self._points.items():
                here, there = self._noted.get(key), found.get(key)
                count = len(here or there or ())
                for noted, other in zip(
                    here or [None] * count, there or [None] * count, strict=True
                ):
                    if noted is not None or other is not None:
                        yield point, *self._gap(noted, None if other is None else other / scale)

    def _gap(self, noted: _Noted | None, other: Tensor | None) -> tuple[Tensor, Tensor]:
        if noted is None:
            assert other is not None
            gap, allowed = other, other.new_tensor(self._floor)
        else:
            sums, length = noted
            gap = sums if other is None else sums - other
            allowed = length * self._tolerance + self._floor
        seen = torch.isfinite(gap)
        return (seen & (gap.abs() > allowed)).any(), ~seen.flatten(1).all(1)

    def _rows(self, call: Call) -> Iterator[Tensor | None]:
        """Each gradient as ``(B, R, width)``; None where there is none, or no axis of examples."""
        axes = [call.context] if isinstance(call.context, UnitAxis) else call.context[0].output_axes
        for grad, axis in zip(call.output_grads, axes, strict=True):
            if grad is None or axis.dim is None:
                yield None  # the rule refuses a gradient without an axis
                continue
            first = axis.units_first(grad, self.units)
            width = first.shape[-1] if first.dim() > 1 else 1
            yield first.reshape(self.units, -1, width) if first.numel() else None

    def _sums(self, rows: Tensor) -> Tensor:
        key = (rows.shape[-1], rows.device, rows.dtype)
        if key not in self._vectors:
            generator = torch.Generator().manual_seed(secrets.randbits(63))
            drawn = torch.randn(rows.shape[-1], _SUMS, generator=generator, dtype=torch.float32)
            self._vectors[key] = drawn.to(rows.device, rows.dtype)
        return wide(rows @ self._vectors[key])


def _length(rows: Tensor) -> Tensor:
    """Of each row, ``(B, R, 1)``."""
    kind = torch.float64 if rows.dtype == torch.float64 else torch.float32
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=kind)
    return length


def _weights(units: int, losses: Tensor) -> Iterator[Tensor]:
    """Powers of two, ``(B,)`` a pass, that are different for any two units in some pass."""
    levels = _FEW_LEVELS if _coarsest(losses) == torch.float16 else _LEVELS
    # Few units are spread as widely: what bounds gradients of a whole batch together then shows.
    step = max(1, (levels - 1) * 2 // 3 // (units - 1))
    numbers = list(range(units))
    random.SystemRandom().shuffle(numbers)
    while any(numbers):
        exponents = torch.tensor([float(step * (number % levels)) for number in numbers])
        yield torch.exp2(exponents.double()).to(losses)
        numbers = [number // levels for number in numbers]


def _coarsest(losses: Tensor) -> torch.dtype:
    """The dtype that rounds most among those that the pass may have computed in."""
    kind = losses.device.type
    seen = [losses.dtype]
    if torch.is_autocast_enabled(kind):
        seen.append(torch.get_autocast_dtype(kind))
    return max(seen, key=lambda dtype: (dtype == torch.float16, torch.finfo(dtype).eps))
