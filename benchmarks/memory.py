"""How many bytes does a private step need, next to an ordinary one on the same batch?

Counted, not sampled: the largest total of live tensors that the step made, gradients included, the model
and its batch not. Deterministic, so one step of each variant is enough.

    python -m benchmarks.memory                       # all cases, ten minutes
    python -m benchmarks.memory --only "bert d=512"   # a piece: cases whose name contains it

Each case is kept as soon as it is measured; a piece replaces its own cases and leaves the others, if
they were counted with the same versions. Cases that are still missing are listed in the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

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


def kept(path: Path, here: Row) -> dict[str, Row]:
    """Rows of an earlier run, by case, if it was on this kind of machine with these versions."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text("utf-8"))
    same = {**before["machine"], "date": None} == {**here, "date": None}
    return {row["case"]: row for row in before["rows"]} if same else {}


def report(rows: Mapping[str, Row], here: Row) -> Row:
    """What is written: every row in the cases' order, and which cases have none."""
    names = [case.name for case in (*FULL, *LORA)]
    some = [rows[name] for name in names if name in rows]
    missing = [name for name in names if name not in rows]
    return {"machine": here, "summary": summary(some), "missing": missing, "rows": some}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path, here = RESULTS / "memory.json", machine()
    rows = kept(path, here) if options.only else {}
    for number, case in enumerate(c for c in (*FULL, *LORA) if options.only in c.name):
        rows[case.name] = measure(case)
        print(*list(table([rows[case.name]]))[number > 0 :], sep="\n", flush=True)
        text = json.dumps(report(rows, here), indent=1)
        path.write_text(text + "\n", encoding="utf-8")
    print(json.dumps(report(rows, here)["summary"], indent=1))


if __name__ == "__main__":
    main()
