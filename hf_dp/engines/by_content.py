"""Whether a forward pass may have arranged rows by what they hold, read off its graph.

Taps know where examples are from the first ones. That stays so unless an operation between taps puts rows
elsewhere: by a mask, by indices, sorted, cut and joined along the examples' axis at places that a loop
found, or multiplied by a matrix of ones and zeros. Whatever moves gradients' rows stands in the graph,
however it was called, inside modules that are run again for each example, too. What is computed without
gradients does not matter, nor what fused experts do inside, of which it is known that they keep tokens
apart: a small twin showed it, and where they train, their outputs show it in every batch. The walk is for
code of known libraries (`familiar`): it judges node by node, and somebody's own code may hide a turn.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any

from torch import Tensor

from hf_dp.engines.arranging import arranges
from hf_dp.engines.moving import (
    Shape,
    Sized,
    is_moving,
    may_broadcast,
    meets,
    parts_units,
    shapes_of,
    turned,
)
from hf_dp.engines.reshapes import Growth, Reshape, growth, strays

# Which of these a reshape becomes depends on strides and on who is looking.
_RESHAPING = frozenset(
    {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "CloneBackward0"}
)

_WATCHING = "torch.autograd.graph"  # hooks on several gradients together, which cannot change them

Kinds = tuple[frozenset[type], tuple[tuple[tuple[int, ...], tuple[bool, ...]], ...]]
WaysAround = Mapping[Any, Sequence[Any]]
"""Node of a module's output -> nodes of all that it was given, where what is between keeps rows in place."""
Free = tuple[bool, ...] | None  # of each axis; None if that is not known


class _Role(Enum):
    """What nodes of a kind may do to rows."""

    MOVES = "puts them elsewhere"
    MEETS = "broadcasts"
    RESHAPES = "cuts them differently"
    STAYS = "nothing"


@functools.cache
def _role_of(kind: type) -> _Role:
    if is_moving(kind):
        return _Role.MOVES
    if may_broadcast(kind):
        return _Role.MEETS
    return _Role.RESHAPES if kind.__name__ in _RESHAPING else _Role.STAYS


class Graph:
    """What a walk from the losses to the first taps met.

    Attributes:
        num_units: B.
        kinds: The kinds of nodes, and how axes of examples were turned: what a proof for one graph says
            of another one depends on it.
        by_content: Whether rows may have been arranged by what they hold.
        known: Whether twins were there that show which axes grow.
    """

    def __init__(
        self,
        losses: Tensor,
        num_units: int,
        twins: Sequence[Twins] = (),
        around: WaysAround = MappingProxyType({}),
    ) -> None:
        """Walk the graph of `losses`, ``(B,)``.

        Args:
            losses: With their graph.
            num_units: B.
            twins: Pairs of graphs of the same model. One with the same nodes shows which axes grow with
                the batch; without it, any axis that is long enough may have the examples.
            around: What need not be looked into.
        """
        self.num_units = num_units
        seen = set()
        moving: list[Any] = []
        hiding: list[Any] = []
        straddling = False
        self._met: list[tuple[Shape, Shape]] = []  # what came out of a broadcast, and what went in
        self._reshaped: list[Reshape] = []
        nodes = list(_nodes(losses, around))
        for node in nodes:
            kind: type = type(node)
            seen.add(kind)
            role = _role_of(kind)
            if role is _Role.MOVES:
                moving.append(node)
            elif role is _Role.MEETS:
                self._met += _broadcasts(node)
            elif role is _Role.RESHAPES:
                self._reshaped += _reshapes(node)
                if (rows := parts_units(node, num_units)) is not None:
                    straddling = straddling or rows != 1
                    hiding += [node] if rows == 1 else []
        self._shapes = [shapes_of(node) for node in moving]
        self._form = (
            [type(node) for node in moving],
            [len(shapes) for shapes in self._shapes],
            [(len(out), len(given)) for out, given in self._met],
            [(len(given), len(out)) for given, out in self._reshaped],
        )
        self.known = False
        self.by_content, turns = straddling or _broadcast(nodes, hiding), []
        free, free_met, grows = self._free(twins)
        for node, shapes, frees in zip(moving, self._shapes, free, strict=True):
            tensors = [
                None if shape is None else Sized(shape, num_units, axes)
                for shape, axes in zip(shapes, frees, strict=True)
            ]
            self.by_content = self.by_content or arranges(node, tensors)
            turn = turned(node, tensors)
            if turn is not None:
                turns.append((turn.order, turn.single))
                self.by_content = self.by_content or turn.ambiguous
        for (out, given), (out_free, given_free) in zip(self._met, free_met, strict=True):
            came_out, went_in = Sized(out, num_units, out_free), Sized(given, num_units, given_free)
            self.by_content = self.by_content or meets(came_out, went_in)
        self.by_content = self.by_content or any(
            strays(*pair, num_units) for pair in zip(self._reshaped, grows, strict=False)
        )
        named = frozenset(kind for kind in seen if kind.__name__ not in _RESHAPING)
        self.kinds: Kinds = (named, tuple(turns))

    def _free(
        self, twins: Sequence[Twins]
    ) -> tuple[list[list[Free]], list[tuple[Free, Free]], list[Growth]]:
        """Of each tensor of each node that may move rows, and of each broadcast, its axes without units.

        And which axes of reshapes grow; of none without a twin, since any axis may then have units.
        """
        for pair in twins:
            if self.is_like(pair.few):
                self.known = True
                return pair.moved, pair.met, pair.reshaped
        self.known = not self._shapes and not self._met
        unknown: list[list[Free]] = [[None] * len(shapes) for shapes in self._shapes]
        return unknown, [(None, None)] * len(self._met), []

    def is_like(self, other: Graph) -> bool:
        """Whether both have the same nodes that may move rows, the same broadcasts and reshapes."""
        return self._form == other._form


@contextlib.contextmanager
def hooks_on_gradients() -> Iterator[list[None]]:
    """Note every hook that is put on a tensor's gradient: it may do anything, and is in no graph.

    Yields:
        A list with an entry for each.
    """
    found: list[None] = []
    original: Any = Tensor.register_hook

    def noted(self: Tensor, hook: Any) -> Any:
        if getattr(hook, "__module__", None) != _WATCHING:
            found.append(None)
        return original(self, hook)

    Tensor.register_hook = noted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Tensor.register_hook = original  # type: ignore[method-assign]


def _alike(one: Shape | None, other: Shape | None) -> Free:
    """Which axes are as long in both."""
    if one is None or other is None or len(one) != len(other):
        return None
    return tuple(a == b for a, b in zip(one, other, strict=True))


def _reshapes(node: Any) -> list[Reshape]:
    """What went in and what came out; whether memory is copied before does not matter."""
    [(before, place)] = node.next_functions
    if before is None or type(node).__name__ == "CloneBackward0":
        return []
    return [(before._input_metadata[place].shape, node._input_metadata[0].shape)]


def _broadcasts(node: Any) -> Iterator[tuple[Shape, Shape]]:
    """The node's shape next to each other shape that it was given."""
    out = node._input_metadata[0].shape
    for after, place in node.next_functions:
        if after is not None and len(after._input_metadata) > place:
            given = after._input_metadata[place].shape
            if given != out:
                yield tuple(out), tuple(given)


def _broadcast(nodes: Sequence[Any], hiding: list[Any]) -> bool:
    """Whether examples may meet because some of `hiding` have them off the first axis.

    A product of matrices does not repeat its operands; that is how an einsum is computed.
    """
    if not hiding:
        return False
    wanted = set(hiding)
    users = {type(node).__name__ for node in nodes if wanted & set(_before(node))}
    return users != {"BmmBackward0"}


def _nodes(losses: Tensor, around: WaysAround) -> Iterator[Any]:
    start = losses.grad_fn
    waiting = [] if start is None else [start]
    seen = {None, start}
    while waiting:
        node: Any = waiting.pop()
        yield node
        for after in around[node] if node in around else _before(node):
            if after not in seen:
                seen.add(after)
                waiting.append(after)


def _before(node: Any) -> list[Any]:
    return [after for after, _ in node.next_functions]


class Twins:
    """Graphs of the same inputs, with a different number of examples: what is as long in both has none.

    Attributes:
        few: One of the graphs.
        moved: Of each tensor of each node that may move rows, the axes that are as long in both.
        met: Of what came out of each broadcast, and of what went in, likewise.
        reshaped: Of each reshape, the axes that are not.
    """

    def __init__(self, few: Graph, more: Graph) -> None:
        """Compare two graphs that are alike."""
        self.few = few
        self.moved = [
            [_alike(*pair) for pair in zip(*shapes, strict=True)]
            for shapes in zip(few._shapes, more._shapes, strict=True)
        ]
        self.met = [
            (_alike(one[0], other[0]), _alike(one[1], other[1]))
            for one, other in zip(few._met, more._met, strict=True)
        ]
        self.reshaped = [growth(*pair) for pair in zip(few._reshaped, more._reshaped, strict=True)]
