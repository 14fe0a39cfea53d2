"""How many bytes does a private step need, next to an ordinary one on the same batch?

Counted, not sampled: the largest total of live tensors that the step made, gradients included, the model
and its batch not. Deterministic, so one step of each variant is enough.

    python -m benchmarks.memory                       # all cases, a few minutes; keeps the result
    python -m benchmarks.memory --only "bert d=512"   # cases whose name contains it; keeps nothing
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.cases import FULL, LORA, Case
from benchmarks.counting import peak_of
from benchmarks.step_time import PEERS, RESULTS, Row, machine, mean
from benchmarks.variants import NotAvailable, Variant, ours, plain

VARIANTS: dict[str, Callable[[Case], Variant]] = {
    "book_keeping": ours,
    "two_pass": lambda case: ours(case, "two_pass"),
    **PEERS,
}


def measure(case: Case) -> Row:
    """Peak bytes of plain training, and each variant's as a multiple of it."""
    base = peak_of(plain(case).step)
    row: Row = {"case": case.name, "plain_megabytes": base / 1e6}
    for name, make in VARIANTS.items():
        try:
            row[name] = peak_of(make(case).step) / base
        except NotAvailable as reason:
            row[name] = str(reason)
    return row


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each case."""
    yield f"{'case':40} {'plain MB':>9}" + "".join(f" {name:>13}" for name in VARIANTS)
    for row in rows:
        cells = (row[name] for name in VARIANTS)
        shown = (cell if isinstance(cell, str) else f"{cell:.3f}" for cell in cells)
        yield f"{row['case']:40} {row['plain_megabytes']:9.1f}" + "".join(
            f" {cell[:13]:>13}" for cell in shown
        )


def summary(rows: Sequence[Row]) -> Row:
    """Geometric mean and worst of each variant, full and LoRA apart."""
    found: Row = {}
    for kind, cases in (("full", FULL), ("LoRA", LORA)):
        names = {case.name for case in cases}
        for variant in VARIANTS:
            some = [row[variant] for row in rows if row["case"] in names]
            ratios = [value for value in some if isinstance(value, float)]
            if ratios:
                found[f"{kind} {variant}"] = {
                    "geometric_mean": mean(ratios),
                    "worst": max(ratios),
                    "cases": len(ratios),
                }
    return found


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for case in (case for case in (*FULL, *LORA) if options.only in case.name):
        rows.append(measure(case))
        print(*list(table(rows[-1:]))[len(rows) > 1 :], sep="\n", flush=True)
    report = {"machine": machine(), "summary": summary(rows)}
    print(json.dumps(report, indent=1))
    if not options.only:
        text = json.dumps({**report, "rows": rows}, indent=1)
        (RESULTS / "memory.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
