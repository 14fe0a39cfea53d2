"""Runs of DPTrainer with each sampler, shared by the tests of sampling in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_runs import NUM_EXAMPLES
from torch import Tensor
from transformers import TrainerCallback

from hf_dp import DPTrainer
from hf_dp.accounting import flatten
from hf_dp.events import (
    BallsInBins,
    Gaussian,
    PoissonSampled,
    PrivacyEvent,
    SampledWithoutReplacement,
    Shuffled,
    TruncatedPoissonSampled,
)
from hf_dp.ledger import LEDGER_NAME, read_ledger

NOISE = 4.0
PASS = 5  # steps: 40 examples in batches of 8
EVENTS: dict[str, PrivacyEvent] = {
    "poisson": PoissonSampled(0.2, Gaussian(NOISE)),
    "truncated_poisson": TruncatedPoissonSampled(NUM_EXAMPLES, 0.2, 37, Gaussian(NOISE)),
    "balls_in_bins": BallsInBins(PASS, Gaussian(NOISE)),
    "shuffled": Shuffled(PASS, Gaussian(NOISE)),
    "fixed_size": SampledWithoutReplacement(NUM_EXAMPLES, 8, Gaussian(NOISE)),
}
SAVING = {"save_strategy": "steps", "save_steps": 2}
PASSES = ["balls_in_bins", "shuffled"]


class Watched(DPTrainer):
    """Remembers which examples each step was made of."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        rows = [
            tuple(row[mask.bool()].tolist())
            for batch in inputs.micro_batches
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        self.seen = [*getattr(self, "seen", []), rows]
        return super().training_step(model, inputs, num_items_in_batch)


class Crash(TrainerCallback):
    """Stands for a machine that fails right after a step, before the next save."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def dp(sampling: str, **options: Any) -> dict[str, Any]:
    return {"sampling": sampling, "noise_multiplier": NOISE, **options}


def written(folder: Path) -> dict[PrivacyEvent, int]:
    return flatten(read_ledger(folder / LEDGER_NAME).event())
