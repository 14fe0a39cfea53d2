"""``hf-dp steps``: how many steps a target affords."""

from __future__ import annotations

import typer

from hf_dp.cli.options import (
    AccountantName,
    AsJson,
    Delta,
    NoiseMultiplier,
    SamplingProbability,
    TargetEpsilon,
)


def steps(
    *,
    sampling_probability: SamplingProbability,
    noise_multiplier: NoiseMultiplier,
    delta: Delta,
    target_epsilon: TargetEpsilon,
    accountant: AccountantName = "pld",
    as_json: AsJson = False,
) -> None:
    """Print how many steps keep epsilon within a target, within 0.1%."""
    from hf_dp.accounting import accountant_named
    from hf_dp.accounting.affordable import MOST_STEPS, most_steps
    from hf_dp.cli.answer import show
    from hf_dp.cli.run import PoissonRun
    from hf_dp.events import Gaussian, PoissonSampled

    chosen = accountant_named(accountant)
    step = PoissonSampled(sampling_probability, Gaussian(noise_multiplier))
    count = most_steps(
        chosen,
        step,
        target_epsilon=target_epsilon,
        target_delta=delta,
        relation=PoissonRun.relation,
    )
    run = PoissonRun(sampling_probability, count, noise_multiplier)
    guarantee = chosen.guarantee(run.event(), delta=delta, unit=run.unit, relation=run.relation)
    show(run, guarantee, as_json=as_json)
    if count == MOST_STEPS and not as_json:
        typer.echo("The search ends at so many steps: the target allows more.")
