"""What does the accountant of users with several examples save over converting a guarantee for one example?

Examples are drawn by Poisson sampling, and a user owns several. The conversion is the textbook's for
groups, of the tightest guarantee for one example that the accountant 'pld' gives; the mixture is that of how
many of a user's examples are in the draw, by the same accountant.

    python -m benchmarks.user_groups      # about 8 minutes on one core; keeps the result
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from hf_dp.accounting import accountant_named
from hf_dp.accounting.group import group_guarantee
from hf_dp.events import Gaussian, PoissonSampled, PoissonSampledContributions, SelfComposed

RESULTS = Path(__file__).parent / "results"
DELTA, NUM_STEPS = 1e-6, 1000
OWNED = (4, 8, 16, 32)
PROBABILITIES = (0.01, 0.001)
EPSILONS = (1.0, 2.0, 4.0, 8.0)
ACCURACY = 1e-4
"""Of noise multipliers, relative."""
Row = dict[str, Any]


def by_mixture(probability: float, owned: int, noise: float) -> float:
    """Epsilon of a user by the event that counts how many of their examples are drawn."""
    step = PoissonSampledContributions(probability, owned, Gaussian(noise))
    event = SelfComposed(step, NUM_STEPS)
    return accountant_named("pld").guarantee(event, delta=DELTA, unit="user").epsilon


def by_conversion(probability: float, owned: int, noise: float) -> float:
    """Epsilon of a user by what single examples are guaranteed; inf where none is found."""
    event = SelfComposed(PoissonSampled(probability, Gaussian(noise)), NUM_STEPS)
    pld = accountant_named("pld")
    return group_guarantee(pld, event, group_size=owned, delta=DELTA).epsilon


def least_noise(epsilon_of: Callable[[float], float], target: float, start: float) -> float:
    """The smallest noise multiplier, to `ACCURACY`, with at most `target`; searched from `start`."""
    low = high = start
    while epsilon_of(high) > target:
        low, high = high, 1.2 * high
    while low == high or epsilon_of(low) <= target:
        low, high = low / 1.2, low
    while high > low * (1 + ACCURACY):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if epsilon_of(middle) <= target else (middle, high)
    return high


def at_equal_noise(owned: Iterable[int], probability: float, noise: float) -> list[Row]:
    """Epsilon by both; none where the conversion finds none."""
    found = []
    for most in owned:
        converted = by_conversion(probability, most, noise)
        found.append(
            {
                "max_contributions": most,
                "sampling_probability": probability,
                "noise_multiplier": noise,
                "mixture_epsilon": by_mixture(probability, most, noise),
                "conversion_epsilon": None if math.isinf(converted) else converted,
            }
        )
    return found


def at_equal_epsilon(most: int, probability: float, target: float) -> Row:
    """The noise multiplier that each needs, and how much more the conversion needs."""
    ours = least_noise(partial(by_mixture, probability, most), target, 1.0)
    theirs = least_noise(partial(by_conversion, probability, most), target, ours)
    return {
        "max_contributions": most,
        "sampling_probability": probability,
        "target_epsilon": target,
        "mixture_noise": ours,
        "conversion_noise": theirs,
        "more_noise": theirs / ours - 1,
    }


def main() -> None:
    """Compute, print and keep the result."""
    rows = []
    for point in product(OWNED, PROBABILITIES, EPSILONS):
        rows.append(at_equal_epsilon(*point))
        print(rows[-1], flush=True)
    more = [row["more_noise"] for row in rows]
    result = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "delta": DELTA,
        "num_steps": NUM_STEPS,
        "more_noise": {"least": min(more), "most": max(more)},
        "at_equal_noise": at_equal_noise(OWNED, 0.01, 1.0),
        "at_equal_epsilon": rows,
    }
    text = json.dumps(result, indent=1)
    (RESULTS / "user_groups.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
