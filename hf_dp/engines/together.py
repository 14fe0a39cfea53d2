"""Small layers that are alike, answered for together, as if their examples were one batch.

What a small layer costs is calls, not arithmetic: its norm and its sum are a dozen kernels of a few
microseconds each. Twelve such layers, put one after the other along the axis of units, cost as many
kernels as one. To put them so takes a copy, which pays only while the tensors are small.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_dp.engines.coverage import TapPoint
from hf_dp.engines.tap import Call
from hf_dp.layers.base import FIRST, LayerRule
from hf_dp.layers.factors import Factor, Mat, wide
from hf_dp.layers.linear import linear, transposed_linear
from hf_dp.layers.norm import epsilon_of, layer_norm, rms_norm, rms_norm_offset
from hf_dp.layers.scaled import weights_of

SMALL = 2**15
"""Numbers in a call's input, and in its output, up to which the call waits for others like it."""
AT_ONCE = 2**18
"""Numbers of inputs, or outputs, that are put together at most."""


def _nothing(module: nn.Module, inputs: Tensor) -> Hashable:
    return None


def _of_layer_norm(module: nn.Module, inputs: Tensor) -> Hashable:
    return module.normalized_shape, module.eps


def _of_rms_norm(module: nn.Module, inputs: Tensor) -> Hashable:
    return type(module), epsilon_of(module, inputs.dtype)


# Beside shapes, what these rules use of a module: two modules that agree in it are alike.
_SETTINGS: Mapping[LayerRule, Callable[[nn.Module, Tensor], Hashable]] = {
    linear: _nothing,
    transposed_linear: _nothing,
    layer_norm: _of_layer_norm,
    rms_norm: _of_rms_norm,
    rms_norm_offset: _of_rms_norm,
}


@dataclass(frozen=True)
class Alike:
    """Calls of modules that are alike, at most as many as are put together.

    Attributes:
        point: That of the first.
        inputs: Those of all calls, one call after the other, ``(k * B, ...)``.
        output_grads: Likewise.
        parameters: For each trainable parameter of the first, those of all calls.
    """

    point: TapPoint
    inputs: Tensor
    output_grads: Tensor
    parameters: Mapping[int, Sequence[nn.Parameter]]


class Waiting:
    """Calls that wait for others like them until the backward pass is over."""

    def __init__(self, uses: Mapping[int, int]) -> None:
        """Take calls of parameters that were used once, says `uses` (id -> how often, or nothing)."""
        self._uses = uses
        self._calls: dict[Hashable, list[Call]] = defaultdict(list)

    def takes(self, call: Call) -> bool:
        """Whether `call` is kept here."""
        point, context = call.point, call.context
        settings = _SETTINGS.get(point.rule) if point.rule is not None else None
        if settings is None or context is not FIRST:
            return False
        inputs, [grads] = call.inputs[0], call.output_grads
        if grads is None or inputs.numel() > SMALL or grads.numel() > SMALL:
            return False
        parameters = point.parameters
        if any([self._uses.get(id(parameter)) != 1 for parameter in parameters]):
            return False
        names = point.own_names
        if len(names) != len(parameters):
            return False
        shapes = inputs.shape, grads.shape, inputs.dtype, grads.dtype, inputs.device
        self._calls[point.rule, settings(point.module, inputs), names, shapes].append(call)
        return True

    def alike(self) -> Iterator[Alike | Call]:
        """Groups of the calls that were taken, each handed out once; a call without its like alone."""
        while self._calls:
            _, calls = self._calls.popitem()
            largest = max(calls[0].inputs[0].numel(), calls[0].output_grads[0].numel(), 1)  # type: ignore[union-attr]
            count = max(1, AT_ONCE // largest)
            while calls:
                group, calls = calls[:count], calls[count:]
                yield _put_together(group) if len(group) > 1 else group[0]


def _put_together(calls: Sequence[Call]) -> Alike:
    names = calls[0].point.own_names
    modules = [call.point.module for call in calls]
    parameters = {}
    for name in names:
        held = [module._parameters[name] for module in modules]
        parameters[id(held[0])] = [parameter for parameter in held if parameter is not None]
    return Alike(
        calls[0].point,
        torch.cat([call.inputs[0] for call in calls]),
        torch.cat([call.output_grads[0] for call in calls]),  # type: ignore[misc]
        parameters,
    )


@dataclass(frozen=True)
class Group:
    """One factor of ``k * B`` units for k parameters of the same shape, B units each.

    Attributes:
        names: The parameters.
        factor: Their gradients, one parameter's units after the other's.
    """

    names: Sequence[str]
    factor: Factor

    def factors(self) -> Iterator[tuple[str, Factor]]:
        """Each parameter's factor alone."""
        written = self.factor.written()
        numbers = written.values if written is not None else self.factor.left  # type: ignore[attr-defined]
        units = torch.arange(len(numbers), device=numbers.device).view(len(self.names), -1)
        for name, mine in zip(self.names, units, strict=True):
            yield name, self.factor.select(mine)

    def weighted_sums(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``sum_i weights[i] * gradient_i`` for each parameter; weights are ``(B,)`` by name."""
        each = [weights[name] for name in self.names]
        alike = all(other is each[0] for other in each)
        mine = each[0].expand(len(each), -1) if alike else torch.stack(each)  # (k, B)
        written, factor = self.factor.written(), self.factor
        if written is not None:
            values = written.values
            rows = values.reshape(*mine.shape, -1)  # (k, B, n)
            summed = torch.bmm(mine.to(values.dtype)[:, None], rows)
            summed = summed.view(len(mine), *values.shape[1:])
        else:
            assert isinstance(factor, Mat)
            left, right = wide(factor.left), wide(factor.right)
            scale = weights_of(left, mine.flatten())
            if left.shape[-1] < right.shape[-1]:
                left = left * scale
            else:
                right = right * scale
            left, right = (side.reshape(len(mine), -1, side.shape[-1]) for side in (left, right))
            summed = torch.bmm(left.mT, right)
        return dict(zip(self.names, summed.unbind(), strict=True))
