"""Whether a loss, or the model, remembers examples: then one of them moves the gradients of later ones.

No clipping bounds that, whichever the engine. It is tried on made-up examples: one of them must give the
same, under equal coins, after others as before them. What begins to remember only later is not seen so; of
a trainer's own attributes, changes are told in every step.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import itertools
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_dp.engines.base import ExampleLoss, GradientEngine
from hf_dp.engines.rows import batch_size, select_rows
from hf_dp.engines.undisturbed import undisturbed
from hf_dp.errors import ConfigurationError, explain
from hf_dp.layers.randomness import Randomness, kept_randomness
from hf_dp.plan import PrivacyPlan
from hf_dp.sums import ClippedSum
from hf_dp.training.held import Held, numbers_of
from hf_dp.training.losses import is_coarse
from hf_dp.training.made_up import MadeUpRows, each_alone
from hf_dp.training.reading import same_item
from hf_dp.training.refused_parts import HOSTS

logger = logging.getLogger(__name__)

_TIMES = 4  # that each of the others is seen, so that what adds up shows
_FEW = 16  # first and last items of a long list that are compared
_DEPTH = 3  # of lists in lists
# Of losses and of gradients, relative: the same batch comes out the same but for sums in another order.
_LOSS, _GRADIENT = 1e-5, 1e-3
_COARSE_LOSS, _COARSE_GRADIENT = 1e-2, 5e-2


def refuse_remembering(
    model: nn.Module,
    rows: MadeUpRows,
    *,
    engine: GradientEngine,
    example_loss: ExampleLoss,
    plan: PrivacyPlan,
    together: bool,
    owner: str,
) -> None:
    """Take the first example before, between and after the others, each time with equal coins.

    Args:
        model: As it is trained, in its mode; it is put back.
        rows: Made-up examples.
        engine: The one that will train.
        example_loss: One loss per example.
        plan: Its clipping and its loss release.
        together: Whether training takes several examples together.
        owner: What computes losses, for the message.

    Raises:
        ConfigurationError: It came out otherwise.
        PrivacyError: A forward pass changed a parameter or a buffer.
    """
    alone = each_alone(rows)
    device = next(model.parameters()).device

    def summed(place: int, times: int = 1) -> ClippedSum:
        batches = [alone[place]] * times
        if together:
            batches = [select_rows(rows, [place] * times)]
        total: ClippedSum | None = None
        for batch in batches:
            part = engine.clipped_sum(
                model,
                batch,
                example_loss=example_loss,
                clipping=plan.clipping,
                loss_release=plan.loss_release,
            )
            total = part if total is None else total + part
        assert total is not None
        return total

    with undisturbed(model, dropout=True), kept_randomness(device):
        held, kept = Held(model), _kept_by_modules(model)
        coins = Randomness.now(device)
        summed(0)  # engines look a model over when they first see it
        first: ClippedSum | None = None
        for place in (0, *range(1, batch_size(rows))):
            if place:
                summed(place, _TIMES)
            coins.restore()
            again = summed(0)
            if first is not None and not _alike(first, again, coarse=is_coarse(model)):
                held.refuse_changes(model)
                raise _refusal(model, kept, owner)
            first = again
        held.refuse_changes(model)


def _alike(one: ClippedSum, other: ClippedSum, *, coarse: bool) -> bool:
    loss, gradient = (_COARSE_LOSS, _COARSE_GRADIENT) if coarse else (_LOSS, _GRADIENT)
    if not torch.allclose(one.losses, other.losses, rtol=loss, atol=loss / 10, equal_nan=True):
        return False
    if not torch.allclose(one.norms, other.norms, rtol=gradient, equal_nan=True):
        return False
    gap = _length([one.grads[name] - other.grads[name] for name in one.grads])
    return gap <= gradient * _length(list(one.grads.values()))


def _length(tensors: list[Tensor]) -> float:
    lengths = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    return float(torch.stack([length.cpu() for length in lengths]).norm())


def _refusal(model: nn.Module, before: Mapping[str, Any], owner: str) -> ConfigurationError:
    changed = [
        name for name, v in _kept_by_modules(model).items() if not _same(v, before.get(name))
    ]
    return ConfigurationError(
        explain(
            f"model.{changed[0]}" if changed else owner,
            "changed by the forward pass" if changed else "remembers examples",
            "the same loss for the same example, whichever came before it",
            "A running mean, a count or a queue lets one example move the gradients of all later ones, which "
            "no clipping bounds, and neither does engine='sequential'.",
            "Keep nothing of the examples: compute each loss from its own example, and statistics from "
            "public data, before training.",
        )
    )


def _kept_by_modules(model: nn.Module) -> dict[str, Any]:
    """Numbers in plain attributes of modules."""
    return {
        f"{prefix}.{name}".lstrip("."): numbers
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if not name.startswith("_") and (numbers := _numbers(value)) is not None
    }


@contextlib.contextmanager
def nothing_kept(trainer: object) -> Iterator[None]:
    """Warn of numbers that a trainer's own class puts into its attributes while losses are computed.

    For its log it may, since a log is kept from them; in a later loss they would be outside the guarantee.
    What a host's class sets is left to the host.
    """
    before = _attributes(trainer)
    yield
    for name, value in _attributes(trainer).items():
        if name not in before or not _same(value, before[name]):
            _warn_of(f"{type(trainer).__name__}.{name}")


@functools.cache
def _warn_of(attribute: str) -> None:
    logger.warning(
        "hf_dp: %s changes while losses are computed. If a later loss depends on it, one example moves the "
        "gradients of others, which no clipping bounds: then nothing is guaranteed.",
        attribute,
    )


def _attributes(trainer: object) -> dict[str, Any]:
    kinds = type(trainer).__mro__
    own = [vars(kind) for kind in kinds if kind not in _hosts(kinds)]
    names = _set_by_libraries(kinds)
    found = ((n, v) for held in (*own, vars(trainer)) for n, v in held.items() if n not in names)
    return {name: numbers for name, value in found if (numbers := _numbers(value)) is not None}


@functools.cache
def _set_by_libraries(kinds: tuple[type[Any], ...]) -> frozenset[str]:
    """The attributes that the code of libraries' classes assigns to."""
    functions = [
        function
        for base in _hosts(kinds)
        for function in vars(base).values()
        if isinstance(function, FunctionType)
    ]
    return frozenset(
        step.argval
        for function in functions
        for step in dis.get_instructions(inspect.unwrap(function))
        if step.opname == "STORE_ATTR"
    )


def _hosts(kinds: tuple[type[Any], ...]) -> list[type[Any]]:
    """Libraries' classes, and those below the mixin: what a host gathers in compute_loss is for its log."""
    names = [kind.__name__ for kind in kinds]
    below = names.index("DPTrainerMixin") if "DPTrainerMixin" in names else len(names)
    return [
        kind
        for place, kind in enumerate(kinds)
        if place > below or kind.__module__.partition(".")[0] in HOSTS
    ]


def _numbers(value: Any, depth: int = _DEPTH) -> Any:
    """A copy of the numbers in a value; None where there are none."""
    if isinstance(value, Tensor):
        return [flat.clone() for _, flat in numbers_of("", value)]
    if isinstance(value, np.ndarray | np.generic):
        return value.copy()
    if isinstance(value, int | float | complex):
        return value
    if depth == 0 or not isinstance(value, Mapping | list | tuple | deque):
        return None
    items = list(value.values()) if isinstance(value, Mapping) else value
    ends = [*itertools.islice(items, _FEW), *itertools.islice(reversed(items), _FEW)]
    return [len(items), *(_numbers(item, depth - 1) for item in ends)]


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and same_item(one, other)
