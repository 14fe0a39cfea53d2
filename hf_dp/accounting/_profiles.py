"""Privacy profiles of batches in which one unit's coming and going changes who else is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from hf_dp.accounting._losses import Direction, DiscreteLoss, Floats, SampledGaussian, discretise


@dataclass(frozen=True)
class SampledSwap:
    """Gaussian noise on a sum over a batch of fixed size, drawn without replacement.

    A unit replaces another's data, or its place: two clipping norms either way.

    Attributes:
        sampling_probability: Batch size / number of units, in (0, 1].
        noise_multiplier: Standard deviation / clipping norm, > 0.

    Source:
        Balle, Barthe and Gaboardi (2018), arXiv 1807.01647, theorem 2 (advanced joint convexity), for
        epsilons above zero; Zhu, Dong and Wang (2022), arXiv 2106.08567, for the dominating profile.
    """

    sampling_probability: float
    noise_multiplier: float

    is_symmetric = True

    def loss_range(self) -> tuple[float, float]:
        """Lowest and highest loss of the grid."""
        high = self._of_a_member.loss_range()[1]
        return -high, high

    def tail(self, epsilons: Floats, direction: Direction) -> Floats:
        """delta(epsilon) of one release, for epsilons >= 0, ``(n,)``; the same in both directions."""
        del direction
        return self._of_a_member.tail(epsilons, "remove")

    def discretised(self, direction: Direction, interval: float) -> DiscreteLoss:
        """The loss on a grid (see `discretise`)."""
        return discretise(self, direction, interval)

    @property
    def _of_a_member(self) -> SampledGaussian:
        return SampledGaussian(self.sampling_probability, self.noise_multiplier / 2)


@dataclass(frozen=True)
class TruncatedSample:
    """Gaussian noise on a sum over a Poisson sample that is cut to a uniform subset where it is too large.

    How many others were drawn does not depend on the unit. Where they leave room, the sample is a Poisson
    sample. Where they fill the batch, it is one of fixed size, from which the unit pushes another one:
    then a batch with the unit is a uniform set T of others and the unit, and one without it has the law of
    T and one more, whatever their number was. So in each direction the two neighbours share a part, and
    what they do not share lies two clipping norms apart at most; hockey-stick divergences are jointly
    convex, so the two cases add up.

    Attributes:
        sampling_probability: Before the batch is cut, in (0, 1].
        noise_multiplier: Standard deviation / clipping norm, > 0.
        full_probability: Chance that the others fill the batch.
        place_probability: Chance that the unit is kept if they do.

    Source:
        Ganesh (2025), arXiv 2508.15089, for the mixture; its second part is bounded here by
        `SampledSwap`, which is tighter than replacing the unit by its opposite.
    """

    sampling_probability: float
    noise_multiplier: float
    full_probability: float
    place_probability: float

    is_symmetric = False

    @classmethod
    def of(
        cls,
        num_units: int,
        sampling_probability: float,
        max_batch_size: int,
        noise_multiplier: float,
    ) -> Self | SampledGaussian:
        """The release of that sampler; a plain Poisson sample where the batch is never full."""
        from scipy.stats import binom

        full = float(binom.sf(max_batch_size - 1, num_units - 1, sampling_probability))
        if full == 0:
            return SampledGaussian(sampling_probability, noise_multiplier)
        too_many = float(binom.sf(max_batch_size, num_units, sampling_probability))
        place = min(too_many * max_batch_size / num_units / full, sampling_probability)
        return cls(sampling_probability, noise_multiplier, min(full, 1.0), place)

    def loss_range(self) -> tuple[float, float]:
        """Lowest and highest loss of the grid, in the direction "remove"."""
        low, high = self._with_room.loss_range()
        pushed = self._full.loss_range()
        return min(low, pushed[0]), max(high, pushed[1])

    def tail(self, epsilons: Floats, direction: Direction) -> Floats:
        """delta(epsilon) of one release, for epsilons >= 0, ``(n,)``."""
        full = self.full_probability
        with_room = self._with_room.tail(epsilons, direction)
        deltas: Floats = (1 - full) * with_room + full * self._full.tail(epsilons, direction)
        return deltas

    def discretised(self, direction: Direction, interval: float) -> DiscreteLoss:
        """The loss on a grid (see `discretise`)."""
        return discretise(self, direction, interval)

    @property
    def _with_room(self) -> SampledGaussian:
        return SampledGaussian(self.sampling_probability, self.noise_multiplier)

    @property
    def _full(self) -> SampledSwap:
        return SampledSwap(self.place_probability, self.noise_multiplier)
