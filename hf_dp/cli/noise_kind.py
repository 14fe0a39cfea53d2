"""The noise of a run, as the command line names it."""

from __future__ import annotations

from typing import cast, get_args

from hf_dp._validate import one_of
from hf_dp.cli.run import GAUSSIAN
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import Gaussian, Laplace, Norm


def noise_kind(noise: str, norm: str | None, dimension: int | None) -> Gaussian | Laplace:
    """The event of one release with a noise multiplier of 1.

    Args:
        noise: "gaussian" or "laplace".
        norm: In which one unit is clipped; None for "l2" with Gaussian and "l1" with Laplace noise.
        dimension: Numbers that are noised, at most; of use with Laplace noise and "l2" only.

    Raises:
        ConfigurationError: There is no such noise or norm, or an option says nothing about it.
    """
    one_of("hf-dp.noise", noise, ("gaussian", "laplace"), "Its law decides what a release costs.")
    if norm is not None:
        one_of("hf-dp.norm", norm, get_args(Norm), "It is how far one unit may move the sum.")
    if noise == "laplace":
        return Laplace(1.0, cast(Norm, norm or "l1"), dimension)
    for option, value in {"norm": norm, "dimension": dimension}.items():
        if value is not None:
            raise ConfigurationError(
                explain(
                    f"hf-dp.{option}",
                    value,
                    "nothing with noise 'gaussian'",
                    "Its cost is that of the l2 norm, whatever the number of coordinates.",
                    "Leave it out, or give --noise laplace.",
                )
            )
    return GAUSSIAN
