"""How tight and how fast are the accountants, here and elsewhere, and how fast is a calibration?

The grid: sampling probability 0.001, 0.01, 0.05; noise 0.6, 0.8, 1, 2; steps 100, 1,000, 10,000; delta
1e-5 and 1e-6. Each point is costed at its own noise, and calibrated back from its epsilon, where the
rival is a bisection over dp-accounting's PLD, to the same accuracy.

    python -m benchmarks.accountants                      # ten minutes on one core; keeps the result
    python -m benchmarks.accountants --others PYTHON      # an interpreter with prv-accountant
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
from dp_accounting import pld, rdp
from scipy.optimize import brentq

from hf_dp.accounting import accountant_named, accountant_or_estimator_named
from hf_dp.cli.run import PoissonRun

RESULTS = Path(__file__).parent / "results"
ALSO = Path(__file__).parent / "accountants_elsewhere.py"
OURS = ("pld", "edgeworth", "rdp", "gdp")
GRID = list(
    itertools.product((0.001, 0.01, 0.05), (0.6, 0.8, 1.0, 2.0), (100, 1000, 10000), (1e-5, 1e-6))
)
_EVERY_ELSEWHERE = 5  # PRV takes minutes where epsilon is large
Point = tuple[float, float, int, float]
Row = dict[str, Any]


def timed(compute: Callable[[], float | None]) -> tuple[float | None, float]:
    """A result and the seconds that it took."""
    start = time.perf_counter()
    value = compute()
    return value, time.perf_counter() - start


def dp_event(point: Point) -> dp_accounting.DpEvent:
    """The run of a point, for dp-accounting."""
    probability, noise, num_steps, _ = point
    step = dp_accounting.PoissonSampledDpEvent(probability, dp_accounting.GaussianDpEvent(noise))
    return dp_accounting.SelfComposedDpEvent(step, num_steps)


def theirs(point: Point, make: Callable[[], Any]) -> float:
    """Epsilon by an accountant of dp-accounting."""
    accountant = make()
    accountant.compose(dp_event(point))
    return float(accountant.get_epsilon(point[3]))


def ours(point: Point, name: str) -> float | None:
    """Epsilon by one of ours; of those that only estimate, the estimate."""
    probability, noise, num_steps, delta = point
    accountant = accountant_or_estimator_named(name)
    found = accountant.guarantee(PoissonRun(probability, num_steps, noise).event(), delta=delta)
    return found.epsilon if found.is_upper_bound else found.estimate


def costed(point: Point) -> Row:
    """Epsilon and seconds of every accountant at one point."""
    row: Row = dict(
        zip(("sampling_probability", "noise", "num_steps", "delta"), point, strict=True)
    )
    interval = 1e-4 if point[1] > 0.6 or point[2] < 10000 else 1e-3
    row["dp_accounting_interval"] = interval
    ways: dict[str, Callable[[], float | None]] = {
        **{f"hf_dp {name}": functools.partial(ours, point, name) for name in OURS},
        "dp-accounting pld": lambda: theirs(
            point, lambda: pld.PLDAccountant(value_discretization_interval=interval)
        ),
        "dp-accounting rdp": lambda: theirs(point, rdp.RdpAccountant),
    }
    for name, compute in ways.items():
        value, seconds = timed(compute)
        row[name] = {"epsilon": value, "seconds": seconds}
    return row


def calibrated(point: Point, target: float) -> Row:
    """Noise and seconds for a target, by ours and by bisection over dp-accounting's PLD."""
    probability, _, num_steps, delta = point
    row: Row = {"target_epsilon": target}
    for name in ("edgeworth", "pld"):
        start = time.perf_counter()
        run = accountant_named(name).calibrate(
            PoissonRun(probability, num_steps), target_epsilon=target, target_delta=delta
        )
        row[name] = {"noise": run.noise_multiplier, "seconds": time.perf_counter() - start}

    evaluations = 0

    def excess(noise: float) -> float:
        nonlocal evaluations
        evaluations += 1
        # As fine as its users set it: coarser grids cost noise, finer ones time.
        interval = 1e-3 if target > 2 else 2e-4
        return (
            theirs(
                (probability, noise, num_steps, delta),
                lambda: pld.PLDAccountant(value_discretization_interval=interval),
            )
            - target
        )

    start = time.perf_counter()
    noise = brentq(excess, 0.3, 8.0, rtol=1e-4, xtol=1e-4)
    row["bisection over dp-accounting pld"] = {
        "noise": noise,
        "seconds": time.perf_counter() - start,
        "evaluations": evaluations,
    }
    return row


def elsewhere(python: str | None, points: list[Point]) -> Any:
    """What accountants that are installed for another interpreter say."""
    if python is None:
        return "not installed"
    done = subprocess.run(
        [python, str(ALSO)], input=json.dumps(points), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def summary(rows: list[Row], calibrations: list[Row]) -> Row:
    """Medians over the grid: ratio to our certified PLD, seconds, and how calibrations compare."""
    found: Row = {}
    for name in (*(f"hf_dp {one}" for one in OURS), "dp-accounting pld", "dp-accounting rdp"):
        values = [row[name] for row in rows]
        exact = [row["hf_dp pld"]["epsilon"] for row in rows]
        ratios = [
            value["epsilon"] / true
            for value, true in zip(values, exact, strict=True)
            if value["epsilon"] is not None
        ]
        found[name] = {
            "median_ratio_to_pld": statistics.median(ratios),
            "least_ratio": min(ratios),
            "largest_ratio": max(ratios),
            "median_seconds": statistics.median(value["seconds"] for value in values),
        }
    if calibrations:
        rival = "bisection over dp-accounting pld"
        for name in ("edgeworth", "pld", rival):
            seconds = [row[name]["seconds"] for row in calibrations]
            found[f"calibration, {name}"] = {
                "median_seconds": statistics.median(seconds),
                "largest_seconds": max(seconds),
            }
        for name in ("edgeworth", "pld"):
            times = [row[rival]["seconds"] / row[name]["seconds"] for row in calibrations]
            found[f"calibration, {name}"]["median_times_faster"] = statistics.median(times)
            found[f"calibration, {name}"]["total_times_faster"] = sum(
                row[rival]["seconds"] for row in calibrations
            ) / sum(row[name]["seconds"] for row in calibrations)
    return found


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--others", help="interpreter with prv-accountant and opake-accounting")
    parser.add_argument("--every", type=int, default=1, help="use every so many points only")
    arguments = parser.parse_args()
    points = GRID[:: arguments.every]
    rows, calibrations = [], []
    for point in points:
        row = costed(point)
        target = row["hf_dp pld"]["epsilon"]
        calibrations.append({"point": point, **calibrated(point, target)})
        rows.append(row)
        print(point, f"{target:.4f}", flush=True)
    found = {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "summary": summary(rows, calibrations),
        "elsewhere": elsewhere(arguments.others, points[::_EVERY_ELSEWHERE]),
        "rows": rows,
        "calibrations": calibrations,
    }
    print(json.dumps(found["summary"], indent=1))
    (RESULTS / "accountants.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
