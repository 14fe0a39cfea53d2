"""The interface of a noise mechanism: the release it makes and the event that is accounted for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from torch import Tensor

from hf_dp.coins import Coins
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import Norm, PrivacyEvent
from hf_dp.sums import ClippedSum, NoisySum


class NoiseMechanism(ABC):
    """Adds noise to a whole clipped sum at once.

    A mechanism of one's own is checked by `hf_dp.testing.check_mechanism`.
    """

    if TYPE_CHECKING:  # a property here would become the default of a dataclass's field

        @property
        def norm(self) -> Norm:
            """The norm of the sensitivity; must equal the clipping policy's."""
            raise NotImplementedError

        @property
        def noise_multiplier(self) -> float:
            """Standard deviation of one coordinate's noise, divided by the sensitivity."""
            raise NotImplementedError

    @abstractmethod
    def event(self) -> PrivacyEvent:
        """One release of a sum of sensitivity 1."""

    @abstractmethod
    def release(self, summed: ClippedSum, *, sensitivity: float, coins: Coins) -> NoisySum:
        """The sum plus noise scaled to `sensitivity`; `summed` is used up."""

    def with_noise_multiplier(self, noise_multiplier: float) -> Self:
        """Noise of the same kind and another size, which an accountant may choose."""
        raise ConfigurationError(
            explain(
                "PrivacyPlan.noise",
                type(self).__name__,
                "a mechanism with a method with_noise_multiplier",
                f"An accountant cannot choose a size of {noise_multiplier:g} for any other.",
                "Pass a plan whose noise is already sized, without target_epsilon.",
            )
        )


def released(summed: ClippedSum, noised: Callable[[Tensor], Tensor]) -> NoisySum:
    """The release in which every tensor of the sum, the loss's included, went through `noised`."""
    grads = {name: noised(grad) for name, grad in summed.grads.items()}
    loss_sum = None if summed.loss_sum is None else noised(summed.loss_sum)
    return NoisySum(grads=grads, loss_sum=loss_sum)


def check_dimension(owner: str, summed: ClippedSum, dimension: int | None) -> None:
    """Refuse a sum of more coordinates than the event says, the loss's included.

    Raises:
        ConfigurationError: What would be accounted for is less than what would be released.
    """
    coordinates = sum(grad.numel() for grad in summed.grads.values())
    coordinates += summed.loss_sum is not None
    if dimension is not None and coordinates > dimension:
        raise ConfigurationError(
            explain(
                f"{owner}.dimension",
                dimension,
                f"at least the {coordinates} coordinates of the release, the loss's included",
                "More coordinates are noised than are accounted for.",
                "Count all trainable parameters, and one for the private loss.",
            )
        )
