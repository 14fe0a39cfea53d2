"""Which modules are tapped, by which rule, for which parameters; and how a parameter moves up.

A parameter starts at the module that owns it, with that module's formula if there is one. If that turns
out not to do (it is used elsewhere, or the module's tensors have no axis of examples) it climbs: to the
generic rule on the same module, then to the module above, and so on up to the model itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from hf_dp.engines.base import trainable_parameters
from hf_dp.engines.by_content import Kinds, Twins
from hf_dp.engines.familiar import foreign_code
from hf_dp.engines.made_of import State, made_of, state_of
from hf_dp.engines.sharded import unsharded, whole_parameter
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.adapted_experts import is_wrapper
from hf_dp.layers.base import LayerRule, LayerRules, UnitAxis
from hf_dp.layers.embedding import relative_bias
from hf_dp.layers.generic import GenericRule
from hf_dp.layers.recognise import (
    ANY_LEADING_AXES,
    CONDITIONS,
    is_on_probation,
    is_relative_bias_owner,
    recognise,
)
from hf_dp.layers.recognise_experts import keeps_tokens_apart

Source = tuple[str, int]
"""A number of positions that a pass shows: name of a batch's tensor or a module, and which axis."""


@dataclass(frozen=True)
class Layout:
    """Where one kind of call of a tapped module has its examples.

    Attributes:
        inputs: One axis for each leaf of the arguments; None for what was no tensor.
        outputs: The same for the output.
        folds: For each folded leaf (inputs, then outputs) how many of its axes, folded ones included,
            are positions, and the numbers of positions that this product must equal.
    """

    inputs: tuple[UnitAxis | None, ...]
    outputs: tuple[UnitAxis | None, ...]
    folds: Mapping[int, frozenset[tuple[int, Source]]] = field(default_factory=dict, hash=False)

    @cached_property
    def shared(self) -> bool:
        """Whether the call serves all units at once."""
        return all(axis is None or axis.dim is None for axis in self.inputs)


@dataclass(frozen=True, eq=False)
class TapPoint:
    """One place where gradients are seen.

    Attributes:
        name: The module's name in the model.
        module: The tapped module.
        rule: The formula for its calls; None for the generic rule.
        parameters: The trainable parameters it answers for.
        method: The method whose output is tapped; "forward" for the module itself.
        generic: The generic rule, where `rule` is None.
    """

    name: str
    module: nn.Module
    rule: LayerRule | None
    parameters: tuple[nn.Parameter, ...]
    method: str = "forward"
    generic: GenericRule | None = None

    @property
    def described(self) -> str:
        """Name and type, for messages."""
        return f"module {self.name!r} ({type(self.module).__qualname__})"

    @cached_property
    def own_names(self) -> tuple[str, ...]:
        """What the module itself calls those of the parameters that it owns."""
        wanted = set(map(id, self.parameters))
        return tuple(name for name, p in self.module._parameters.items() if id(p) in wanted)

    def sole_input(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The one tensor that the module was called with, on which its rule's formula rests."""
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].dim():
            return args[0]
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        if len(given) != 1 or not isinstance(given[0], Tensor) or given[0].dim() == 0:
            raise NotTappableError(
                self,
                f"{self.described} was called with {len(given)} arguments: expected one tensor. Its "
                "layer rule does not know what the others do to the gradient. "
                "Use engine='sequential', or freeze it.",
            )
        return given[0]


class NotTappableError(UncoveredParameterError):
    """A tap cannot tell the examples apart at its point."""

    def __init__(self, point: TapPoint, message: str) -> None:
        """Say what is wrong with `point`."""
        super().__init__(message)
        self.point = point


class LayoutUnknownError(NotTappableError):
    """A call of a kind that was not seen before, or no longer as it was."""


@dataclass
class Coverage:
    """The tap points of a model and what they leave uncovered.

    Attributes:
        model: The model.
        parameters: Name -> trainable parameter.
        points: The tap points.
        uncovered: Name of each trainable parameter that no tap can answer for -> why.
        axes: Module name -> kind of call -> where it has the examples; None until established.
        settled: Whether uses outside the taps were looked for.
        proved: The kinds of graphs in which rows were seen to be the examples' own.
        twins: Pairs of graphs of few examples, which show what grows with the batch.
        untold: Whether a graph came up that none of them is like.
        looks: How often such a pair was sought.
        made_of: The modules, their classes, and the methods of both.
        foreign: What of the model's code is not that of known libraries; empty if all is.
        apart: Modules that are known to keep tokens apart, wherever they send them inside.
        compared: The losses, by their code, the modules' modes and the batch's columns, with which examples
            among others were compared with the same alone.
        refused: Those with which they differed, and what was said then.
        whole: Those for which taps saw all of each gradient.
        called: Modules that losses call beside the model: parts of it.
        tried: The modules whose rules rest on what they were set to, and what that was.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    points: list[TapPoint]
    uncovered: dict[str, str] = field(default_factory=dict)
    axes: dict[str, dict[Hashable, Layout]] | None = None
    settled: bool = False
    proved: set[Kinds] = field(default_factory=set)
    twins: list[Twins] = field(default_factory=list)
    untold: bool = False
    looks: int = 0
    foreign: str = ""
    apart: Sequence[nn.Module] = ()
    compared: set[Hashable] = field(default_factory=set)
    refused: dict[Hashable, str] = field(default_factory=dict)
    whole: set[Hashable] = field(default_factory=set)
    called: set[nn.Module] = field(default_factory=set)
    made_of: tuple[list[Any], ...] = field(init=False)
    tried: list[tuple[nn.Module, State]] = field(init=False)

    def __post_init__(self) -> None:
        """Note what the rules were chosen for."""
        self.made_of = made_of(self.model)
        self.tried = [(p.module, state_of(p.module)) for p in self.points if rests_on_state(p)]

    def fits(self, model: nn.Module) -> bool:
        """Whether the model still trains the same parameters, by the same modules, methods and settings."""
        now = trainable_parameters(model)
        same = now.keys() == self.parameters.keys() and all(
            now[name] is p for name, p in self.parameters.items()
        )
        same = same and self.made_of == made_of(model)
        return same and all(state_of(module) == state for module, state in self.tried)

    @property
    def flags(self) -> tuple[bool, ...]:
        """Which modules are in training mode: a head may be while the body is not."""
        return tuple(module.training for module in self.made_of[0])

    @property
    def counts(self) -> bool:
        """Whether some tensor's rows must be counted against the positions of others."""
        kinds = (self.axes or {}).values()
        return any(layout.folds for layouts in kinds for layout in layouts.values())

    def layouts(self, point: TapPoint) -> Mapping[Hashable, Layout]:
        """What is known of the calls of `point`."""
        return (self.axes or {}).get(point.name, {}) if point.method == "forward" else {}

    def names_of(self, parameters: Iterable[nn.Parameter]) -> list[str]:
        """The parameters' names."""
        wanted = set(map(id, parameters))
        return [name for name, p in self.parameters.items() if id(p) in wanted]

    def climb(self, point: TapPoint, why: str) -> None:
        """Answer for the parameters of `point` from further up.

        Raises:
            UncoveredParameterError: There is nothing further up.
        """
        self.points.remove(point)
        same_module = point.rule is not None and point.method == "forward"
        place = point.name if same_module else self._above(point.name)
        self._answer_at(place, point.parameters, why)

    def climb_outside(self, parameter: nn.Parameter, why: str) -> None:
        """Answer for a parameter that was used outside the modules that answer for it.

        Raises:
            UncoveredParameterError: There is nothing further up.
        """
        owners = [
            name
            for name, module in self.model.named_modules()
            if any(whole_parameter(p) is parameter for p in module.parameters(recurse=False))
        ]
        points = [point for point in self.points if any(p is parameter for p in point.parameters)]
        missing = {self._called(name) for name in owners if not _under(name, points)}
        if missing:  # tied weights: some owners may have a tap already
            for place in missing:
                self._answer_at(place, (parameter,), why)
            return
        for point in points:
            self._leave(point, [parameter])
        for point in points:
            above = self._above(point.name) if point.method == "forward" else point.name
            self._answer_at(above, (parameter,), why)

    def _leave(self, point: TapPoint, parameters: Sequence[nn.Parameter]) -> None:
        left = tuple(p for p in point.parameters if not any(p is q for q in parameters))
        index = self.points.index(point)
        self.points[index : index + 1] = [replace(point, parameters=left)] if left else []

    def _answer_at(self, place: str | None, parameters: Sequence[nn.Parameter], why: str) -> None:
        if place is None:
            names = self.names_of(parameters)
            self.uncovered |= dict.fromkeys(names, why)
            raise UncoveredParameterError(
                f"{why} No module above it, up to the model, can be told apart by example either: "
                f"parameters {names} are not covered. Use engine='sequential', freeze them, or add a "
                "rule for the module that uses them."
            )
        inside = [p for p in self.points if not place or (p.name + ".").startswith(place + ".")]
        answered = {id(p): p for p in parameters}
        for point in inside:
            here = point.name == place and point.method == "forward"
            if here:
                answered |= {id(p): p for p in point.parameters}
                self.points.remove(point)
            else:
                self._leave(point, list(answered.values()))
        module = self.model.get_submodule(place)
        both = tuple(answered.values())
        self.points.append(TapPoint(place, module, None, both, generic=GenericRule(module)))
        self.axes = None  # other taps hand other shapes on

    def _above(self, name: str) -> str | None:
        return self._called(name.rpartition(".")[0]) if name else None

    def _called(self, name: str) -> str | None:
        """`name`, or the first module above it that is called at all, and by itself does what it does.

        What PEFT's wrappers for parameters hold does not: they adapt it for the time of their own call.
        """
        parts = name.split(".")
        for above in (".".join(parts[:size]) for size in range(1, len(parts))):
            if is_wrapper(self.model.get_submodule(above)):
                return above
        while _is_container(self.model.get_submodule(name)):
            if not name:
                return None
            name = name.rpartition(".")[0]
        return name


def rests_on_state(point: TapPoint) -> bool:
    """Whether another setting of the module, say a scale, may ask for another rule."""
    return point.rule in CONDITIONS or is_on_probation(point.module, point.rule)


def _under(name: str, points: Iterable[TapPoint]) -> bool:
    """Whether one of the points answers for parameters that the module `name` owns."""
    if any(p.method != "forward" and name == f"{p.name}.relative_attention_bias" for p in points):
        return True
    reached = [p.name for p in points if p.method == "forward"]
    return any(not above or (name + ".").startswith(above + ".") for above in reached)


def _is_container(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward and "forward" not in vars(module)


def coverage_of(model: nn.Module, layer_rules: LayerRules) -> Coverage:
    """Tap every module with a formula; what they leave out is settled by running the model.

    A parameter that no tap answers for keeps ``requires_grad`` on, so a use of it shows in the graph.
    """
    parameters = trainable_parameters(model)
    points = list(_tap_points(model, layer_rules))
    foreign = foreign_code(model)
    apart = [m for m in model.modules() if not foreign and keeps_tokens_apart(m)]
    return Coverage(model, parameters, points, foreign=foreign, apart=apart)


def takes_folded(point: TapPoint) -> bool:
    """Whether inputs may have further axes between the units and the width."""
    return point.rule is None or point.rule in ANY_LEADING_AXES


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
        with unsharded(model, name):
            rule = recognise(module, layer_rules)
        if rule is not None:
            yield TapPoint(name, module, rule, parameters)


def _own_trainable(module: nn.Module) -> tuple[nn.Parameter, ...]:
    own = module.parameters(recurse=False)
    return tuple(whole_parameter(p) for p in own if p.requires_grad)
