"""Proof that a loss function from elsewhere takes each example's loss from its own row of the outputs.

That is seen in the gradients of the model's outputs, at the cost of a backward pass through the loss alone.
The model itself may then be judged by where it comes from and by its graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from hf_dp.engines.attribution import compare
from hf_dp.engines.coverage import TapPoint
from hf_dp.engines.rows import tensors_in
from hf_dp.engines.tap import Call
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.base import FIRST


@dataclass(frozen=True)
class ModelCall:
    """What a model was called with, as ``(args, kwargs)``, and what it gave."""

    arguments: object
    output: object
    versions: list[int]

    @classmethod
    def now(cls, arguments: object, output: object) -> ModelCall:
        """With the versions that its tensors have."""
        return cls(arguments, output, _versions(arguments, output))

    @property
    def is_unchanged(self) -> bool:
        """Whether no tensor was changed in place since."""
        return self.versions == _versions(self.arguments, self.output)


class Calls:
    """What a model was called with, and gave, while it was watched.

    Attributes:
        model: The model.
        edges: Where its outputs are in the graph.
        made: The calls.
    """

    def __init__(self, model: nn.Module) -> None:
        """None was made yet."""
        self.model = model
        self.edges: list[GradientEdge] = []
        self.made: list[ModelCall] = []

    def note(self, module: nn.Module, args: object, kwargs: object, output: object) -> None:
        """A forward hook."""
        tensors = tensors_in(output)
        self.edges += [get_gradient_edge(t) for t in tensors if t.grad_fn is not None]
        self.made.append(ModelCall.now((args, kwargs), output))

    def unchanged(self) -> list[ModelCall]:
        """The calls; none if what was taken or given was changed in place."""
        return self.made if all(call.is_unchanged for call in self.made) else []

    def prove(self, losses: Tensor) -> bool:
        """Whether all that `losses`, ``(B,)``, depend on is each one's own row of the outputs."""
        edges = self._between(losses)
        if not edges:
            return False
        point = TapPoint("", self.model, None, ())

        def backward(weighted: Tensor, on_call: Callable[[Call], None]) -> None:
            grads: Sequence[Tensor | None] = torch.autograd.grad(
                weighted.sum(), edges, retain_graph=True, allow_unused=True
            )
            for key, grad in enumerate(grads):
                if grad is None:
                    continue
                if grad.dim() == 0 or len(grad) != len(losses):
                    raise UncoveredParameterError("an output without an axis of examples")
                real = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
                on_call(Call(point, (), (real,), FIRST, key))

        with contextlib.suppress(UncoveredParameterError):
            return compare(backward, losses, hidden=False)
        return False

    def _between(self, losses: Tensor) -> list[GradientEdge]:
        """Outputs, none made from another, through which all of the graph of `losses` leads; or none."""
        ends = {edge.node for edge in self.edges}
        reached, beyond = _walk([losses.grad_fn], ends)
        if beyond or (len(reached) > 1 and _walk(_before(reached), reached)[0]):
            return []
        return [edge for edge in self.edges if edge.node in reached]


def _versions(*of: object) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors_in(of)]


def _walk(start: Iterable[Node | None], ends: Set[Node]) -> tuple[set[Node], bool]:
    """Which of `ends` the graph leads to first, and whether it has other ends: parameters, an anchor."""
    seen: set[Node] = set()
    reached: set[Node] = set()
    waiting, beyond = list(start), False
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in ends:
            reached.add(node)
            continue
        beyond = beyond or not node.next_functions
        waiting += _before([node])
    return reached, beyond


def _before(nodes: Iterable[Node]) -> list[Node | None]:
    return [after for node in nodes for after, _ in node.next_functions]


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[Calls]:
    """Note what `model` is called with, and gives, within the context."""
    calls = Calls(model)
    handle = model.register_forward_hook(calls.note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
