"""Whether a forward pass may have arranged rows by what they hold, read off its graph.

Taps know where examples are from the first ones. That stays so unless an operation between taps puts rows
elsewhere: by a mask, by indices, sorted, cut and joined along the examples' axis at places that a loop
found, or multiplied by a matrix of ones and zeros. Whatever moves gradients' rows stands in the graph,
however it was called; what is computed without gradients, or inside a module that is run again for each
example, does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from hf_dp.engines.moving import Shape, Sized, arranges, hides_units, is_moving, shapes_of, turned
from hf_dp.layers.base import UnitAxis

# Which of these a reshape becomes depends on strides and on who is looking.
_RESHAPING = frozenset(
    {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "CloneBackward0"}
)

_KINDS: dict[type, bool] = {}  # kind of node -> whether it may put rows elsewhere

Kinds = tuple[frozenset[type], tuple[tuple[int, ...], ...]]


class Graph:
    """What a walk from the losses to the first taps met.

    Attributes:
        num_units: B.
        kinds: The kinds of nodes, outside modules that are run again for each example, and how axes
            of examples were turned: what a proof for one graph says of another one depends on it.
        by_content: Whether rows may have been arranged by what they hold.
    """

    def __init__(self, losses: Tensor, num_units: int, twin: Graph | None = None) -> None:
        """Walk the graph of `losses`, ``(B,)``.

        Args:
            losses: With their graph.
            num_units: B.
            twin: The same model's, of another number of examples. It shows which axes grow with the
                batch, and which are only as long by coincidence.
        """
        self.num_units = num_units
        seen = set()
        moving: list[Any] = []
        hiding: list[Any] = []
        for node in _nodes(losses):
            kind = type(node)
            seen.add(kind)
            if kind not in _KINDS:
                _KINDS[kind] = is_moving(kind)
            if _KINDS[kind]:
                moving.append(node)
            elif kind.__name__ in _RESHAPING and hides_units(node, num_units):
                hiding.append(node)
        self._order = [type(node) for node in moving]
        self._shapes = [shapes_of(node) for node in moving]
        self.by_content, turns = _broadcast(losses, hiding), []
        for node, tensors in zip(moving, self._sized(twin), strict=True):
            self.by_content = self.by_content or arranges(node, tensors)
            turn = turned(node, tensors)
            if turn is not None:
                turns.append(turn.order)
                self.by_content = self.by_content or turn.ambiguous
        named = frozenset(kind for kind in seen if kind.__name__ not in _RESHAPING)
        self.kinds: Kinds = (named, tuple(turns))

    def _sized(self, twin: Graph | None) -> Iterator[list[Sized | None]]:
        if twin is None or twin.num_units == self.num_units or twin._order != self._order:
            for shapes in self._shapes:
                yield [_sized(shape, self.num_units) for shape in shapes]
            return
        for shapes, others in zip(self._shapes, twin._shapes, strict=True):
            alike = len(others) == len(shapes)
            yield [
                _sized(shape, self.num_units, other, twin.num_units)
                for shape, other in zip(
                    shapes, others if alike else [None] * len(shapes), strict=True
                )
            ]


def _sized(
    shape: Shape | None, num_units: int, other: Shape | None = None, other_units: int = 0
) -> Sized | None:
    if shape is None:
        return None
    fits = other is not None and len(other) == len(shape)
    return Sized(shape, num_units, other if fits else None, other_units)


def _broadcast(losses: Tensor, hiding: list[Any]) -> bool:
    """Whether examples may meet because some of `hiding` have them off the first axis.

    A product of matrices does not repeat its operands; that is how an einsum is computed.
    """
    if not hiding:
        return False
    wanted = set(hiding)
    users = {type(node).__name__ for node in _nodes(losses) if wanted & set(_before(node))}
    return users != {"BmmBackward0"}


def _nodes(losses: Tensor) -> Iterator[Any]:
    start = losses.grad_fn
    seen, waiting = {start}, [start]
    while waiting:
        node: Any = waiting.pop()
        if node is None:
            continue
        yield node
        for after in _before(node):
            if after not in seen:
                seen.add(after)
                waiting.append(after)


def _before(node: Any) -> list[Any]:
    noted = getattr(node, "noted", None)
    if noted is not None and not isinstance(noted[2], UnitAxis):
        return list(node.given)  # over what is inside the module
    return [after for after, _ in node.next_functions]
