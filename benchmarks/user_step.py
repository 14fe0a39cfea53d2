"""How long does a step with per-user clipping take, next to per-example clipping of the same tokens?

Every variant of a case runs in turn, round after round, in one process with one thread; each round gives a
ratio to that round's per-example step, and the median of the rounds is reported. Time is the process's CPU
time. FLOPs, kernels and bytes are counted beside it.

    python -m benchmarks.user_step            # about 6 minutes; keeps the result
    python -m benchmarks.user_step --check    # seconds, tiny; keeps nothing
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.counting import cost_of
from benchmarks.step_time import RESULTS, interleaved, machine, next_to
from benchmarks.variants import Grads, ours, plain
from hf_dp.engines import BookKeepingEngine, SequentialEngine
from hf_dp.engines.owners import Owners

# 1024 tokens and more a step, as in benchmarks/step_time.py; rows of one user stand together
CASES = (
    Case("bert", 512, 64, 16),
    Case("bert", 768, 128, 16),
    Case("gpt2", 512, 64, 16),
    Case("gpt2", 512, 128, 16, tied=True),
    Case("llama", 512, 128, 16),
    Case("bert", 512, 128, 16, lora_rank=8),
    Case("gpt2", 768, 128, 16, tied=True, lora_rank=8),
)
GROUPS = (2, 4, 8)
RAGGED = (1, 7, 3, 5)
"""Rows of each user, 16 in all, where users own different numbers."""
TINY = (Case("gpt2", 64, 16, 16, tied=True),)
Row = dict[str, Any]


def crowds(case: Case) -> dict[str, tuple[int, ...]]:
    """Name -> rows of each user."""
    even = {f"{group} rows a user": (group,) * (case.examples // group) for group in GROUPS}
    return {**even, "1 to 7 rows a user": RAGGED}


def measure(case: Case, rounds: int) -> list[Row]:
    """One row for each way of clipping the case's rows; ratios are to per-example clipping."""
    base = ours(case)
    variants = [plain(case)]
    expected: dict[str, Grads] = {}
    for name, sizes in crowds(case).items():
        owners = Owners(sizes)
        variants.append(ours(case, BookKeepingEngine(), name=name, owners=owners))
        loop = ours(case, SequentialEngine(rows_at_once=max(sizes)), owners=owners)
        expected[name] = loop.step()  # type: ignore[assignment]
    eight, name = Owners((8,) * (case.examples // 8)), "sequential, 8 rows a user"
    variants.append(ours(case, SequentialEngine(8), name=name, owners=eight))
    base_cost = cost_of(base.step)
    base_times, times = interleaved(base, variants, rounds)
    return [
        next_to(base_times, base_cost, case, variant, taken, expected.get(variant.name))
        for variant, taken in zip(variants, times, strict=True)
    ]


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each row."""
    yield f"{'case':38} {'variant':26} {'time':>6} {'FLOPs':>6} {'memory':>6}  error"
    for row in rows:
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        yield (
            f"{row['case']:38} {row['variant']:26} {row['time']:6.2f} {row['flops']:6.3f} "
            f"{row['peak_bytes']:6.3f}  {error}"
        )


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="a tiny case; keeps nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for case in TINY if options.check else CASES:
        new = measure(case, options.rounds)
        for line in list(table(new))[bool(rows) :]:
            print(line, flush=True)
        rows += new
    if not options.check:
        text = json.dumps({"machine": machine(), "rounds": options.rounds, "rows": rows}, indent=1)
        (RESULTS / "user_step.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
