"""The price of trying several settings and releasing only the best run.

If the number of runs is drawn at random before the first one, and nothing but the best run leaves, the
whole search costs little more than two runs. Reporting every run, or the best of a fixed number, does
not have this price.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from hf_dp._validate import one_of, positive
from hf_dp.accounting.base import flatten, gaussian_parameters, is_gaussian
from hf_dp.accounting.guarantee import Guarantee
from hf_dp.accounting.rdp import ORDERS, RDPAccountant, without_convergence_warnings
from hf_dp.errors import ConfigurationError, UnsupportedEventError, explain
from hf_dp.events import NeighboringRelation, PrivacyEvent, PrivacyUnit

Distribution = Literal["poisson", "geometric", "logarithmic"]
"""How the number of runs is drawn; logarithmic is cheapest where many runs are expected."""

SHAPES: dict[str, float] = {"poisson": math.inf, "geometric": 1.0, "logarithmic": 0.0}


@dataclass(frozen=True)
class RandomRepeats:
    """How many runs are made: a random number that is drawn before the first one and kept secret.

    Attributes:
        mean: Runs expected, > 1; at least 1 for the Poisson distribution.
        distribution: 'poisson', 'geometric' or 'logarithmic'.
    """

    mean: float
    distribution: Distribution = "logarithmic"

    def __post_init__(self) -> None:
        """Refuse a distribution that does not exist."""
        why = "It decides what the search costs."
        one_of("RandomRepeats.distribution", self.distribution, SHAPES, why)
        remedy = "Use the number of settings you want to try, for example 10."
        positive("RandomRepeats.mean", self.mean, why, remedy)
        if self.mean < 1 or (self.mean == 1 and self.distribution != "poisson"):
            expected = "at least 1" if self.distribution == "poisson" else "more than 1"
            raise ConfigurationError(
                explain("RandomRepeats.mean", self.mean, expected, why, remedy)
            )


def guarantee_of_best(
    run: PrivacyEvent | Iterable[PrivacyEvent],
    repeats: RandomRepeats,
    *,
    delta: float,
    unit: PrivacyUnit = "example",
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> Guarantee:
    """What releasing only the best of a random number of runs guarantees.

    Runs may differ in learning rate and the like, but each must have the guarantee of `run`; the score
    by which the best is chosen must come from the run's released model, or be private itself.

    Args:
        run: What one run releases.
        repeats: How the number of runs is drawn.
        delta: In (0, 1).
        unit: Repeated in the answer.
        relation: Which datasets count as neighbours.

    Raises:
        UnsupportedEventError: A release of the run has no Renyi divergence here, or no Gaussian noise.

    Guarantees:
        * An upper bound (test: test_the_price_of_selection_has_its_reference_values).

    Source:
        Papernot and Steinke (2022), "Hyperparameter Tuning with Renyi Differential Privacy",
        arXiv 2110.03620, theorems 2 and 6, as computed by dp-accounting.
    """
    releases = (run,) if isinstance(run, PrivacyEvent) else tuple(run)
    single = RDPAccountant().guarantee(releases, delta=delta, unit=unit, relation=relation)
    epsilon = single.epsilon
    # A run with epsilon 0 at this delta is no exception: the best of many fails more often than one.
    if flatten(releases) and epsilon < math.inf:
        epsilon = max(epsilon, _epsilon_of_best(releases, repeats, delta))
    return replace(single, epsilon=epsilon)


def _epsilon_of_best(run: Iterable[PrivacyEvent], repeats: RandomRepeats, delta: float) -> float:
    import dp_accounting
    from dp_accounting.dp_event import RepeatAndSelectDpEvent
    from dp_accounting.rdp import RdpAccountant

    parts = []
    for leaf, count in flatten(run).items():
        if not is_gaussian(leaf):
            raise UnsupportedEventError(
                explain(
                    "guarantee_of_best.run",
                    leaf,
                    "releases with Gaussian noise",
                    "The price of selection is computed from their divergences.",
                    "Use Gaussian noise for a search, or release every run.",
                )
            )
        sampling_probability, noise_multiplier = gaussian_parameters(leaf)
        release = dp_accounting.GaussianDpEvent(noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(sampling_probability, release)
        parts.append(dp_accounting.SelfComposedDpEvent(sampled, count))
    accountant = RdpAccountant(ORDERS)
    with without_convergence_warnings():
        accountant.compose(
            RepeatAndSelectDpEvent(
                dp_accounting.ComposedDpEvent(parts), repeats.mean, SHAPES[repeats.distribution]
            )
        )
    epsilon = float(accountant.get_epsilon(delta))
    return math.inf if math.isnan(epsilon) else epsilon
