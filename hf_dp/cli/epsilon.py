"""``hf-dp epsilon``: what a run guarantees."""

from __future__ import annotations

from hf_dp.cli.options import (
    AnyAccountantName,
    AsJson,
    Delta,
    NoiseMultiplier,
    NumSteps,
    SamplingProbability,
)


def epsilon(
    *,
    sampling_probability: SamplingProbability,
    noise_multiplier: NoiseMultiplier,
    num_steps: NumSteps,
    delta: Delta,
    accountant: AnyAccountantName = "pld",
    as_json: AsJson = False,
) -> None:
    """Print the epsilon of a run with Poisson sampling and Gaussian noise."""
    from hf_dp.accounting import accountant_or_estimator_named
    from hf_dp.cli.answer import show
    from hf_dp.cli.run import PoissonRun

    run = PoissonRun(sampling_probability, num_steps, noise_multiplier)
    guarantee = accountant_or_estimator_named(accountant).guarantee(
        run.event(), delta=delta, unit=run.unit, relation=run.relation
    )
    show(run, guarantee, as_json=as_json)
