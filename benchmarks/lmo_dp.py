"""What do LMO-DP's published labels say, and what does the noise guarantee that they are printed for?

python -m benchmarks.lmo_dp    # some minutes on one core; keeps the result
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_dp.accounting.as_published import lmo_published
from hf_dp.accounting.as_published.report import WORDING, Step, Total
from hf_dp.accounting.as_published.sets import TASKS
from hf_dp.cli.lmo_dp import without_infinities

RESULTS = Path(__file__).parent / "results"


def rows(tasks: Sequence[str]) -> tuple[list[Step], list[Total]]:
    """One-step figures, with the dimension of the first task's model, and every task's totals."""
    steps: list[Step] = []
    totals: list[Total] = []
    for index, task in enumerate(tasks):
        for row in lmo_published(report_as_published=True, task=task, with_steps=index == 0):
            if isinstance(row, Step):
                steps.append(row)
                print(f"one step, {said(row.name, row.as_published_label, row)}", flush=True)
            else:
                totals.append(row)
                print(f"{task}, {said(row.name, row.as_published_total_label, row)}", flush=True)
    return steps, totals


def said(name: str, label: float, row: Step | Total) -> str:
    """One line: the label and what holds."""
    held = (
        f"as {one.reading}: {one.epsilon_one_coordinate:.3g} at d = 1, "
        f"{shown(one.epsilon_all_coordinates)} at all, limit {one.high_dimension_limit:.3g}"
        for one in row.holds
    )
    return f"set {name}: as_published_label {label:.3f}; epsilon " + "; ".join(held)


def shown(bound: float) -> str:
    """A bound, or that there is none."""
    return f"{bound:.3g}" if math.isfinite(bound) else "unbounded"


def main() -> None:
    """Reproduce, account, print, keep."""
    warnings.simplefilter("ignore")  # its words are kept beside the figures
    steps, totals = rows([task.name for task in TASKS])
    facts: dict[str, Any] = {
        "wording": WORDING,
        "tasks": [dataclasses.asdict(task) for task in TASKS],
        "steps": steps,
        "totals": totals,
    }
    text = json.dumps(without_infinities(facts), indent=1, allow_nan=False)
    (RESULTS / "lmo_dp.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
