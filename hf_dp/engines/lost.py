"""Whether taps see all of each gradient: two examples against plain autograd, once for each loss and mode.

A module may hand on what it computed where no tap is: in an attribute that a loss reads later, in a
function that it returns. Of the gradient that flows there the taps know nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_dp.engines.attach import recording
from hf_dp.engines.base import ExampleLoss, checked_losses
from hf_dp.engines.coverage import Coverage
from hf_dp.engines.mates import GAPS, coarseness, noting_half
from hf_dp.engines.recorder import Pass
from hf_dp.engines.rows import select_rows
from hf_dp.engines.sequential import gradients_of
from hf_dp.engines.settle import looked_at
from hf_dp.engines.sharded import is_sharded
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.factors import Factor
from hf_dp.layers.randomness import kept_randomness

# What rounding does not explain: of a parameter's gradient, and besides of all parameters' together.
_OF_ITS_OWN = {"float32": 2e-2, "accelerator": 5e-2, "half": 0.25}
_OF_ALL = {"float32": 1e-3, "accelerator": 1e-2, "half": 2e-2}


def refuse_lost(
    model: nn.Module,
    inputs: Mapping[str, Any],
    coverage: Coverage,
    example_loss: ExampleLoss,
    rows_to_try: Callable[[], Sequence[int]],
) -> None:
    """Compare the sums of a few examples' gradients, parameter by parameter; under FSDP nothing is done.

    Args:
        model: As the engine calls it.
        inputs: A micro-batch that was taken under `coverage`.
        coverage: Keeps for what it was done.
        example_loss: One loss per example.
        rows_to_try: Which examples; asked only if it was not done.

    Raises:
        UncoveredParameterError: What taps saw is not the gradient.
    """
    key = looked_at(inputs, coverage, example_loss)
    if key in coverage.whole or is_sharded(model):
        return
    rows = rows_to_try()
    few, units = select_rows(inputs, rows), len(rows)
    device = next(iter(coverage.parameters.values())).device
    with kept_randomness(device), noting_half(model) as halves:
        plain = checked_losses(example_loss(model, few), units)
        missing = gradients_of(plain, coverage.parameters)
    lengths = {name: float(gradient.norm()) for name, gradient in missing.items()}
    everything = sum(length**2 for length in lengths.values()) ** 0.5
    rounding = coarseness(device, half=bool(halves))

    def take(name: str, factor: Factor) -> None:
        apart = factor.uncancelled().clamp_min(0).sqrt()
        seen = factor.weighted_sum(torch.ones_like(apart)).view_as(missing[name])
        missing[name] = missing[name] - seen  # two gradients may be one tensor
        # plain sums of many numbers in half precision come out short: what is small beside them is lost
        stuck = rounding == "half" and float(seen.norm()) > lengths[name]
        lengths[name] = float("inf") if stuck else max(lengths[name], float(apart.sum()))

    with kept_randomness(device), recording(coverage, units) as record:
        losses = checked_losses(example_loss(model, few), units)
        Pass(coverage, record, losses, None).backward(take)
    # a model that draws from a generator of its own gives another loss, and another gradient
    repeated = torch.allclose(losses.detach(), plain.detach(), GAPS[rounding], atol=1e-6)
    for name, gap in missing.items():
        rounded = _OF_ITS_OWN[rounding] * lengths[name] + _OF_ALL[rounding] * everything
        if repeated and float(gap.norm()) > rounded:  # nothing that is no number is
            raise UncoveredParameterError(
                f"parameter {name!r}: expected its whole gradient, as plain autograd gives it. An attribute "
                "or a function that a module leaves behind, which the loss uses, or a wrong layer rule, "
                "would lose part of it. Use engine='sequential', return it, or mend the rule."
            )
    if 0 < everything < float("inf"):
        coverage.whole.add(key)
