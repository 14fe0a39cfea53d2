"""The options of DPArguments that say which noise is added, and how much."""

from __future__ import annotations

from typing import Protocol, get_args

from hf_dp._validate import one_of, positive
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import Norm

NOISES = ("gaussian", "laplace", "lmo", "auto")
SEARCHED = ("lmo", "auto")
"""Kinds of noise whose shape a search finds for the run."""


class NoiseOptions(Protocol):
    """The fields that are checked here."""

    target_epsilon: float | None
    noise_multiplier: float | None
    noise: str
    clipping_norm_type: str


def check_noise_options(given: NoiseOptions) -> None:
    """Refuse what is no option, and what does not go together.

    Raises:
        ConfigurationError: A value is unknown or out of range, or the size of the noise is not known.
    """
    one_of("DPArguments.noise", given.noise, NOISES, "It is what hides each example.")
    one_of(
        "DPArguments.clipping_norm_type",
        given.clipping_norm_type,
        get_args(Norm),
        "The noise is sized for what one example can move in this norm.",
    )
    if [given.target_epsilon, given.noise_multiplier].count(None) != 1:
        raise ConfigurationError(
            explain(
                "DPArguments.(target_epsilon, noise_multiplier)",
                (given.target_epsilon, given.noise_multiplier),
                "exactly one of the two",
                "Neither asks for no privacy, and both contradict each other.",
                "Set target_epsilon=3.0 and let the accountant choose the noise, or set "
                "noise_multiplier and read epsilon from the log.",
            )
        )
    if given.target_epsilon is not None:
        positive(
            "DPArguments.target_epsilon",
            given.target_epsilon,
            "Epsilon 0 would need infinite noise.",
            "Typical values are 0.5 to 8.",
        )
    if given.noise_multiplier is not None:
        positive(
            "DPArguments.noise_multiplier",
            given.noise_multiplier,
            "Without noise nothing is private.",
            "Use transformers.Trainer to train without privacy.",
        )
    if given.noise in SEARCHED and given.target_epsilon is None:
        raise ConfigurationError(
            explain(
                "DPArguments.noise",
                given.noise,
                "'gaussian' or 'laplace' with noise_multiplier",
                "Which noise is best is searched for a guarantee, and none is asked for.",
                "Set target_epsilon instead of noise_multiplier.",
            )
        )
