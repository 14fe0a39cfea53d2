"""Epsilons by packages that need an environment of their own; started by `benchmarks.accountants`.

Reads points as JSON from standard input, writes epsilon (upper end) and seconds by package.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any


def prv(probability: float, noise: float, num_steps: int, delta: float) -> float:
    """The upper end of the PRV accountant, eps_error 0.01."""
    package: Any = importlib.import_module("prv_accountant")
    mechanism = package.PoissonSubsampledGaussianMechanism(
        sampling_probability=probability, noise_multiplier=noise
    )
    accountant = package.PRVAccountant(
        prvs=[mechanism],
        max_self_compositions=[num_steps],
        eps_error=0.01,
        delta_error=delta / 1000,
    )
    return float(accountant.compute_epsilon(delta=delta, num_self_compositions=[num_steps])[2])


def _rows(package: str, compute: Callable[..., float] | None, points: list[list[Any]]) -> Any:
    """What a package says of every point, or why it says nothing."""
    try:
        importlib.import_module(package)
    except ImportError:
        return "not installed"
    except Exception as error:  # a package's own failure is a result here
        return f"installed, but cannot be imported: {error!r}"
    if compute is None:
        return "installed, but not compared"
    rows: list[dict[str, Any]] = []
    for point in points:
        start = time.perf_counter()
        try:
            epsilon = compute(*point)
        except Exception as error:
            rows.append({"epsilon": None, "error": str(error)[:200]})
            continue
        rows.append({"epsilon": epsilon, "seconds": time.perf_counter() - start})
    return rows


def main() -> None:
    """Cost every point with every package that is installed."""
    points = json.load(sys.stdin)
    found: dict[str, Any] = {}
    ways: dict[str, Callable[..., float] | None] = {"prv_accountant": prv, "opake.accounting": None}
    for package, compute in ways.items():
        found[package] = _rows(package, compute, points)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
