"""What do hooks, Python and the additional kernels cost where the arithmetic is next to nothing?

A deep and very narrow model: its step is almost only overhead. The difference to plain training is an
upper bound on what a step of any model of that depth pays besides arithmetic and memory traffic.

What an eager engine in Python cannot avoid is measured beside it: an ordinary step without weight
gradients, once as it is and once with taps that do nothing behind every layer. What their gradients,
norms and sums cost comes on top.

    python -m benchmarks.overhead    # a minute; keeps the result
"""

from __future__ import annotations

import json
import statistics

import torch

from benchmarks.cases import Case, example_losses
from benchmarks.counting import cost_of
from benchmarks.step_time import RESULTS, Row, interleaved, machine
from benchmarks.variants import CLIPPING_NORM, Variant, ours, plain
from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine
from hf_dp.engines.attach import recording

CASES = (
    Case("bert", 64, 16, 2, layers=12),
    Case("gpt2", 64, 16, 2, layers=12),
    Case("llama", 64, 16, 2, layers=12),
    Case("bert", 64, 16, 2, layers=12, lora_rank=8),
)


def idle(case: Case) -> tuple[Variant, Variant, int]:
    """A step without weight gradients, the same under taps that do nothing, and how many there are."""
    model, inputs, engine = case.model(), case.batch(), BookKeepingEngine()
    clipping = FlatClipping(CLIPPING_NORM)
    engine.clipped_sum(model, inputs, example_loss=example_losses, clipping=clipping)
    coverage = engine.recorder.coverage(model)
    frozen = case.model().requires_grad_(False)
    first = frozen.get_input_embeddings()  # type: ignore[operator]
    first.weight.requires_grad_()  # so that gradients go all the way back

    def untapped() -> object:
        return torch.autograd.grad(example_losses(frozen, inputs).sum(), first.weight)

    def tapped() -> object:
        with recording(coverage, case.examples) as record:
            record.backward(example_losses(model, inputs), lambda call: None)
        return record

    return Variant("untapped", untapped), Variant("tapped", tapped), len(coverage.points)


def measure(case: Case, rounds: int = 15) -> Row:
    """Milliseconds of a step, plain and ours, of taps that do nothing, and the kernels of both."""
    base, private = plain(case), ours(case)
    untapped, tapped, taps = idle(case)
    base_times, (times, without, with_taps) = interleaved(base, [private, untapped, tapped], rounds)
    idling = [mine - theirs for mine, theirs in zip(with_taps, without, strict=True)]
    difference = [mine - theirs for mine, theirs in zip(times, base_times, strict=True)]
    before, after = cost_of(base.step), cost_of(private.step)
    return {
        "case": f"{case.name}, {case.layers} layers",
        "plain_milliseconds": 1e3 * statistics.median(base_times),
        "overhead_milliseconds": 1e3 * statistics.median(difference),
        "taps": taps,
        "milliseconds_of_taps_that_do_nothing": 1e3 * statistics.median(idling),
        "plain_kernels": before.kernels,
        "kernels": after.kernels,
    }


def main() -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    rows = [measure(case) for case in CASES]
    text = json.dumps({"machine": machine(), "rows": rows}, indent=1)
    print(text)
    (RESULTS / "overhead.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
