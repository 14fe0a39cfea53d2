"""A micro-batch again without the units that were dropped.

A unit whose gradient is not finite adds nothing. But in the pass that showed it, something in the model
may have looked at the gradients of all examples together, and emptied or shrunk those of its batch mates, as
guards against overflow do. So its mates are run again without it, and it moves nobody's share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hf_dp.engines.owners import Owners
from hf_dp.engines.rows import select_rows
from hf_dp.sums import ClippedSum

Again = Callable[[Mapping[str, Any], Owners | None], ClippedSum]


def without_dropped(
    summed: ClippedSum, inputs: Mapping[str, Any], owners: Owners | None, again: Again
) -> ClippedSum:
    """The sum over the units that were not dropped, as if the others had not been there.

    Args:
        summed: Of all units, ``(U,)``; norms are not finite where a unit was dropped.
        inputs: Their rows.
        owners: Which rows make a unit; None if each is one.
        again: Computes the sum over some of the rows.
    """
    kept = torch.isfinite(summed.norms).nonzero().flatten()
    units = kept.tolist()
    if not units:
        return summed
    sizes = (1,) * len(summed.norms) if owners is None else owners.sizes
    starts = [0, *itertools.accumulate(sizes)]
    rows = [row for unit in units for row in range(starts[unit], starts[unit + 1])]
    others = owners and Owners(tuple(sizes[unit] for unit in units), owners.reduction)
    rest = again(select_rows(inputs, rows), others)
    norms, losses = summed.norms.clone(), summed.losses.clone()
    norms[kept], losses[kept] = rest.norms, rest.losses
    return ClippedSum(grads=rest.grads, norms=norms, losses=losses, loss_sum=rest.loss_sum)
