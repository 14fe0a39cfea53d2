"""Losses from elsewhere: each call has a batch of its own, and draws nothing beside the model.

Such a loss may take a column out of its batch, or change a tensor in place, and it is called several times
for one batch. And it may draw random numbers (how much of a neighbour is mixed in). Then an example's loss
alone is not what it was among others, and no comparison of the two tells whether examples influence one
another. Draws of the model's modules are another matter: dropout can be left out of a comparison.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_dp.engines.base import ExampleLoss
from hf_dp.engines.familiar import is_from_library
from hf_dp.errors import UncoveredParameterError, explain
from hf_dp.layers.randomness import Randomness, kept_randomness


class OwnDrawsError(UncoveredParameterError):
    """A loss draws random numbers of its own, outside of the model's modules."""

    def __init__(self) -> None:
        """Nothing of a batch is named."""
        super().__init__(
            explain(
                "example_loss",
                "random numbers drawn outside of the model",
                "a loss that draws none of its own",
                "What it draws for several examples it does not draw for one of them alone, so nobody can "
                "tell whether they change one another's losses.",
                "Draw before, and put what was drawn into the batch as a column with a row for each "
                "example, or use engine='sequential'.",
            )
        )


def with_own_batches(example_loss: ExampleLoss) -> ExampleLoss:
    """The same loss, which may do with its batch what it likes; a library's is returned as it is."""
    if _has_own_batches(example_loss) or is_from_library(example_loss):
        return example_loss
    return functools.partial(_with_own_batch, example_loss)


def _with_own_batch(
    example_loss: ExampleLoss, model: nn.Module, inputs: Mapping[str, Any]
) -> Tensor:
    return example_loss(model, copied(inputs))


def _has_own_batches(loss: object) -> bool:
    if not isinstance(loss, functools.partial):
        return False
    inner = (*loss.args, *loss.keywords.values())
    return loss.func is _with_own_batch or any(map(_has_own_batches, inner))


def copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A new dict of copies: of tensors, arrays and lists, and of what is in dicts."""
    return {name: _copy_of(value) for name, value in inputs.items()}


def _copy_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, list):
        return list(map(_copy_of, value))
    return copied(value) if isinstance(value, Mapping) else value


class Draws:
    """Watches the global generators while a loss runs, except while some modules do.

    Attributes:
        start: The generators as the loss found them.
        any: Whether something was drawn.
        outside: Whether something was drawn while none of the modules ran.
        outermost: Modules that the loss itself called.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin now."""
        self.start = self._before = Randomness.now(device)
        self.any = False
        self.outside = False
        self.outermost: set[nn.Module] = set()
        self._inside: list[nn.Module] = []

    def __deepcopy__(self, memo: object) -> Draws:
        """Models that are copied meanwhile take it along."""
        return self

    def enter(self, module: nn.Module, args: object) -> None:
        """A forward pre-hook."""
        if not self._inside:
            self.outermost.add(module)
            self._compare()
        self._inside.append(module)

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        """A forward hook."""
        while self._inside and self._inside.pop() is not module:
            continue  # these have raised an error
        if not self._inside:
            self._before = Randomness.now(self.start.device)

    def finish(self) -> None:
        """The loss is done."""
        if not self._inside:
            self._compare()
        self.any = self.outside or not self._before.same(self.start)

    def _compare(self) -> None:
        self.outside = self.outside or not Randomness.now(self.start.device).same(self._before)


@contextlib.contextmanager
def watched_draws(device: torch.device, except_in: Iterable[nn.Module] = ()) -> Iterator[Draws]:
    """Watch what is drawn within the context, outside of these modules."""
    draws = Draws(device)
    with contextlib.ExitStack() as stack:
        for module in except_in:
            stack.enter_context(module.register_forward_pre_hook(draws.enter))
            stack.enter_context(module.register_forward_hook(draws.leave, always_call=True))
        yield draws
        draws.finish()


def refuse_own_draws(
    model: nn.Module,
    inputs: Mapping[str, Any],
    example_loss: ExampleLoss,
    *,
    start: Randomness | None = None,
) -> set[nn.Module]:
    """Run the loss without gradients; no generator is left changed.

    Args:
        model: As the engine calls it.
        inputs: One or more examples.
        example_loss: One loss per example.
        start: The generators as the loss should find them; None for as they are.

    Returns:
        Modules that the loss itself calls: the model, or parts of it.

    Raises:
        OwnDrawsError: It draws while no module of the model runs.
    """
    device = next(model.parameters()).device
    with kept_randomness(device), torch.no_grad():
        if start is not None:
            start.restore()
        with watched_draws(device, model.modules()) as draws:
            example_loss(model, inputs)
    if draws.outside:
        raise OwnDrawsError
    return draws.outermost
