"""Releases that are not compositions: how often each was made, and which claims it can carry."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeGuard

from hf_dp.events import (
    BallsInBins,
    Composed,
    Continued,
    Gaussian,
    Laplace,
    NeighboringRelation,
    NonPrivate,
    PoissonSampled,
    PoissonSampledContributions,
    PrivacyEvent,
    SampledWithoutReplacement,
    ScaleMixtureLaplace,
    SelfComposed,
    Shuffled,
    TruncatedPoissonSampled,
)

Leaves = Mapping[PrivacyEvent, int]
"""Releases that are not compositions, each with how often it was made."""

_LAPLACE = (Laplace, ScaleMixtureLaplace)
_PRESENT_OR_NOT = frozenset(
    {NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_SPECIAL}
)
_RELATIONS: Mapping[type[PrivacyEvent], frozenset[NeighboringRelation]] = {
    NonPrivate: frozenset(NeighboringRelation),
    Shuffled: frozenset({NeighboringRelation.REPLACE_SPECIAL}),
    TruncatedPoissonSampled: frozenset({NeighboringRelation.REPLACE_SPECIAL}),
    SampledWithoutReplacement: frozenset({NeighboringRelation.REPLACE_ONE}),
}


def relations_of(leaf: PrivacyEvent) -> frozenset[NeighboringRelation]:
    """The relations under which a release has one meaning and one cost.

    Where batches depend on the number of units, adding one changes who else is drawn; where a unit that
    leaves makes room for another, it moves the sum by twice the clipping norm.
    """
    return _RELATIONS.get(type(leaf), _PRESENT_OR_NOT)


def flatten(event: PrivacyEvent | Iterable[PrivacyEvent]) -> dict[PrivacyEvent, int]:
    """Undo every composition: what was released, and how often.

    The only place where counts are multiplied, so that no accountant can forget one. A Poisson
    sample with probability 1 is the whole dataset, so it counts as the event inside, as does a pass
    whose balls all fall in one bin; where a unit owns several examples, all of them are there, and it
    moves the sum by as many clipping norms. Batches that continue a pass add nothing, as long as there
    is room for them in the passes that were begun.

    Args:
        event: One event, or several that were made one after another.

    Returns:
        Each distinct release that is not a composition, with its count; empty if nothing was
        released.
    """
    counts: dict[PrivacyEvent, int] = {}
    continued: dict[PrivacyEvent, int] = {}
    todo = [(item, 1) for item in ((event,) if isinstance(event, PrivacyEvent) else event)]
    while todo:
        item, count = todo.pop()
        item = _in_simpler_words(item)
        if type(item) is SelfComposed:
            todo.append((item.event, count * item.count))
        elif type(item) is Composed:
            todo.extend((part, count) for part in item.events)
        elif type(item) is Continued:
            continued[item.event] = continued.get(item.event, 0) + count
        elif _holds_everybody(item):
            todo.append((item.event, count))
        else:
            counts[item] = counts.get(item, 0) + count
    for begun, further in continued.items():
        assert isinstance(begun, Shuffled | BallsInBins)  # Continued holds nothing else
        passes = counts.get(begun, 0)
        counts[begun] = max(passes, -(-(passes + further) // begun.num_batches))
    return counts


def _in_simpler_words(item: PrivacyEvent) -> PrivacyEvent:
    """The same release without contributions, where one example or all of a unit's are certain."""
    match item:
        case PoissonSampledContributions(probability, 1, inner):
            return PoissonSampled(probability, inner)
        case PoissonSampledContributions(1, most, Gaussian(noise)):
            return Gaussian(noise / most)
        case _:
            return item


def _holds_everybody(item: PrivacyEvent) -> TypeGuard[PoissonSampled | BallsInBins]:
    """Whether what looks sampled is applied to all units."""
    if type(item) is PoissonSampled:
        return item.sampling_probability == 1
    return type(item) is BallsInBins and item.num_batches == 1


def drawn(leaf: PrivacyEvent) -> tuple[float, PrivacyEvent]:
    """The chance that a unit is there, and what is then released.

    Of a shuffled pass it is the one batch that holds the unit; the others cost nothing. A sampler of
    which no more is known than its own events comes back whole, with chance 1.
    """
    if isinstance(leaf, PoissonSampled):
        return leaf.sampling_probability, leaf.event
    return 1.0, leaf.event if isinstance(leaf, Shuffled) else leaf


def is_gaussian(leaf: PrivacyEvent) -> bool:
    """Whether a release is Gaussian noise on a sum, over all units, one pass or a Poisson sample."""
    return type(drawn(leaf)[1]) is Gaussian


def gaussian_parameters(leaf: PrivacyEvent) -> tuple[float, float]:
    """Sampling probability (1 without sampling) and noise multiplier of a release that `is_gaussian`."""
    probability, inner = drawn(leaf)
    if not isinstance(inner, Gaussian):
        raise TypeError(f"{leaf!r} is not Gaussian; ask `is_gaussian` first")
    return probability, inner.noise_multiplier


def is_laplace(leaf: PrivacyEvent) -> bool:
    """Whether it is Laplace noise, of fixed or of drawn scale, over all, one pass or a Poisson sample."""
    return type(drawn(leaf)[1]) in _LAPLACE


def simplified(inner: PrivacyEvent) -> PrivacyEvent:
    """The same noise, as `Laplace` where the inverse scale is not random."""
    if isinstance(inner, ScaleMixtureLaplace):
        law = inner.law
        if law.gamma_scale == law.exponential_mean == 0 and law.uniform_low == law.uniform_high:
            return Laplace(math.sqrt(2) / law.uniform_low, inner.norm, inner.dimension)
    return inner


def has_laplace_bound(leaf: PrivacyEvent) -> bool:
    """Whether a release that `is_laplace` has a proven cost.

    One kind has none: a scale for all coordinates together, of which there may be any number, where the
    l2 norm is bounded. Its divergences would be E[exp(c lambda^2)], infinite for most laws.
    """
    inner = simplified(drawn(leaf)[1])
    return not (
        isinstance(inner, ScaleMixtureLaplace)
        and (inner.draw, inner.norm, inner.dimension) == ("shared", "l2", None)
    )


def laplace_remedy(leaf: PrivacyEvent) -> str | None:
    """What to do about a release with Laplace noise that has no proven cost; None if it has."""
    if is_laplace(leaf):
        if has_laplace_bound(leaf):
            return None
        return "Give the number of noised coordinates, clip in the l1 norm, or draw scales 'iid'."
    inner = getattr(leaf, "event", None)
    if type(inner) not in _LAPLACE:
        return None
    contributions = isinstance(leaf, PoissonSampledContributions)
    other = "draw users instead of examples" if contributions else "use sampling='poisson'"
    return (
        "Laplace noise and its mixtures are accounted for over all units, a Poisson sample of them or a "
        f"shuffled pass: {other}, or use Gaussian noise."
    )
