"""A tensor's shape and a few random sums of each of its rows: enough to know its rows again.

A probe sees every tensor of a model; keeping them would take as much memory as training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SUMS = 4
_CLOSE = (
    1e-2  # of the largest entry: rounding in any dtype; rows of another position differ by more
)


@dataclass(frozen=True)
class Sketch:
    """What is kept of a tensor.

    Attributes:
        shape: Its shape.
        floating: Whether it may have a gradient.
        rows: For each of its first two axes, ``(length, 4)`` sums over the rest.
    """

    shape: torch.Size
    floating: bool
    rows: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Sketch:
        """Sketch a tensor of any dtype."""
        rows = tuple(_sums(tensor, axis) for axis in range(min(tensor.dim(), 2)))
        return cls(tensor.shape, tensor.is_floating_point(), rows)

    def twice_over(self, other: Sketch) -> bool:
        """Whether `other` is this twice, one after the other, and not row by row."""
        one, two = self.rows[0], other.rows[0]
        scale = float(one.abs().max()) if one.numel() else 0.0
        if not bool(((one - one[:1]).abs() > 1e-5 * scale).any()):
            return False  # rows that are all alike do not show their order
        return bool(((torch.cat([one, one]) - two).abs() <= _CLOSE * scale).all())


def in_order(mixed: Tensor, alone: list[Tensor], order: list[int]) -> bool:
    """Whether each part of `mixed` is most like what the example in its place gives alone.

    Distances, not equality, so that rounding and batch mates do not matter.
    """
    parts = mixed.reshape(len(order), -1)
    if any(one.numel() != parts.shape[1] for one in alone):
        return True  # not comparable
    distances = torch.stack([(parts - one.reshape(1, -1)).norm(dim=1) for one in alone], 1)
    own = distances[torch.arange(len(order)), order]
    slack = 1e-3 * distances.max()
    return not bool((own > distances.amin(1) + slack).any())


def _sums(tensor: Tensor, axis: int) -> Tensor:
    """Sums over all axes but one, with weights that are different everywhere."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    values = torch.nan_to_num(tensor.movedim(axis, 0).float(), nan=0.5, posinf=1.0, neginf=-1.0)
    values = values.clamp(-1e6, 1e6)  # masks hold the dtype's smallest number
    if values.numel() == 0:
        return values.new_zeros(len(values), _SUMS)
    if values.dim() == 1:
        return values[:, None].expand(-1, _SUMS)
    over_last = values.reshape(len(values), -1, values.shape[-1]) @ _weights(
        values.shape[-1], _SUMS, values.device
    )
    return (over_last * _weights(over_last.shape[1], _SUMS, values.device)).sum(1)


def _weights(length: int, count: int, device: torch.device) -> Tensor:
    places = torch.arange(1, length + 1, device=device, dtype=torch.float32)[:, None]
    speeds = torch.arange(1, count + 1, device=device, dtype=torch.float32)
    return torch.cos(places * (0.7 + 0.618 * speeds))
