"""What may be said about users, and which options go together."""

from __future__ import annotations

from typing import Protocol

from hf_dp._validate import one_of, positive_integer
from hf_dp.engines.owners import USER_REDUCTIONS
from hf_dp.errors import ConfigurationError, explain
from hf_dp.sampling.users import SELECTIONS

PRIVACY_UNITS = ("example", "user")
USER_SAMPLINGS = ("users", "examples")

_DEFAULTS = {
    "user_column": "user_id",
    "user_sampling": "users",
    "max_examples_per_user": None,
    "user_reduction": "mean",
    "user_selection": "random",
}


class UserOptions(Protocol):
    """The fields of ``DPArguments`` that are checked together."""

    privacy_unit: str
    sampling: str
    user_column: str
    user_sampling: str
    max_examples_per_user: int | None
    user_reduction: str
    user_selection: str


def check_user_options(given: UserOptions) -> None:
    """Refuse what is no option, or says nothing beside the others.

    Raises:
        ConfigurationError: A value is unknown, or would be without effect where it stands.
    """
    one_of(
        "DPArguments.user_sampling",
        given.user_sampling,
        USER_SAMPLINGS,
        "It is what is drawn, and what is accounted for.",
    )
    one_of(
        "DPArguments.user_reduction",
        given.user_reduction,
        USER_REDUCTIONS,
        "It is what of a user's examples is clipped as one.",
    )
    one_of(
        "DPArguments.user_selection",
        given.user_selection,
        SELECTIONS,
        "It says which of a user's examples are kept.",
    )
    if given.max_examples_per_user is not None:
        positive_integer(
            "DPArguments.max_examples_per_user",
            given.max_examples_per_user,
            "It bounds how many examples of a user count.",
            "Use a small number, such as 8, or leave it out.",
        )
    if not isinstance(given.user_column, str) or not given.user_column:
        raise _refusal(
            given,
            "user_column",
            "the name of a column",
            "It tells which examples belong to the same user.",
            "Name it, or pass users= to DPTrainer.",
        )
    if given.privacy_unit == "user":
        _check_sampling(given)
        return
    for name, default in _DEFAULTS.items():
        if getattr(given, name) != default:
            raise _refusal(
                given,
                name,
                f"{default!r} with privacy_unit={given.privacy_unit!r}",
                "Single examples are protected, whoever owns them, so it would be without effect.",
                "Set privacy_unit='user', or leave it out.",
            )


def _check_sampling(given: UserOptions) -> None:
    if given.user_sampling == "users":
        if given.user_selection != "random":
            raise _refusal(
                given,
                "user_selection",
                "'random' with user_sampling='users'",
                "Each drawn user brings fresh random examples, none are kept for good.",
                "Leave it out, or set user_sampling='examples'.",
            )
        return
    if given.max_examples_per_user is None:
        raise _refusal(
            given,
            "max_examples_per_user",
            "a whole number > 0 with user_sampling='examples'",
            "A user with many examples could be drawn many times into one batch, and nothing would bound "
            "what they add to it.",
            "Set it, to 4 for example.",
        )
    if given.user_reduction != "mean":
        raise _refusal(
            given,
            "user_reduction",
            "'mean' with user_sampling='examples'",
            "Examples are clipped one by one there, so that nothing is reduced.",
            "Leave it out, or set user_sampling='users'.",
        )
    if given.sampling != "poisson":
        raise _refusal(
            given,
            "sampling",
            "'poisson' with user_sampling='examples'",
            "How often a user is drawn into one batch is known for Poisson sampling alone.",
            "Use sampling='poisson', or user_sampling='users'.",
        )


def _refusal(
    given: UserOptions, name: str, expected: str, why: str, remedy: str
) -> ConfigurationError:
    return ConfigurationError(
        explain(f"DPArguments.{name}", getattr(given, name), expected, why, remedy)
    )
