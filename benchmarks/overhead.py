"""What do hooks, Python and the additional kernels cost where the arithmetic is next to nothing?

A deep and very narrow model: its step is almost only overhead. The difference to plain training is an
upper bound on what a step of any model of that depth pays besides arithmetic and memory traffic.

    python -m benchmarks.overhead    # seconds; keeps the result
"""

from __future__ import annotations

import json
import statistics

import torch

from benchmarks.cases import Case
from benchmarks.counting import cost_of
from benchmarks.step_time import RESULTS, Row, interleaved, machine
from benchmarks.variants import ours, plain

CASES = (
    Case("bert", 64, 16, 2, layers=12),
    Case("gpt2", 64, 16, 2, layers=12),
    Case("llama", 64, 16, 2, layers=12),
    Case("bert", 64, 16, 2, layers=12, lora_rank=8),
)


def measure(case: Case, rounds: int = 15) -> Row:
    """Milliseconds of a step, plain and ours, and the kernels of both."""
    base, private = plain(case), ours(case)
    base_times, (times,) = interleaved(base, [private], rounds)
    difference = [mine - theirs for mine, theirs in zip(times, base_times, strict=True)]
    before, after = cost_of(base.step), cost_of(private.step)
    return {
        "case": f"{case.name}, {case.layers} layers",
        "plain_milliseconds": 1e3 * statistics.median(base_times),
        "overhead_milliseconds": 1e3 * statistics.median(difference),
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
