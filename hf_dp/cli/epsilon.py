"""``hf-dp epsilon``: what a run guarantees."""

from __future__ import annotations

from hf_dp.cli.options import (
    AnyAccountantName,
    AsJson,
    Delta,
    Dimension,
    MaxBatchSize,
    MaxExamplesPerUser,
    NoiseMultiplier,
    NoiseName,
    NormName,
    NumExamples,
    NumSteps,
    PrivacyUnitName,
    SamplingName,
    SamplingProbability,
    UserSamplingName,
)


def epsilon(
    *,
    sampling_probability: SamplingProbability,
    noise_multiplier: NoiseMultiplier,
    num_steps: NumSteps,
    delta: Delta,
    sampling: SamplingName = "poisson",
    num_examples: NumExamples = None,
    max_batch_size: MaxBatchSize = None,
    privacy_unit: PrivacyUnitName = "example",
    user_sampling: UserSamplingName = None,
    max_examples_per_user: MaxExamplesPerUser = None,
    noise: NoiseName = "gaussian",
    norm: NormName = None,
    dimension: Dimension = None,
    accountant: AnyAccountantName = "pld",
    as_json: AsJson = False,
) -> None:
    """Print the epsilon of a run with Gaussian or Laplace noise."""
    from hf_dp.accounting import accountant_or_estimator_named
    from hf_dp.cli.answer import show
    from hf_dp.cli.noise_kind import noise_kind
    from hf_dp.cli.sampled import run_of
    from hf_dp.cli.users import protecting

    drawn = run_of(
        sampling,
        sampling_probability,
        num_steps,
        num_examples=num_examples,
        max_batch_size=max_batch_size,
        noise_multiplier=noise_multiplier,
        kind=noise_kind(noise, norm, dimension),
    )
    run = protecting(
        drawn,
        privacy_unit,
        user_sampling=user_sampling,
        max_examples_per_user=max_examples_per_user,
    )
    guarantee = accountant_or_estimator_named(accountant).guarantee(
        run.event(), delta=delta, unit=run.unit, relation=run.relation
    )
    show(run, guarantee, as_json=as_json)
