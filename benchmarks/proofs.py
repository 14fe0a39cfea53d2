"""What does it cost to prove, on every batch, that code of one's own keeps examples apart?

Models and losses from the known libraries are judged by where they come from and by their graph. A loss
of one's own is proved by two backward passes through itself alone, a model with a module of one's own by
another backward pass through all of it. Each is set beside an ordinary step in the same round.

    python -m benchmarks.proofs            # minutes; keeps the result
    python -m benchmarks.proofs --check    # seconds, tiny; keeps nothing
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, example_losses, library_losses
from benchmarks.counting import cost_of
from benchmarks.step_time import RESULTS, TINY, Row, interleaved, machine
from benchmarks.variants import CLIPPING_NORM, Variant, plain
from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine
from hf_dp.engines.base import ExampleLoss

CASES = (
    Case("bert", 512, 128, 8),
    Case("gpt2", 512, 128, 8),
    Case("llama", 512, 128, 8),
    Case("bert", 512, 128, 8, lora_rank=8),
    Case("llama", 512, 256, 8, lora_rank=8),
)


class OwnDropout(nn.Module):
    """Stands for any module from outside the libraries; does nothing."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Hand on what comes, ``(B, T, d)``."""
        return hidden


def with_own_module(model: nn.Module) -> nn.Module:
    """The model with one of its modules that do nothing, dropout or activation, replaced by one's own."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, OwnDropout())
                return model
    model.add_module("own", OwnDropout())
    return model


def private(name: str, case: Case, losses: ExampleLoss, model: nn.Module) -> Variant:
    """A private step of the model with these losses."""
    engine, inputs = BookKeepingEngine(), case.batch()

    def step() -> object:
        return engine.clipped_sum(
            model, inputs, example_loss=losses, clipping=FlatClipping(CLIPPING_NORM)
        )

    return Variant(name, step)


def measure(case: Case, rounds: int) -> list[Row]:
    """Time and FLOPs over those of an ordinary step, where nothing, the loss or the model is proved."""
    library = library_losses(case.batch())
    variants = [
        private("nothing to prove", case, library, case.model()),
        private("a loss of one's own", case, example_losses, case.model()),
        private("a module of one's own", case, library, with_own_module(case.model())),
    ]
    base = plain(case)
    base_times, times = interleaved(base, variants, rounds)
    base_cost = cost_of(base.step)
    return [
        {
            "case": case.name,
            "variant": variant.name,
            "time": statistics.median(t / b for t, b in zip(taken, base_times, strict=True)),
            "flops": cost_of(variant.step).over(base_cost)["flops"],
        }
        for variant, taken in zip(variants, times, strict=True)
    ]


def table(rows: Sequence[Row]) -> str:
    """A line for each row."""
    lines = (f"{r['case']:34} {r['variant']:22} {r['time']:6.2f} {r['flops']:6.3f}" for r in rows)
    return "\n".join((f"{'case':34} {'variant':22} {'time':>6} {'FLOPs':>6}", *lines))


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="tiny cases; keeps nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cases, rounds = (TINY, 2) if asked.check else (CASES, 7)
    rows = [row for case in cases for row in measure(case, rounds)]
    print(table(rows))
    if not asked.check:
        report = json.dumps({"machine": machine(), "rows": rows}, indent=1)
        (RESULTS / "proofs.json").write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
