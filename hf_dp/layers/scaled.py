"""Weighted sums of products, with a scaled input shared by the layers that share the input."""

from __future__ import annotations

from torch import Tensor

from hf_dp.layers.per_unit import wide
from hf_dp.layers.views import same_numbers


class ScaledProducts:
    """``sum_i w_i left_i^T right_i``, one pair after the other; the last scaled `right` is kept."""

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # right, weights, right * weights

    def weighted_sum(self, left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
        """One pair ``(B, T, d)``, ``(B, T, p)`` with weights ``(B,)``: ``(d, p)``."""
        if left.shape[-1] < right.shape[-1]:
            scaled = wide(left) * weights_of(
                left, weights
            )  # a new tensor: others share the old one
            return scaled.flatten(0, 1).mT @ wide(right).flatten(0, 1)
        last = self._last
        if last is None or last[1] is not weights or not same_numbers(last[0], right):
            self._last = last = right, weights, wide(right) * weights_of(right, weights)
        return wide(left).flatten(0, 1).mT @ last[2].flatten(0, 1)


def weights_of(tensor: Tensor, weights: Tensor) -> Tensor:
    """`weights`, ``(B,)``, as they multiply ``(B, T, width)``."""
    return weights.to(wide(tensor).dtype)[:, None, None]
