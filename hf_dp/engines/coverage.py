"""Which modules are tapped, by which rule, and which trainable parameters no rule covers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn

from hf_dp.engines.base import trainable_parameters
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.base import LayerRule, LayerRules
from hf_dp.layers.embedding import relative_bias
from hf_dp.layers.recognise import is_relative_bias_owner, recognise


class UnitAxis(Enum):
    """Where a tapped module's input has the examples."""

    FIRST = "first"
    SHARED = "shared"  # one row for all examples, as for position ids


@dataclass(frozen=True)
class TapPoint:
    """One place where gradients are seen.

    Attributes:
        name: The module's name in the model.
        module: The tapped module.
        rule: What its calls add to its parameters' gradients.
        parameters: The trainable parameters it answers for.
        method: The method whose output is tapped; "forward" for the module itself.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    parameters: tuple[nn.Parameter, ...]
    method: str = "forward"

    def sole_input(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The one tensor that the module was called with, on which its rule's formula rests."""
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        if len(given) != 1 or not isinstance(given[0], Tensor) or given[0].dim() == 0:
            raise UncoveredParameterError(
                f"module {self.name!r} ({type(self.module).__qualname__}) was called with {len(given)} "
                "arguments: expected one tensor. Its layer rule does not know what the others do to the "
                "gradient. Use engine='sequential', or freeze it."
            )
        return given[0]


@dataclass
class Coverage:
    """The tap points of a model and what they leave uncovered.

    Attributes:
        parameters: Name -> trainable parameter.
        points: The tap points.
        uncovered: Name of each trainable parameter without a rule -> why.
        axes: Where each tapped module has its examples; None until that was established.
    """

    parameters: dict[str, nn.Parameter]
    points: list[TapPoint]
    uncovered: dict[str, str]
    axes: dict[str, UnitAxis] | None = None

    def fits(self, model: nn.Module) -> bool:
        """Whether the model still trains the same parameters."""
        now = trainable_parameters(model)
        return now.keys() == self.parameters.keys() and all(
            now[name] is p for name, p in self.parameters.items()
        )


def coverage_of(model: nn.Module, layer_rules: LayerRules) -> Coverage:
    """Look every module up; a parameter is covered if some module that owns it has a rule.

    A module without a rule is not tapped, so if its forward uses a parameter that another module
    covers, the use shows in the graph and the engine refuses it.
    """
    parameters = trainable_parameters(model)
    points = list(_tap_points(model, layer_rules))
    covered = {id(p) for point in points for p in point.parameters}
    owners = _owners(model)
    uncovered = {
        name: f"owned by {owners[id(p)]}, for which there is no layer rule"
        for name, p in parameters.items()
        if id(p) not in covered
    }
    return Coverage(parameters=parameters, points=points, uncovered=uncovered)


def _tap_points(model: nn.Module, layer_rules: LayerRules) -> Iterator[TapPoint]:
    tapped_by_parent: set[int] = set()
    for name, module in model.named_modules():
        if is_relative_bias_owner(module):
            table = module.get_submodule("relative_attention_bias")
            tapped_by_parent.add(id(table))
            parameters = _own_trainable(table)
            if parameters:
                yield TapPoint(name, module, relative_bias, parameters, method="compute_bias")
        parameters = _own_trainable(module)
        if not parameters or id(module) in tapped_by_parent:
            continue
        rule = recognise(module, layer_rules)
        if rule is not None:
            yield TapPoint(name, module, rule, parameters)


def _own_trainable(module: nn.Module) -> tuple[nn.Parameter, ...]:
    return tuple(p for p in module.parameters(recurse=False) if p.requires_grad)


def _owners(model: nn.Module) -> dict[int, str]:
    return {
        id(p): f"{name or 'the model'} ({type(module).__module__}.{type(module).__qualname__})"
        for name, module in model.named_modules()
        for p in module.parameters(recurse=False)
    }
