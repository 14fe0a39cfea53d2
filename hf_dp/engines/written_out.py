"""Clipping in the L1 norm: every unit's gradient is written out, for absolute values do not factor.

Norm and share of a unit come from the same numbers, in which all uses of a parameter are added up. They
cost as many numbers for each unit as are trained, so few units at a time where these are many.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.clipping.base import ClippingPolicy
from hf_dp.clipping.loss import LossRelease
from hf_dp.engines.base import ExampleLoss, gradient_clipping, released_losses, sums_of_all
from hf_dp.engines.books import Norms
from hf_dp.engines.owners import Owners
from hf_dp.engines.powers import norms_of, power_sums
from hf_dp.engines.precision import full_precision
from hf_dp.engines.recorder import Recorder
from hf_dp.engines.rows import batch_size, rows
from hf_dp.engines.shares import checked_shape
from hf_dp.layers.factors import Factor, Vec
from hf_dp.sums import ClippedSum

_PART_OF_MEMORY = 0.25
"""Of the device's memory, for gradients that are written out."""


def summed_written_out(
    recorder: Recorder,
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    example_loss: ExampleLoss,
    clipping: ClippingPolicy,
    loss_release: LossRelease | None,
    owners: Owners | None,
) -> tuple[ClippedSum, bool]:
    """The clipped sum from gradients written out in one backward pass, and whether a unit was dropped.

    Guarantees:
        * Each unit adds at most ``clipping.sensitivity`` in ``clipping.norm``
          (test: test_one_example_moves_a_sum_by_at_most_the_bound).
    """
    grads: dict[str, Vec] = {}
    sums: dict[str, Tensor] = {}

    def write(name: str, factor: Factor) -> None:
        grads[name] = factor.dense()
        sums[name] = power_sums(grads[name].values, clipping.norm)

    with recorder.forward(model, inputs, example_loss, owners) as passed:
        passed.backward(write)
    losses = passed.losses
    with full_precision(losses.device):
        norms = Norms([([name], row[None], row[None]) for name, row in sums.items()], losses)
        total = norms.total()
        dropped = ~torch.isfinite(total)
        some = bool(dropped.any())
        weights = gradient_clipping(clipping, loss_release).weights(norms.squared)
        found: dict[str, Tensor] = {}
        while grads:
            name = next(iter(grads))
            vec = grads.pop(name)
            found[name] = (vec.without(dropped) if some else vec).weighted_sum(weights[name])
            checked_shape(name, found[name], passed.parameters[name].shape)
    summed = ClippedSum(
        grads=sums_of_all(passed.parameters, found),
        norms=norms_of(total, clipping.norm),
        losses=losses,
        loss_sum=released_losses(losses, dropped, clipping, loss_release),
    )
    return summed, some


def units_that_fit(numbers: int, parameter: Tensor) -> int:
    """Of how many units `numbers` of the kind of `parameter` may be written out together; at least 1."""
    memory = _memory(parameter.device)
    if memory is None:
        return 2**62
    size = max(4, parameter.element_size())
    return max(1, int(_PART_OF_MEMORY * memory) // max(1, numbers * size))


def cut(
    inputs: Mapping[str, Any], owners: Owners | None, most: int
) -> Iterator[tuple[Mapping[str, Any], Owners | None]]:
    """A micro-batch as several of at most so many units, in their order."""
    sizes = (1,) * batch_size(inputs) if owners is None else owners.sizes
    ends = [0, *accumulate(sizes)]
    for start in range(0, len(sizes), most):
        stop = min(start + most, len(sizes))
        mine = owners and Owners(sizes[start:stop], owners.reduction)
        yield rows(inputs, ends[start], ends[stop]), mine


def _memory(device: torch.device) -> int | None:
    """Bytes that the device has in all; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
