"""``hf-dp plan-users``: whether to draw users or examples, and how many of each user."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_dp.cli.options import AsJson, NumSteps, TargetEpsilon
from hf_dp.cli.paper import paper
from hf_dp.errors import ConfigurationError, explain

if TYPE_CHECKING:
    from hf_dp.accounting.user_planner import UserPlan


def plan_users(
    *,
    examples_per_step: Annotated[
        float, typer.Option(help="Compute: expected number of gradients per step, > 0.")
    ],
    num_steps: NumSteps,
    target_epsilon: TargetEpsilon,
    user_sizes: Annotated[
        Path | None,
        typer.Option(
            help="File with every user's number of examples: one per line, or a JSON list. The numbers "
            "must be public."
        ),
    ] = None,
    num_users: Annotated[
        int | None, typer.Option(help="Users, where all own equally many.")
    ] = None,
    examples_per_user: Annotated[
        int | None, typer.Option(help="Examples of each user; with --num-users.")
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Less than 1 / users. Default: users to the power -1.1.")
    ] = None,
    cosine: Annotated[
        float,
        typer.Option(help="Assumed mean cosine between gradients inside a user, in [0, 1]."),
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Print what drawing users and drawing examples would cost at equal compute, and which is better."""
    from hf_dp.accounting import user_planner

    plan = user_planner.plan_users(
        _sizes(user_sizes, num_users, examples_per_user),
        examples_per_step=examples_per_step,
        num_steps=num_steps,
        target_epsilon=target_epsilon,
        target_delta=delta,
        cosine=cosine,
    )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(plan), allow_nan=False))
    else:
        _show(plan)


def _sizes(path: Path | None, num_users: int | None, examples_per_user: int | None) -> list[int]:
    given = (num_users is not None, examples_per_user is not None)
    if (path is None and given == (True, True)) or (path is not None and given == (False, False)):
        if path is not None:
            return _read(path)
        from hf_dp._validate import positive_integer

        users = positive_integer("hf-dp.num_users", num_users or 0, _WHY, "Use at least 2.")
        return [examples_per_user or 0] * users
    remedy = "Give --user-sizes FILE, or --num-users and --examples-per-user."
    value = {
        "user_sizes": path and path.name,
        "num_users": num_users,
        "examples_per_user": examples_per_user,
    }
    raise ConfigurationError(
        explain("hf-dp.user_sizes", value, "one description of the users", _WHY, remedy)
    )


def _read(path: Path) -> list[int]:
    try:
        text = path.read_text(encoding="utf-8").strip()
        found = json.loads(text) if text.startswith("[") else [int(n) for n in text.split()]
    except (OSError, ValueError) as error:
        expected = "a file of whole numbers, one per line, or a JSON list of them"
        remedy = "Write every user's number of examples into it."
        raise ConfigurationError(
            explain("hf-dp.user_sizes", path.name, expected, _WHY, remedy)
        ) from error
    return list(found)


def _show(plan: UserPlan) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("", "drawn", "per user", "kept", "coverage", "probability", "users per step"):
        table.add_column(title)
    for title in ("noise multiplier", "noise per coordinate"):
        table.add_column(title)
    for row in plan.rows:
        users = "" if row.expected_users is None else f"{row.expected_users:.4g}"
        answer = ["impossible", row.why_not or ""]
        if row.noise is not None and row.noise_multiplier is not None:
            answer = [f"{row.noise_multiplier:.5g}", f"{row.noise:.3g}"]
        table.add_row(
            "->" if row == plan.best else "",
            row.user_sampling,
            str(row.max_examples_per_user),
            str(row.kept_examples),
            f"{math.floor(row.coverage * 100)}%",
            f"{row.sampling_probability:.4g}",
            users,
            *answer,
        )
    console = paper()
    console.print(table)
    guaranteed = f"epsilon {plan.target_epsilon:g} at delta {plan.target_delta:.3g}"
    console.print(
        f"Every row guarantees {guaranteed} for each of {plan.num_users} users.", soft_wrap=True
    )
    for sentence in (*plan.reasons, *plan.caveats):
        console.print(sentence, soft_wrap=True)


_WHY = "How many examples users own decides who is drawn how often."
