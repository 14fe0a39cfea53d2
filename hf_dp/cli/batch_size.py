"""``hf-dp batch-size``: how large a batch a target affords."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_dp.cli.options import (
    AccountantName,
    AsJson,
    Delta,
    NoiseMultiplier,
    NumSteps,
    TargetEpsilon,
)


def batch_size(
    *,
    num_examples: Annotated[int, typer.Option(help="Examples in the training data, > 0.")],
    noise_multiplier: NoiseMultiplier,
    num_steps: NumSteps,
    delta: Delta,
    target_epsilon: TargetEpsilon,
    accountant: AccountantName = "pld",
    as_json: AsJson = False,
) -> None:
    """Print the expected batch size / number of examples that keeps epsilon within a target."""
    from hf_dp.accounting import accountant_named
    from hf_dp.accounting.affordable import largest_batch
    from hf_dp.cli.answer import show
    from hf_dp.cli.run import PoissonRun
    from hf_dp.events import PrivacyEvent

    def event(batch: float) -> PrivacyEvent:
        return PoissonRun(batch / num_examples, num_steps, noise_multiplier).event()

    chosen = accountant_named(accountant)
    batch = largest_batch(
        chosen,
        event,
        num_examples=num_examples,
        target_epsilon=target_epsilon,
        target_delta=delta,
        relation=PoissonRun.relation,
    )
    run = PoissonRun(batch / num_examples, num_steps, noise_multiplier)
    guarantee = chosen.guarantee(run.event(), delta=delta, unit=run.unit, relation=run.relation)
    show(run, guarantee, as_json=as_json, expected_batch_size=batch)
