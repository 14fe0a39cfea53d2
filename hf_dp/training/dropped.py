"""Units that were dropped among others, again by themselves: nothing but its own content drops an example.

Padding that leaves a loss as it is may still make its gradient nan (``where`` hides a nan in one direction
alone). Then a long example would drop all those that it makes be padded, and move the sum by as many shares.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from hf_dp.sums import ClippedSum

Batches = Sequence[Mapping[str, Any]]


class Units:
    """The units of a micro-batch, part by part."""

    def __init__(
        self,
        sizes: Sequence[int],
        alone: Callable[[], Iterable[Mapping[str, Any]]],
        again: Callable[[Batches], ClippedSum],
    ) -> None:
        """Hold what a unit's sum by itself takes.

        Args:
            sizes: Examples of each.
            alone: The batches of one example each of which the micro-batch was made; none if no example was
                filled up.
            again: The clipped sum of one unit, whose examples stay apart.
        """
        self._ends = list(itertools.accumulate(sizes))
        self._sizes = sizes
        self._alone = alone
        self._again = again
        self._seen = 0

    def with_dropped_again(self, summed: ClippedSum) -> ClippedSum:
        """The sum of the next units with what dropped ones add by themselves, if that is finite.

        Args:
            summed: It is added to in place.
        """
        first, self._seen = self._seen, self._seen + len(summed.norms)
        dropped = (~torch.isfinite(summed.norms)).nonzero().flatten().tolist()
        batches = list(self._alone()) if dropped else []
        if not batches:
            return summed
        norms, losses = summed.norms.clone(), summed.losses.clone()
        for unit in dropped:
            end, size = self._ends[first + unit], self._sizes[first + unit]
            own = self._again(batches[end - size : end])
            summed = summed + own
            norms[unit], losses[unit] = own.norms[0], own.losses[0]
        return replace(summed, norms=norms, losses=losses)
