"""How long does a private step take, next to an ordinary one on the same batch?

Every variant of a case runs in turn, round after round, in one process with one thread; each round gives
a ratio to that round's plain step, and the median of the rounds is reported. Time is the process's CPU
time, so that other work on the machine disturbs little. FLOPs, kernels and bytes are counted beside it.

Peers, several times slower, run where a case is 512 wide with 128 positions, unless asked for.

    python -m benchmarks.step_time                       # all cases, about 20 minutes; keeps the result
    python -m benchmarks.step_time --only "bert d=512"   # cases whose name contains it; keeps nothing
    python -m benchmarks.step_time --check               # seconds, tiny; keeps nothing
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.cases import FULL, LORA, Case
from benchmarks.counting import Cost, cost_of
from benchmarks.variants import (
    RIGHT,
    Grads,
    NotAvailable,
    Variant,
    distance,
    fastdp,
    opacus,
    ours,
    plain,
)

RESULTS = Path(__file__).parent / "results"
TINY = (Case("bert", 64, 16, 2), Case("gpt2", 64, 16, 2, tied=True), Case("llama", 64, 16, 2))
Row = dict[str, Any]

PEERS: dict[str, Callable[[Case], Variant]] = {
    "opacus ghost": lambda case: opacus(case, "ghost"),
    "opacus hooks": lambda case: opacus(case, "hooks"),
    "fastDP": fastdp,
}


def machine() -> Row:
    """What the figures were taken on."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def measure(case: Case, *, rounds: int, peers: bool) -> list[Row]:
    """One row for each variant of the case."""
    base = plain(case)
    variants: list[Variant] = [ours(case)]
    rows: list[Row] = []
    for name, make in PEERS.items() if peers else ():
        try:
            variants.append(make(case))
        except NotAvailable as reason:
            rows.append({"case": case.name, "variant": name, "note": str(reason)})
    right = ours(case, "sequential").grads
    expected = right() if right is not None else None
    base_cost = cost_of(base.step)
    base_times, times = interleaved(base, variants, rounds)
    rows.append(
        {
            "case": case.name,
            "variant": "plain",
            "seconds": statistics.median(base_times),
            "gigaflops": base_cost.flops / 1e9,
            "kernels_counted": base_cost.kernels,
            "peak_megabytes": base_cost.peak_bytes / 1e6,
        }
    )
    for variant, taken in zip(variants, times, strict=True):
        rows.append(next_to(base_times, base_cost, case, variant, taken, expected))
    return rows


def next_to(
    base_times: Sequence[float],
    base_cost: Cost,
    case: Case,
    variant: Variant,
    times: Sequence[float],
    expected: Grads | None,
) -> Row:
    """What a variant takes, as ratios to the base of the same rounds, and how far its sum is off.

    Args:
        base_times: CPU seconds of the base, round by round.
        base_cost: What was counted of it.
        case: What both ran.
        variant: The other.
        times: Its CPU seconds in the same rounds.
        expected: The right sum, if there is one to compare with.
    """
    ratios = [t / b for t, b in zip(times, base_times, strict=True)]
    return {
        "case": case.name,
        "variant": variant.name,
        "time": statistics.median(ratios),
        "time_low": min(ratios),
        "time_high": max(ratios),
        **cost_of(variant.step).over(base_cost),
        "error": distance(variant.grads(), expected) if expected and variant.grads else None,
    }


def interleaved(
    base: Variant, variants: Sequence[Variant], rounds: int
) -> tuple[list[float], list[list[float]]]:
    """CPU seconds of the base and of each variant, in turn, round after round."""
    for variant in (base, *variants):
        variant.step()
    base_times, times = [], [[] for _ in variants]  # type: ignore[var-annotated]
    for _ in range(rounds):
        base_times.append(_seconds(base))
        for variant, taken in zip(variants, times, strict=True):
            taken.append(_seconds(variant))
    return base_times, times


def _seconds(variant: Variant) -> float:
    """CPU time of one step; freeing its result belongs to it."""
    start = time.process_time()
    result = variant.step()
    del result
    return time.process_time() - start


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each row; ratios are to the plain step."""
    yield f"{'case':36} {'variant':14} {'time':>6} {'FLOPs':>6} {'kernels':>7} {'memory':>6}  error"
    for row in rows:
        if "time" in row:
            wrong = "  WRONG SUM" if row["error"] > RIGHT else ""
            yield (
                f"{row['case']:36} {row['variant']:14} {row['time']:6.2f} {row['flops']:6.3f} "
                f"{row['kernels']:7.2f} {row['peak_bytes']:6.3f}  {row['error']:.0e}{wrong}"
            )
        elif "note" in row:
            yield f"{row['case']:36} {row['variant']:14} {row['note']}"


def summary(rows: Sequence[Row]) -> Row:
    """Geometric means of ours, full and LoRA, and how much slower peers are where they are right."""
    mine = [row for row in rows if row["variant"] == "book_keeping"]
    found: Row = {}
    for kind, cases in (("full", FULL), ("LoRA", LORA)):
        names = {case.name for case in cases}
        some = [row for row in mine if row["case"] in names]
        for key in ("time", "flops", "kernels", "peak_bytes") if some else ():
            values = [row[key] for row in some]
            found[f"{kind} {key}"] = {"geometric_mean": mean(values), "worst": max(values)}
    by_case = {row["case"]: row["time"] for row in mine}
    for peer in PEERS:
        right = [
            row["time"] / by_case[row["case"]]
            for row in rows
            if row["variant"] == peer and row.get("error", math.inf) <= RIGHT
        ]
        if right:
            found[f"{peer} / ours"] = {
                "geometric_mean": mean(right),
                "least": min(right),
                "cases": len(right),
            }
    return found


def mean(values: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(statistics.fmean(map(math.log, values)))


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", choices=("some", "all", "none"), default="some")
    parser.add_argument("--check", action="store_true", help="tiny cases; keeps nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = TINY if options.check else (*FULL, *LORA)
    rows: list[Row] = []
    for case in (case for case in cases if options.only in case.name):
        some = options.check or (case.width, case.positions) == (512, 128)
        peers = options.peers == "all" or (options.peers == "some" and some)
        new = measure(case, rounds=options.rounds, peers=peers)
        for line in list(table(new))[bool(rows) :]:
            print(line, flush=True)
        rows += new
    report = {"machine": machine(), "rounds": options.rounds, "summary": summary(rows)}
    print(json.dumps(report, indent=1))
    if not (options.check or options.only):
        text = json.dumps({**report, "rows": rows}, indent=1)
        (RESULTS / "step_time.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
