"""``hf-dp noise``: how much noise a target takes."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_dp.cli.options import (
    AccountantName,
    AsJson,
    Delta,
    Dimension,
    MaxBatchSize,
    MaxExamplesPerUser,
    NoiseName,
    NormName,
    NumExamples,
    NumSteps,
    PrivacyUnitName,
    SamplingName,
    SamplingProbability,
    UserSamplingName,
)


def noise(
    *,
    sampling_probability: SamplingProbability,
    num_steps: NumSteps,
    delta: Delta,
    target_epsilon: Annotated[float, typer.Option(help="The most to spend, > 0.")],
    sampling: SamplingName = "poisson",
    num_examples: NumExamples = None,
    max_batch_size: MaxBatchSize = None,
    privacy_unit: PrivacyUnitName = "example",
    user_sampling: UserSamplingName = None,
    max_examples_per_user: MaxExamplesPerUser = None,
    noise: NoiseName = "gaussian",
    norm: NormName = None,
    dimension: Dimension = None,
    accountant: AccountantName = "pld",
    as_json: AsJson = False,
) -> None:
    """Print the smallest noise multiplier that keeps epsilon within a target."""
    from hf_dp.accounting import accountant_named
    from hf_dp.cli.answer import show
    from hf_dp.cli.noise_kind import noise_kind
    from hf_dp.cli.sampled import run_of
    from hf_dp.cli.users import protecting

    chosen = accountant_named(accountant)
    drawn = run_of(
        sampling,
        sampling_probability,
        num_steps,
        num_examples=num_examples,
        max_batch_size=max_batch_size,
        kind=noise_kind(noise, norm, dimension),
    )
    asked = protecting(
        drawn,
        privacy_unit,
        user_sampling=user_sampling,
        max_examples_per_user=max_examples_per_user,
    )
    run = chosen.calibrate(asked, target_epsilon=target_epsilon, target_delta=delta)
    guarantee = chosen.guarantee(run.event(), delta=delta, unit=run.unit, relation=run.relation)
    show(run, guarantee, as_json=as_json)
