"""The rule for tables whose forward does more than look up: scaled, offset, or with ids made inside.

The forward is run again with the looked-up rows as the variable, so whatever it does before and after
the lookup is differentiated by autograd, and the table's gradient stays one row per position.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.factors import OneHot, wide
from hf_dp.layers.randomness import kept_randomness
from hf_dp.layers.repeats import UnrepeatedError
from hf_dp.layers.whole import WholeCall

# Relative to a unit's largest number: rounding in float32, and below it.
_CLOSE, _COARSE = 1e-5, 3e-2
_PASSES = 2  # one misses a row of another unit as often as two weights are alike
_ASKING = (Tensor.dim, Tensor.size, Tensor.is_floating_point)
_ATTRIBUTES = (Tensor.dtype, Tensor.device, Tensor.shape)


def lookup_of(module: nn.Module) -> Callable[[WholeCall], list[OneHot]] | None:
    """The rule for `module` if it is a table with a changed forward; else None."""
    fits = (
        isinstance(module, nn.Embedding)
        and set(dict(module.named_parameters())) == {"weight"}
        and module.max_norm is None
        and not module.scale_grad_by_freq
    )
    return (lambda call: [lookup(call)]) if fits else None


class _Lookups(TorchFunctionMode):
    """Hands out the rows of one table as variables; any other use of the table is refused."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table
        self.found: list[tuple[Tensor, Tensor, int | None]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.embedding and _argument(args, given, 1, "weight") is self.table:
            ids = _argument(args, given, 0, "input")
            padding = _argument(args, given, 2, "padding_idx")
            rows = F.embedding(ids, self.table.detach()).requires_grad_()
            self.found.append((ids, rows, padding))
            return rows
        leaves = tree_leaves((args, given))
        if any(leaf is self.table for leaf in leaves) and not _asks_only(func):
            raise UncoveredParameterError(
                "a table that is used otherwise than by looking rows up: expected lookups alone. Its "
                "other gradient would be lost. Use engine='sequential'."
            )
        return func(*args, **given)


def _asks_only(func: Callable[..., Any]) -> bool:
    """Whether `func` reads what a tensor is, such as its dtype, and not its numbers."""
    return func in _ASKING or getattr(func, "__self__", None) in _ATTRIBUTES


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def lookup(call: WholeCall) -> OneHot:
    """The table's gradients: row ``ids[b, t]`` gets what flows to where it was looked up.

    Raises:
        UncoveredParameterError: The table is used otherwise, or the ids have no axis of units.
        UnrepeatedError: A row's gradient depends on another unit's loss.
    """
    table = call.parameters[0].detach()
    lookups = _Lookups(table)
    ids: list[Tensor] = []

    def grads_of(outputs: list[Tensor]) -> list[Tensor]:
        grads = _own_grads(call, outputs, [rows for _, rows, _ in lookups.found])
        kept = []
        for (looked_up, _, padding), grad in zip(lookups.found, grads, strict=True):
            if grad is None:
                continue
            if looked_up.dim() < 2 or looked_up.shape[0] != call.num_units:
                raise UncoveredParameterError(
                    f"ids of shape {tuple(looked_up.shape)}: expected {call.num_units} units on the first "
                    "axis. Without that axis one unit's gradient cannot be told from another's. "
                    "Use engine='sequential'."
                )
            ids.append(looked_up.flatten(1))
            grad = grad.flatten(1, -2)
            if padding is not None:
                grad = grad.masked_fill((ids[-1] == padding)[:, :, None], 0)
            kept.append(grad)
        return kept

    with torch.enable_grad(), kept_randomness(call.device):
        if call.drawn is not None:
            call.drawn[0].restore()
        with lookups:
            grads = call.run([table], call.arguments, grads_of)
    if not grads:
        raise UncoveredParameterError(
            f"{type(call.module).__qualname__}: expected its output to depend on rows of its table. "
            "Otherwise there is no lookup to differentiate. Use engine='sequential'."
        )
    return OneHot(torch.cat(ids, 1), torch.cat(grads, 1), table.shape[0])


def _own_grads(
    call: WholeCall, outputs: list[Tensor], rows: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The gradients of looked-up rows, if the units' secret weights show that each is its unit's own.

    A gradient is linear in the weights of the units' losses: with others, a unit's rows must come out
    as they were, times its own.
    """
    if call.num_units == 1:
        return call.grads_of(outputs, rows)
    generator = torch.Generator().manual_seed(secrets.randbits(63))
    tolerance = _COARSE if call.rounds else _CLOSE
    drawn = torch.rand(_PASSES, call.num_units, generator=generator)
    passes = [weights.to(call.device) for weights in torch.exp2(12 * drawn - 6)]
    scaled = [call.grads_of(outputs, rows, weights=weights) for weights in passes]
    grads = call.grads_of(outputs, rows)
    for weights, others in zip(passes, scaled, strict=True):
        for grad, other in zip(grads, others, strict=True):
            if grad is None or other is None or len(grad) != call.num_units:
                continue
            grad, other = wide(grad).flatten(1), wide(other).flatten(1)
            gap = (other / weights[:, None].to(other) - grad).abs()
            if bool((gap > tolerance * grad.abs().amax(1, keepdim=True)).any()):
                raise UnrepeatedError(type(call.module).__qualname__)
    return grads
