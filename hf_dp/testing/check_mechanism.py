"""Is the noise that a mechanism draws the noise of its event."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from hf_dp._validate import open_unit_interval, positive, positive_integer
from hf_dp.coins import Coins, SecretCoins
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import Gaussian, Laplace, PrivacyEvent, ScaleMixtureLaplace
from hf_dp.noise.base import NoiseMechanism
from hf_dp.scale_law import ScaleLaw
from hf_dp.sums import ClippedSum, NoisySum
from hf_dp.testing.disagreement import DisagreementError

Array = NDArray[np.float64]
SizeLaw = Callable[[Array], Array]  # x -> P(abs(noise of one coordinate at sensitivity 1) <= x)

_COLUMNS = 64  # of the matrix that is part of every sum
_RELEASES = 200  # over which the draws are spread at least, so that the loss has draws enough
_CHECKS = 5  # that can fail by chance
_CHANCE_REPEATS = 3  # of 53-bit draws; more happen once in 10^20 checks


def check_mechanism(
    mechanism: NoiseMechanism,
    *,
    size_law: SizeLaw | None = None,
    sensitivity: float = 3.0,
    count: int = 100_000,
    false_alarm: float = 1e-6,
    coins: Coins | None = None,
) -> None:
    """Check that what a mechanism adds to a sum of zeros has the law of its event.

    Checked are the law of a coordinate, and of the loss's, at this sensitivity (Kolmogorov-Smirnov),
    the sign's fairness, that neighbouring coordinates are independent, that every coordinate of every
    tensor gets a draw of its own in every release, and that the sum itself is kept. With the default
    count a standard deviation that is wrong by 5 % is found. Where a release has one coordinate, or an
    event says that one draw is shared by all of a release, it is made a tenth of `count` times, which
    finds 15 %.

    Args:
        mechanism: What is checked, with symmetric noise of one law for all coordinates.
        size_law: For an event of one's own: x -> P(abs(Z) <= x), Z the noise of one coordinate at
            sensitivity 1. Taken from the event if None.
        sensitivity: At which it is drawn, > 0.
        count: Coordinates drawn, over many releases.
        false_alarm: The chance, over all checks, that a mechanism which is right fails.
        coins: Where the draws come from; the operating system by default.

    Raises:
        DisagreementError: A check failed; the message says which.
        ConfigurationError: The event's law is not known and none is given.
    """
    positive_integer("count", count, "It is the number of draws.", "Use 100000.")
    open_unit_interval("false_alarm", false_alarm, "It is a probability.", "Use 1e-6.")
    positive("sensitivity", sensitivity, "Noise is proportional to it.", "Use 1.")
    event = mechanism.event()
    law, level, coins = size_law or _size_law(event), false_alarm / _CHECKS, coins or SecretCoins()
    shared = isinstance(event, ScaleMixtureLaplace) and event.draw == "shared"
    most = getattr(event, "dimension", None) or count
    width = min(most, 3 if shared else max(3, count // _RELEASES))
    drawn = np.stack(
        [
            _coordinates(mechanism.release(_sum_of(width), sensitivity=sensitivity, coins=coins))
            for _ in range(max(_RELEASES, count // (10 if shared else max(width, 10))))
        ]
    )
    _check_repeats(drawn)
    drawn = drawn / sensitivity
    every = drawn[np.arange(len(drawn)), np.arange(len(drawn)) % width] if shared else drawn.ravel()
    _check_law("a coordinate", every, law, level)
    _check_law("the last coordinate, the loss's", drawn[:, -1], law, level)
    _check_signs(every, level)
    if not shared and width > 1:
        _check_neighbours(drawn, level)
    _check_sum_is_kept(mechanism, width, coins)


def _size_law(event: PrivacyEvent) -> SizeLaw:
    """P(abs(Z) <= x) of the events that are known."""
    if isinstance(event, Gaussian):
        width = event.noise_multiplier * math.sqrt(2)
        return lambda x: np.asarray(2 * stats.norm.cdf(math.sqrt(2) * x / width) - 1)
    if isinstance(event, Laplace):
        inverse = math.sqrt(2) / event.noise_multiplier
        return ScaleLaw(uniform_low=inverse, uniform_high=inverse).usefulness
    if isinstance(event, ScaleMixtureLaplace):
        return event.law.usefulness
    raise ConfigurationError(
        explain(
            "size_law",
            type(event).__name__,
            "a function, as the law of this event is not known",
            "Draws can only be compared with the law that is accounted for.",
            "Pass x -> P(abs(Z) <= x) for the noise Z of one coordinate at sensitivity 1.",
        )
    )


def _sum_of(width: int, value: float = 0.0) -> ClippedSum:
    """A sum of this many equal coordinates: a matrix, a vector, and if there is room a number and a loss."""
    rows, rest = divmod(width - 2 if width > 2 else width, _COLUMNS)
    shapes: dict[str, tuple[int, ...]] = {"matrix": (rows, _COLUMNS), "vector": (rest,)}
    if width > 2:
        shapes["number"] = ()
    grads = {name: torch.full(shape, value, dtype=torch.float64) for name, shape in shapes.items()}
    loss = torch.tensor(value, dtype=torch.float64) if width > 2 else None
    return ClippedSum(grads, torch.zeros(0), torch.zeros(0), loss)


def _coordinates(released: NoisySum) -> Array:
    """All of a release in one row, the loss last."""
    loss = [] if released.loss_sum is None else [released.loss_sum]
    parts = [part.reshape(-1) for part in (*released.grads.values(), *loss)]
    row: Array = torch.cat(parts).numpy()
    return row


def _check_repeats(drawn: Array) -> None:
    repeats = drawn.size - len(np.unique(drawn))
    if repeats > _CHANCE_REPEATS:
        raise DisagreementError(
            f"{repeats} of {drawn.size} draws were drawn before, or are no draws: every coordinate of "
            "every release needs noise of its own"
        )


def _check_law(what: str, drawn: Array, law: SizeLaw, level: float) -> None:
    found = stats.kstest(np.abs(drawn), law)
    if found.pvalue < level:
        raise DisagreementError(
            f"the noise of {what} has not the law of the event: the share of draws up to "
            f"{found.statistic_location:.4g} x sensitivity is off by {found.statistic:.3g}, which "
            f"happens with probability {found.pvalue:.1g} by chance ({len(drawn)} draws)"
        )


def _check_signs(drawn: Array, level: float) -> None:
    positive_draws = int((drawn > 0).sum())
    if stats.binomtest(positive_draws, len(drawn), 0.5).pvalue < level:
        raise DisagreementError(
            f"{positive_draws} of {len(drawn)} draws are positive, where half should be"
        )


def _check_neighbours(drawn: Array, level: float) -> None:
    """Rank correlation of the sizes of neighbours, as heavy tails have no other."""
    size = np.abs(drawn)
    ranks = (np.argsort(np.argsort(size, axis=None)).reshape(size.shape) + 0.5) / size.size - 0.5
    pairs = ranks[:, 1:] * ranks[:, :-1]
    deviations = 12 * float(pairs.sum()) / math.sqrt(pairs.size)
    if 2 * stats.norm.sf(abs(deviations)) < level:
        raise DisagreementError(
            f"the sizes of neighbouring coordinates' noise are not independent: their rank correlation "
            f"is {deviations / math.sqrt(pairs.size):.3g}, {abs(deviations):.1f} standard deviations off"
        )


def _check_sum_is_kept(mechanism: NoiseMechanism, width: int, coins: Coins) -> None:
    little = 1e-6 / mechanism.noise_multiplier
    kept = _coordinates(mechanism.release(_sum_of(width, 1000.0), sensitivity=little, coins=coins))
    if not (np.abs(kept - 1000) < 1).all():
        raise DisagreementError("the release is not the sum plus noise: the sum was not kept")
