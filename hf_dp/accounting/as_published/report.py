"""Each published label beside the epsilon that holds for the noise it was printed for."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from hf_dp._validate import one_of
from hf_dp.accounting import ACCOUNTANTS, accountant_named
from hf_dp.accounting.as_published.formula import (
    as_published_label,
    as_published_total_label,
    matched_noise,
)
from hf_dp.accounting.as_published.sets import (
    DELTA,
    READINGS,
    SETS,
    TASKS,
    PublishedNoise,
    PublishedTask,
    Reading,
    set_named,
)
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import Gaussian, PoissonSampled, PrivacyEvent, ScaleMixtureLaplace, SelfComposed
from hf_dp.scale_law import ScaleLaw

WORDING = (
    "An as_published_label is what the released code of LMO-DP (arXiv 2405.18776) prints. It is not an "
    "epsilon: that code evaluates a moment generating function beyond the orders at which it exists, "
    "uses a one-dimensional formula for an l2-clipped gradient, and takes its multi-step total from a "
    "matched Gaussian; the released sampler and accountant also read one parameter differently. We "
    "could consult the abstract and the released code, not every version of the paper; corrections are "
    "welcome."
)
_TIGHT = (
    200.0  # the accountant's bounds are within 0.01% up to here, at any setting of this package
)
RADIUS = 0.9
"""Of the usefulness P(|noise| <= radius) that the released code computes."""


@dataclass(frozen=True)
class Holds:
    """What noise that was drawn in one of two readings guarantees, under Poisson sampling.

    Attributes:
        reading: How the exponential part's parameter is read.
        epsilon_one_coordinate: Proven, and within 0.01% of the exact one, for a model of one parameter.
        epsilon_all_coordinates: Proven for l2-clipped gradients of all parameters; inf where no finite
            bound is known.
        high_dimension_limit: What epsilon tends to, as parameters grow in number, for gradients spread
            evenly over them, to 0.1%: in the limit the true epsilon, which is that of the worst
            gradients, is not below it. It bounds nothing from above.
        gaussian_with_that_limit: Noise multiplier of the Gaussian that this limit is.
    """

    reading: Reading
    epsilon_one_coordinate: float
    epsilon_all_coordinates: float
    high_dimension_limit: float
    gaussian_with_that_limit: float


@dataclass(frozen=True)
class Size:
    """How large noise is, at clipping norm 1.

    Attributes:
        reading: Of the exponential part's parameter.
        deviation: Standard deviation of one coordinate.
        mean_absolute: Mean absolute value.
        usefulness: P(|noise| <= `RADIUS`).
        information: Fisher information; times the variance it is at least 2, for a Gaussian 1.
    """

    reading: Reading
    deviation: float
    mean_absolute: float
    usefulness: float
    information: float

    @classmethod
    def of(cls, law: ScaleLaw, reading: Reading) -> Size:
        """The sizes of a law."""
        return cls(
            reading,
            law.deviation,
            law.mean_absolute,
            float(law.usefulness(RADIUS)),
            law.information(),
        )


@dataclass(frozen=True)
class Step:
    """One release of one published set.

    Attributes:
        name: Of the set.
        delta: Of the label and of what holds.
        as_published_label: What the released code prints for one step. Not an epsilon.
        order: At which it was found.
        largest_valid_order: Up to which the formula means something.
        label_inside_domain: The same formula at orders up to there only; it bounds the epsilon of one
            coordinate as accounted.
        sizes: Of the noise, as sampled and as accounted.
        matched_gaussian: Standard deviation of the Gaussian that the label is compared with.
        holds: What is guaranteed, as sampled and as accounted.
    """

    name: str
    delta: float
    as_published_label: float
    order: int
    largest_valid_order: int
    label_inside_domain: float
    sizes: tuple[Size, ...]
    matched_gaussian: float
    holds: tuple[Holds, ...]


@dataclass(frozen=True)
class Total:
    """A whole run with one published set.

    Attributes:
        name: Of the set.
        task: What was learnt.
        delta: Of the label and of what holds.
        as_published_total_label: What the released code prints for the run. Not an epsilon.
        matched_gaussian: Standard deviation of the Gaussian that this label is about.
        epsilon_of_matched_gaussian: Proven, for a run with that Gaussian, which is the baseline that
            was trained.
        holds: What is guaranteed with LMO noise, as sampled and as accounted.
    """

    name: str
    task: str
    delta: float
    as_published_total_label: float
    matched_gaussian: float
    epsilon_of_matched_gaussian: float
    holds: tuple[Holds, ...]


def lmo_published(
    *, report_as_published: bool, task: str = "SST-2", with_steps: bool = True
) -> Iterator[Step | Total]:
    """The published sets with their labels, and beside each label what holds.

    Args:
        report_as_published: Must be True: the figures are labels, not guarantees, and whoever asks for
            them says that this is known.
        task: Whose totals; its model's dimension is that of the one-step figures too.
        with_steps: Whether to give the one-step figures.

    Yields:
        A `Step` for every set, then a `Total` for every set that the task was trained with.

    Raises:
        ConfigurationError: `report_as_published` is not True, or there is no such task.
    """
    if report_as_published is not True:
        raise ConfigurationError(
            explain(
                "lmo_published.report_as_published",
                report_as_published,
                "True",
                "The labels are no guarantees, and must not be taken for any.",
                "Pass report_as_published=True if you want to compare them with what holds.",
            )
        )
    names = [one.name for one in TASKS]
    one_of("lmo_published.task", task, names, "Totals are of a task's sampling and steps.")
    _warn_once()
    return _rows(next(one for one in TASKS if one.name == task), with_steps=with_steps)


def _rows(task: PublishedTask, *, with_steps: bool) -> Iterator[Step | Total]:
    for noise in SETS if with_steps else ():
        yield step(noise, task.dimension)
    for name in task.sets:
        yield total(set_named(name), task)


@functools.cache
def _warn_once() -> None:
    warnings.warn(WORDING, UserWarning, stacklevel=3)


def step(noise: PublishedNoise, dimension: int) -> Step:
    """One release of a set, for a model with `dimension` parameters."""
    label = as_published_label(noise)
    return Step(
        name=noise.name,
        delta=DELTA,
        as_published_label=label.value,
        order=label.order,
        largest_valid_order=label.largest_valid_order,
        label_inside_domain=label.inside_domain,
        sizes=tuple(Size.of(noise.law(reading), reading) for reading in READINGS),
        matched_gaussian=matched_noise(noise.nominal, DELTA),
        holds=tuple(holds(noise, reading, (1.0, 1, DELTA, dimension)) for reading in READINGS),
    )


def total(noise: PublishedNoise, task: PublishedTask) -> Total:
    """A whole run with a set."""
    run = (task.sampling_probability, task.num_steps, task.delta, task.dimension)
    gaussian = matched_noise(noise.nominal, task.delta)
    return Total(
        name=noise.name,
        task=task.name,
        delta=task.delta,
        as_published_total_label=as_published_total_label(noise.nominal, task),
        matched_gaussian=gaussian,
        epsilon_of_matched_gaussian=_epsilon(Gaussian(gaussian), run),
        holds=tuple(holds(noise, reading, run) for reading in READINGS),
    )


Run = tuple[float, int, float, int]
"""Sampling probability, steps, delta, dimension."""


def holds(noise: PublishedNoise, reading: Reading, run: Run) -> Holds:
    """What a run guarantees if its noise is drawn in one of the two readings."""
    law = noise.law(reading)
    alike = 1 / math.sqrt(law.information())
    return Holds(
        reading=reading,
        epsilon_one_coordinate=_epsilon(_event(law, 1), run),
        epsilon_all_coordinates=_epsilon(_event(law, run[3]), run),
        high_dimension_limit=_limit(alike, run),
        gaussian_with_that_limit=alike,
    )


def _event(law: ScaleLaw, dimension: int) -> ScaleMixtureLaplace:
    return ScaleMixtureLaplace(
        gamma_shape=law.gamma_shape,
        gamma_scale=law.gamma_scale,
        exponential_mean=law.exponential_mean,
        uniform_low=law.uniform_low,
        uniform_high=law.uniform_high,
        draw="iid",
        norm="l2",
        dimension=dimension,
    )


def _epsilon(release: PrivacyEvent, run: Run) -> float:
    """The least proven epsilon; inf if no accountant has a finite one."""
    sampling_probability, num_steps, delta, _ = run
    event = SelfComposed(PoissonSampled(sampling_probability, release), num_steps)
    able = [name for name in ("pld", "rdp") if accountant_named(name).can_cost(event)]
    proven = (ACCOUNTANTS[name]().guarantee(event, delta=delta).epsilon for name in able)
    return min(proven, default=math.inf)


def _limit(noise_multiplier: float, run: Run) -> float:
    """Epsilon of the Gaussian: tight, where the accountant's bound no longer is, too."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    found = _epsilon(Gaussian(noise_multiplier), run)
    if found <= _TIGHT:
        return found
    sampling_probability, num_steps, delta, _ = run
    one = from_gaussian_mechanism(
        noise_multiplier,
        sampling_prob=sampling_probability,
        value_discretization_interval=_TIGHT * 1e-3 / num_steps,
        pessimistic_estimate=False,
        use_connect_dots=False,
    )
    return float(one.self_compose(num_steps).get_epsilon_for_delta(delta))
