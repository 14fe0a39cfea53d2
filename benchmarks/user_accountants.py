"""How tight and how fast is the accountant of users with several examples, here and in dp-accounting?

    python -m benchmarks.user_accountants      # ten seconds on one core; keeps the result

dp-accounting's grid has intervals of 1e-3; ours chooses its own.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dp_accounting.pld.privacy_loss_distribution import from_mixture_gaussian_mechanism

from hf_dp.accounting import accountant_named
from hf_dp.accounting.dp_events import as_dp_event
from hf_dp.events import Gaussian, PoissonSampledContributions, PrivacyEvent, SelfComposed

RESULTS = Path(__file__).parent / "results"
DELTA = 1e-6
Point = tuple[float, int, float, int]
POINTS: list[Point] = [
    (0.0064, 2, 1.0, 782),
    (0.01, 4, 1.7233, 1000),
    (0.01, 8, 3.1657, 1000),
    (0.001, 16, 0.9679, 1000),
    (0.001, 8, 1.1857, 10_000),
]


def timed(compute: Callable[[], float]) -> tuple[float, float]:
    """A result and the seconds that it took."""
    start = time.perf_counter()
    value = compute()
    return value, time.perf_counter() - start


def step(point: Point) -> PrivacyEvent:
    """One step of a point."""
    probability, most, noise, _ = point
    return PoissonSampledContributions(probability, most, Gaussian(noise))


def ours(point: Point) -> float:
    """Epsilon by the accountant 'pld'."""
    event = SelfComposed(step(point), point[3])
    return accountant_named("pld").guarantee(event, delta=DELTA, unit="user").epsilon


def theirs(point: Point, interval: float = 1e-3) -> float:
    """Epsilon by dp-accounting's mixture of Gaussians."""
    mixture: Any = as_dp_event(step(point)).events[0].event
    loss = from_mixture_gaussian_mechanism(
        mixture.standard_deviation,
        mixture.sensitivities,
        mixture.sampling_probs,
        value_discretization_interval=interval,
    )
    return float(loss.self_compose(point[3]).get_epsilon_for_delta(DELTA))


def rows(points: list[Point]) -> list[dict[str, Any]]:
    """Both answers at every point."""
    accountant_named("pld").guarantee(Gaussian(1.0), delta=DELTA)  # what is imported on first use
    found = []
    for point in points:
        our_epsilon, our_seconds = timed(lambda point=point: ours(point))  # type: ignore[misc]
        epsilon, seconds = timed(lambda point=point: theirs(point))  # type: ignore[misc]
        found.append(
            {
                "sampling_probability": point[0],
                "max_contributions": point[1],
                "noise_multiplier": point[2],
                "num_steps": point[3],
                "hf_dp_epsilon": our_epsilon,
                "hf_dp_seconds": our_seconds,
                "dp_accounting_epsilon": epsilon,
                "dp_accounting_seconds": seconds,
            }
        )
    return found


def main() -> None:
    """Measure, print and keep the result."""
    result = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "delta": DELTA,
        "rows": rows(POINTS),
    }
    text = json.dumps(result, indent=1)
    (RESULTS / "user_accountants.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
