"""Whether an example's loss and gradient are its own: whatever its batch mates, however it is padded.

A loss or a gradient that depends on other rows (statistics over the batch, in-batch negatives, a mean
over all tokens, a router's balance) is not bounded by clipping that example. Plain autograd is used,
so that no engine vouches for itself.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.engines.base import ExampleLoss, checked_losses, trainable_parameters
from hf_dp.engines.reentrant import reentrant_refused
from hf_dp.engines.rows import batch_size, row, tensors_in
from hf_dp.engines.sharded import is_sharded
from hf_dp.errors import ConfigurationError, explain
from hf_dp.layers.factors import dense, wide

Batch = Mapping[str, Any]

_TINY = torch.finfo(torch.float32).tiny
FAINT = 0.1
"""Of the longest gradient: shorter ones count as that long, for they may be nothing but rounding.

A query that sees one key has none, so where only queries are trained, a text of two tokens has none.
"""

_WHY = "Otherwise one example changes the gradients of others, and what it moves in the sum is not bounded."


def check_coupling(
    model: nn.Module,
    together: Batch,
    alone: Sequence[Batch],
    *,
    example_loss: ExampleLoss,
    tolerance: float,
) -> None:
    """Compare each example among others with the same example alone.

    Args:
        model: As it will be trained, but without what draws at random.
        together: The examples as one batch, padded to one length.
        alone: Each of them as a batch of one, without padding.
        example_loss: One loss per example.
        tolerance: Relative, of losses and of gradients.

    Raises:
        ConfigurationError: They differ; the message names the module that makes the difference.
    """
    parameters = list(trainable_parameters(model).values())
    losses = checked_losses(example_loss(model, together), batch_size(together))
    found: list[tuple[bool, float, float]] = []
    for index, one in enumerate(alone):
        loss = checked_losses(example_loss(model, one), 1)
        same = _close(losses[index : index + 1], loss, tolerance)
        found.append((same, *gradient_gap(losses[index], loss, parameters)))
    numbers = bool(losses.isfinite().all())
    longest = max((size for *_, size in found if math.isfinite(size)), default=0.0)

    def are_close(gap: float, size: float) -> bool:
        if not math.isfinite(size) or not (numbers or math.isfinite(gap)):
            return (
                True  # the engine drops it, or what makes it nan by plain autograd, zero times nan
            )
        return gap <= tolerance**2 * max(size, FAINT**2 * longest, _TINY)

    for index, (same, *gap) in enumerate(found):
        if not (same and are_close(*gap)):
            padded = row(together, index)
            among = checked_losses(example_loss(model, padded), 1)
            mates = not (
                _close(losses[index : index + 1], among, tolerance)
                and are_close(*gradient_gap(losses[index], among, parameters))
            )
            with torch.no_grad():
                seen = _flow(model, padded if mates else alone[index], 0, example_loss)
                other = _flow(model, together, index, example_loss)
            raise _refusal(_first_difference(model, seen, other, tolerance), mates)


def mates_refusal(
    model: nn.Module, inputs: Batch, index: int, example_loss: ExampleLoss, tolerance: float
) -> ConfigurationError:
    """What to say of a loss in which the example at `index` showed its batch mates."""
    if is_sharded(model):  # every rank would have to look for it alike
        return _refusal(Suspect(None), mates=True)
    with torch.no_grad():
        seen = _flow(model, row(inputs, index), 0, example_loss)
        other = _flow(model, inputs, index, example_loss)
    return _refusal(_first_difference(model, seen, other, tolerance), mates=True)


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return torch.allclose(
        wide(found), wide(expected), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def gradient_gap(
    loss: Tensor, other: Tensor, parameters: list[nn.Parameter]
) -> tuple[float, float]:
    """Squares: of the length of the gradients' difference, and of that of the other's gradient."""
    found, expected = _gradients(loss, parameters), _gradients(other.sum(), parameters)
    gap, size = 0.0, 0.0
    for a, b in zip(found, expected, strict=True):
        if a is not None or b is not None:
            left = torch.zeros_like(dense(b)) if a is None and b is not None else dense(_given(a))
            right = torch.zeros_like(left) if b is None else dense(b)
            gap += float((left - right).square().sum())
            size += float(right.square().sum())
    return gap, size


def _given(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad:
        return (None,) * len(parameters)
    with reentrant_refused():
        return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)


# ---- where it comes from -------------------------------------------------------------------------


@dataclass(frozen=True)
class Suspect:
    """The first place where an example's numbers differ.

    Attributes:
        name: The module's name in the model, "" for the model itself; None if it is the loss.
        kind: The module's class.
        enters: Whether its input differs already, so that the code that calls it is at fault.
    """

    name: str | None
    kind: str = ""
    enters: bool = False


Flow = dict[tuple[str, bool, int], Tensor]
"""(module, whether it is an input, how many came before) -> the example's row."""


def _first_difference(model: nn.Module, seen: Flow, other: Flow, tolerance: float) -> Suspect:
    kinds = {name: type(module).__qualname__ for name, module in model.named_modules()}
    for key, value in seen.items():
        if key in other and not _alike(value, other[key], tolerance):
            return Suspect(key[0], kinds[key[0]], enters=key[1])
    return Suspect(None)


def _flow(model: nn.Module, inputs: Batch, index: int, example_loss: ExampleLoss) -> Flow:
    """What goes through the modules for one row, in the order in which it does."""
    flow: Flow = {}
    size = batch_size(inputs)
    counts: Counter[tuple[str, bool]] = Counter()

    def note(name: str, enters: bool) -> Callable[..., None]:
        def hook(_: nn.Module, *seen: Any) -> None:
            for value in tensors_in(seen[-1]):
                counts[name, enters] += 1
                if value.dim() > 0 and value.shape[0] == size and value.is_floating_point():
                    flow[name, enters, counts[name, enters]] = value[index].detach().clone()

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            stack.enter_context(module.register_forward_pre_hook(note(name, True)))
            stack.enter_context(module.register_forward_hook(note(name, False)))
        example_loss(model, inputs)
    return flow


def _alike(value: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether they agree where both are there: padding makes the one longer at its end."""
    if value.dim() != other.dim():
        return False
    shared = tuple(slice(min(a, b)) for a, b in zip(value.shape, other.shape, strict=True))
    left, right = wide(value[shared]), wide(other[shared])
    gap, size = (left - right).abs().max(), right.abs().max()
    return not bool(gap > tolerance * size.clamp_min(1e-3)) if left.numel() else True


def _refusal(suspect: Suspect, mates: bool) -> ConfigurationError:
    what = "batch mates" if mates else "padding"
    if suspect.name is None:
        field, value = "example_loss", "loss"
        expected = f"the loss of each example, and its gradient, not to depend on its {what}"
        remedy = "Reduce over each example's own positions only, by its own attention_mask."
    else:
        field, value = f"model.{suspect.name}".rstrip("."), suspect.kind
        where = "a layer whose input" if suspect.enters else "a layer whose output"
        expected = f"{where} for an example does not depend on its {what}"
        remedy = "Replace it by one that looks at each example alone, or switch the option off that adds it."
        if suspect.enters:
            remedy = "Mend the code that calls it, or use per_device_train_batch_size=1."
    return ConfigurationError(explain(field, value, expected, _WHY, remedy))
