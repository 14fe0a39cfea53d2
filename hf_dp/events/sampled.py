"""What batches a mechanism is applied to, and how often."""

from __future__ import annotations

from dataclasses import dataclass

from hf_dp._validate import positive_integer, probability
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events.mechanisms import PrivacyEvent

_WHY_NUM_UNITS = "It is public, and part of who is drawn."
_WHY_PASS = "It is how many batches a pass over the data has."
_REMEDY_PASS = "Use num_examples / expected_batch_size, rounded."


@dataclass(frozen=True)
class PoissonSampled(PrivacyEvent):
    """`event` applied to a batch that holds each unit independently with `sampling_probability`."""

    sampling_probability: float
    event: PrivacyEvent

    def __post_init__(self) -> None:
        probability(
            "PoissonSampled.sampling_probability",
            self.sampling_probability,
            "It is the chance that a unit is in the batch.",
            "Use expected_batch_size / num_examples.",
        )


@dataclass(frozen=True)
class PoissonSampledContributions(PrivacyEvent):
    """`event` applied to a Poisson sample of examples, of which one unit owns `max_contributions`.

    Each EXAMPLE is in the batch independently with `sampling_probability`, and is clipped for itself. A
    unit that owns at most `max_contributions` examples, k of them in the batch, moves the sum by at most
    k times its sensitivity.
    """

    sampling_probability: float
    max_contributions: int
    event: PrivacyEvent

    def __post_init__(self) -> None:
        owner = type(self).__name__
        probability(
            f"{owner}.sampling_probability",
            self.sampling_probability,
            "It is the chance that an example is in the batch.",
            "Use expected_batch_size / number of examples.",
        )
        positive_integer(
            f"{owner}.max_contributions",
            self.max_contributions,
            "A unit is protected with all examples that it may own.",
            "Use the largest number of examples that are kept of one user.",
        )


@dataclass(frozen=True)
class TruncatedPoissonSampled(PrivacyEvent):
    """`event` applied to a Poisson sample of `num_units` units, of which at most so many are kept.

    A larger sample is cut to a uniformly random subset of `max_batch_size` units, so a unit that comes
    in can push another one out. Neighbours have the same number of units (REPLACE_SPECIAL).
    """

    num_units: int
    sampling_probability: float
    max_batch_size: int
    event: PrivacyEvent

    def __post_init__(self) -> None:
        owner = type(self).__name__
        positive_integer(
            f"{owner}.num_units", self.num_units, _WHY_NUM_UNITS, "Use the number of examples."
        )
        probability(
            f"{owner}.sampling_probability",
            self.sampling_probability,
            "It is the chance that a unit is in the batch before it is cut.",
            "Use expected_batch_size / num_examples.",
        )
        positive_integer(
            f"{owner}.max_batch_size",
            self.max_batch_size,
            "A batch that may hold nobody learns nothing.",
            "Use expected_batch_size + 10 * sqrt(expected_batch_size), which is almost never reached.",
        )


@dataclass(frozen=True)
class SampledWithoutReplacement(PrivacyEvent):
    """`event` applied to exactly `batch_size` of `num_units` units, every such batch equally likely.

    A unit that is left out leaves its place to another one, so one unit moves the sum by twice the
    clipping norm. Noise in `event` is relative to the clipping norm, as everywhere; the factor two is
    the accountant's business. Neighbours differ in one unit's data (REPLACE_ONE).
    """

    num_units: int
    batch_size: int
    event: PrivacyEvent

    def __post_init__(self) -> None:
        owner = type(self).__name__
        positive_integer(
            f"{owner}.num_units", self.num_units, _WHY_NUM_UNITS, "Use the number of examples."
        )
        positive_integer(
            f"{owner}.batch_size", self.batch_size, "It is drawn exactly.", "Use at least 1."
        )
        if self.batch_size > self.num_units:
            raise ConfigurationError(
                explain(
                    f"{owner}.batch_size",
                    self.batch_size,
                    f"at most num_units ({self.num_units})",
                    "Without replacement no unit is in a batch twice.",
                    "Lower it.",
                )
            )


@dataclass(frozen=True)
class Shuffled(PrivacyEvent):
    """A whole pass: each unit is in exactly one of `num_batches` batches; `event` applied to each.

    Who is in which batch may be known, or chosen, by anybody: nothing is gained by the shuffling.
    Neighbours have the same number of units (REPLACE_SPECIAL), as the batches are cut by counting.
    """

    num_batches: int
    event: PrivacyEvent

    def __post_init__(self) -> None:
        positive_integer("Shuffled.num_batches", self.num_batches, _WHY_PASS, _REMEDY_PASS)


@dataclass(frozen=True)
class BallsInBins(PrivacyEvent):
    """A whole pass: each unit is in exactly one of `num_batches` batches; `event` applied to each.

    Every unit's batch is drawn uniformly, independently of the others, anew in every pass, and in
    secret.
    """

    num_batches: int
    event: PrivacyEvent

    def __post_init__(self) -> None:
        positive_integer("BallsInBins.num_batches", self.num_batches, _WHY_PASS, _REMEDY_PASS)


@dataclass(frozen=True)
class Continued(PrivacyEvent):
    """A further batch of a pass, whose whole `event` was written down when the pass began.

    So it adds nothing; but more of these than the passes that were begun have room for count as
    further passes.
    """

    event: PrivacyEvent

    def __post_init__(self) -> None:
        if not isinstance(self.event, Shuffled | BallsInBins) or self.event.num_batches == 1:
            raise ConfigurationError(
                explain(
                    "Continued.event",
                    self.event,
                    "a pass of several batches: Shuffled or BallsInBins",
                    "Of any other event every batch costs as much as the first.",
                    "Record the event itself.",
                )
            )


@dataclass(frozen=True)
class SelfComposed(PrivacyEvent):
    """`event`, `count` times in a row, each with fresh randomness."""

    event: PrivacyEvent
    count: int

    def __post_init__(self) -> None:
        positive_integer(
            "SelfComposed.count", self.count, "It counts releases.", "Use at least one release."
        )


@dataclass(frozen=True)
class Composed(PrivacyEvent):
    """All of `events`, one after another, each free to depend on what came before."""

    events: tuple[PrivacyEvent, ...]
