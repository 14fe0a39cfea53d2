"""``hf-dp tuning``: what it costs to release only the best of several runs."""

from __future__ import annotations

from typing import Annotated, cast

import typer

from hf_dp.cli.options import AsJson, Delta, NoiseMultiplier, NumSteps, SamplingProbability
from hf_dp.cli.paper import paper


def tuning(
    *,
    sampling_probability: SamplingProbability,
    noise_multiplier: NoiseMultiplier,
    num_steps: NumSteps,
    delta: Delta,
    num_runs: Annotated[
        float, typer.Option(help="Runs expected, > 1; how many are made is drawn at random.")
    ] = 10.0,
    distribution: Annotated[
        str,
        typer.Option(
            help="How the number of runs is drawn: 'logarithmic' (cheapest for many), 'geometric' or "
            "'poisson'."
        ),
    ] = "logarithmic",
    as_json: AsJson = False,
) -> None:
    """Print the epsilon of releasing only the best of a random number of runs."""
    from hf_dp.accounting import accountant_named
    from hf_dp.accounting.tuning import Distribution, RandomRepeats, guarantee_of_best
    from hf_dp.cli.run import PoissonRun

    repeats = RandomRepeats(num_runs, cast(Distribution, distribution))  # it checks the name
    run = PoissonRun(sampling_probability, num_steps, noise_multiplier)
    best = guarantee_of_best(run.event(), repeats, delta=delta)
    one = accountant_named("rdp").guarantee(run.event(), delta=delta)
    every = accountant_named("rdp").guarantee([run.event()] * round(num_runs), delta=delta)
    facts = {
        "epsilon": best.epsilon,
        "epsilon_of_one_run": one.epsilon,
        "epsilon_of_all_runs": every.epsilon,
        "delta": delta,
        "num_runs": num_runs,
        "distribution": distribution,
        "accountant": best.accountant,
        "is_upper_bound": best.is_upper_bound,
    }
    if as_json:
        from hf_dp.cli.answer import show_json

        show_json(facts)
    else:
        _show(facts)


def _show(facts: dict[str, object]) -> None:
    from rich.table import Table

    from hf_dp.accounting.shown import rounded_up

    table = Table(box=None, pad_edge=False)
    table.add_column("what is released")
    table.add_column("epsilon", justify="right")
    rows = {
        "one run": "epsilon_of_one_run",
        f"the best of about {facts['num_runs']:g} runs ({facts['distribution']})": "epsilon",
        f"all of {facts['num_runs']:.0f} runs": "epsilon_of_all_runs",
    }
    for words, name in rows.items():
        table.add_row(words, rounded_up(float(str(facts[name])), digits=5))
    console = paper()
    console.print(table)
    console.print(
        "Proven upper bounds by accountant 'rdp'. The number of runs must be drawn before the first one and "
        "stay secret; a fixed number of tries does not have the price of the best.",
        soft_wrap=True,
    )
