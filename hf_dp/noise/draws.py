"""Draws that noise is made of, in float64 from 53-bit uniforms, so that heavy tails are not cut."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_dp.coins import Coins
from hf_dp.scale_law import ScaleLaw

Draw = Callable[[int, torch.device], Tensor]  # count, device -> independent draws, (count,) float64

_BLOCK = 1 << 17  # values drawn at a time: what fits in a processor's cache,
_BLOCK_ON_ACCELERATOR = 1 << 22  # and what keeps an accelerator busy


def add_in_blocks(tensor: Tensor, draw: Draw) -> Tensor:
    """Add independent draws to every coordinate, in place; memory for one block is all it takes."""
    device = tensor.device
    if device.type == "mps":  # knows no float64
        device = torch.device("cpu")
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
    block = _BLOCK if device.type == "cpu" else _BLOCK_ON_ACCELERATOR
    for part in flat.split(block):
        part.add_(draw(part.numel(), device).to(part))
    return tensor if tensor.is_contiguous() else tensor.copy_(flat.view(tensor.shape))


def laplace(count: int, device: torch.device, coins: Coins) -> Tensor:
    """Independent Laplace draws of scale 1, ``(count,)``: size up to 36, as 2^-53 is the least uniform."""
    sign = coins.signed_uniforms(count, device)
    return sign.abs().log_().neg_().copysign_(sign)


def laplace_of_drawn_scale(law: ScaleLaw, count: int, device: torch.device, coins: Coins) -> Tensor:
    """Independent Laplace draws of scale 1 / lambda, each with a lambda of its own, ``(count,)``."""
    drawn = laplace(count, device, coins)
    if not law.exponential_mean and not law.uniform_high:
        # A Gamma part alone: P(size > x) = (1 + gamma_scale x)^-gamma_shape is inverted.
        size = drawn.abs().div_(law.gamma_shape).expm1_().div_(law.gamma_scale)
        return size.copysign_(drawn)
    return drawn.div_(inverse_scales(law, count, device, coins))


def inverse_scales(law: ScaleLaw, count: int, device: torch.device, coins: Coins) -> Tensor:
    """Independent draws of lambda, ``(count,)``, all > 0."""
    total = torch.full((count,), law.uniform_low, dtype=torch.float64, device=device)
    width = law.uniform_high - law.uniform_low
    if width > 0:
        total.add_(coins.signed_uniforms(count, device).abs_(), alpha=width)
    if law.exponential_mean > 0:
        drawn = coins.signed_uniforms(count, device).abs_().log_()
        total.sub_(drawn, alpha=law.exponential_mean)
    if law.gamma_scale > 0:
        total.add_(gamma(law.gamma_shape, count, device, coins), alpha=law.gamma_scale)
    return total


def gamma(shape: float, count: int, device: torch.device, coins: Coins) -> Tensor:
    """Independent Gamma draws of scale 1, ``(count,)``.

    Source:
        Marsaglia and Tsang (2000), "A simple method for generating gamma variables"; their note in
        section 6 for shapes below 1.
    """
    if shape < 1:
        power = coins.signed_uniforms(count, device).abs_().log_().div_(shape).exp_()
        return gamma(shape + 1, count, device, coins).mul_(power)
    offset = shape - 1 / 3
    steepness = 1 / math.sqrt(9 * offset)
    drawn = torch.empty(count, dtype=torch.float64, device=device)
    pending = torch.arange(count, device=device)
    while len(pending):
        normal = coins.normal_like(torch.empty(len(pending), dtype=torch.float64, device=device))
        cube = (1 + steepness * normal).pow_(3)
        threshold = 0.5 * normal**2 + offset * (1 - cube + cube.log())  # nan where cube < 0
        accepted = coins.signed_uniforms(len(pending), device).abs_().log_() < threshold
        drawn[pending[accepted]] = offset * cube[accepted]
        pending = pending[~accepted]
    return drawn
