"""From what was released to a guarantee.

One epsilon, the noise for a target, and epsilon after every step::

    from hf_dp.accounting import accountant_named
    from hf_dp.events import Gaussian, PoissonSampled, SelfComposed

    step = PoissonSampled(0.01, Gaussian(1.0))
    accountant = accountant_named("pld")
    accountant.guarantee(SelfComposed(step, 1000), delta=1e-6).epsilon
    accountant.curve(step, num_steps=1000, delta=1e-6).epsilon(500)
    accountant.calibrate(plan, target_epsilon=3.0, target_delta=1e-6)   # a PrivacyPlan
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from hf_dp._validate import one_of, open_unit_interval, positive_integer
from hf_dp.accounting.base import Accountant, Calibratable, Guarantee, flatten
from hf_dp.accounting.curve import EpsilonCurve
from hf_dp.accounting.edgeworth import EdgeworthAccountant
from hf_dp.accounting.gdp import GDPAccountant
from hf_dp.accounting.pld import PLDAccountant
from hf_dp.accounting.rdp import RDPAccountant
from hf_dp.accounting.user_planner import UserPlan, UserRow, plan_users
from hf_dp.errors import ConfigurationError, explain

ACCOUNTANTS: Mapping[str, Callable[[], Accountant]] = MappingProxyType(
    {"pld": PLDAccountant, "edgeworth": EdgeworthAccountant, "rdp": RDPAccountant}
)
"""Every accountant that proves upper bounds, by the name that people write."""

ESTIMATORS: Mapping[str, Callable[[], Accountant]] = MappingProxyType({"gdp": GDPAccountant})
"""Those that only estimate: to look at, never to choose noise or to state a guarantee."""


def accountant_named(name: str) -> Accountant:
    """The accountant called `name`; an unknown name is answered with the nearest known one.

    Raises:
        ConfigurationError: There is none of that name, or it only estimates.
    """
    if name in ESTIMATORS:
        ESTIMATORS[name]().check_bounds()
    return ACCOUNTANTS[one_of("accountant", name, ACCOUNTANTS, "It computes the guarantee.")]()


def accountant_or_estimator_named(name: str) -> Accountant:
    """As `accountant_named`, but also those that only estimate; their `epsilon` is inf."""
    return ESTIMATORS[name]() if name in ESTIMATORS else accountant_named(name)


def default_delta(num_units: int) -> float:
    """``num_units ** -1.1``: below 1 / num_units by a factor that grows with the data.

    Source:
        Charles et al. (2024), arXiv 2407.07737.
    """
    positive_integer("default_delta.num_units", num_units, _WHY_UNITS, _REMEDY_UNITS)
    if num_units == 1:
        raise ConfigurationError(
            explain("default_delta.num_units", num_units, "at least 2", _WHY_UNITS, _REMEDY_UNITS)
        )
    return float(num_units**-1.1)


def check_delta(delta: float, num_units: int) -> float:
    """Refuse a delta that would allow releasing some unit's data in full.

    Args:
        delta: In (0, 1 / num_units).
        num_units: Examples, or users, that are protected.

    Returns:
        `delta`.
    """
    positive_integer("check_delta.num_units", num_units, _WHY_UNITS, _REMEDY_UNITS)
    open_unit_interval("target_delta", delta, _WHY_DELTA, _REMEDY_DELTA)
    if delta * num_units >= 1:
        expected = f"less than 1 / the number of units = {1 / num_units:.3g}"
        raise ConfigurationError(
            explain("target_delta", delta, expected, _WHY_DELTA, _REMEDY_DELTA)
        )
    return float(delta)


_WHY_UNITS = "Delta must be small against one unit's share of the data."
_REMEDY_UNITS = "Use the number of examples, or of users."
_WHY_DELTA = "At 1 / n, publishing one unit's data in full would count as private."
_REMEDY_DELTA = "Leave it out to get the number of units to the power -1.1."

__all__ = [
    "ACCOUNTANTS",
    "ESTIMATORS",
    "Accountant",
    "Calibratable",
    "EdgeworthAccountant",
    "EpsilonCurve",
    "GDPAccountant",
    "Guarantee",
    "PLDAccountant",
    "RDPAccountant",
    "UserPlan",
    "UserRow",
    "accountant_named",
    "accountant_or_estimator_named",
    "check_delta",
    "default_delta",
    "flatten",
    "plan_users",
]
