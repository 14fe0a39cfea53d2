"""What a report says of noise that is not Gaussian."""

from __future__ import annotations

from collections.abc import Iterator

from hf_dp.events import Composed, Laplace, PrivacyEvent, ScaleMixtureLaplace

_MANY = 64
"""Coordinates from which on Laplace noise under an L2 bound always needs more than Gaussian noise."""


def dear_in_high_dimension(event: PrivacyEvent) -> str | None:
    """One sentence on Laplace noise, or a mixture, that costs more accuracy than Gaussian noise would.

    Args:
        event: What a mechanism, or a step, releases.

    Source:
        Of independent symmetric noise on many coordinates of a sum bounded in the L2 norm, only the Fisher
        information per coordinate counts (Dong, Su and Zhang 2021, arXiv:2103.08721), and with a
        density exp(-abs(z) / b), or a mixture of these, it is at least twice that of Gaussian noise
        of the same variance.
    """
    for noise in _laplace_in(event):
        if noise.norm == "l2" and (noise.dimension is None or noise.dimension >= _MANY):
            count = "any number of" if noise.dimension is None else f"{noise.dimension:,}"
            return (
                f"On {count} coordinates clipped in the l2 norm, Laplace noise needs at least about 1.41 "
                "times the standard deviation of Gaussian noise for the same guarantee."
            )
    return None


def _laplace_in(event: PrivacyEvent) -> Iterator[Laplace | ScaleMixtureLaplace]:
    if isinstance(event, Laplace | ScaleMixtureLaplace):
        yield event
    elif isinstance(event, Composed):
        for part in event.events:
            yield from _laplace_in(part)
    else:
        inner = getattr(event, "event", None)
        if isinstance(inner, PrivacyEvent):
            yield from _laplace_in(inner)
