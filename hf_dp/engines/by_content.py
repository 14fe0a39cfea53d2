"""Whether a forward pass may have arranged rows by what they hold, read off its graph.

Taps know where examples are from the first ones. That stays so unless an operation between taps puts rows
elsewhere: by a mask, by indices, sorted, or cut and joined along the examples' axis at places that a
loop found. Whatever moves gradients' rows stands in the graph, however it was called; what is computed
without gradients, or inside a module that is run again for each example, does not matter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_dp.layers.base import UnitAxis

# Parts of the names of nodes that put rows elsewhere, or cut or join them.
_MOVING = (
    *("Index", "Gather", "Scatter", "Take", "Put", "Select", "Sort", "Topk", "Kth", "Mode"),
    *("Median", "Unique", "Slice", "Split", "Unbind", "Cat", "Stack", "Roll", "Flip", "Rot90"),
    *("AsStrided", "Segment", "Pack", "Pad", "EmbeddingBag", "Embedding", "Nested", "Jagged"),
    *("Sparse", "Grouped", "CopySlices", "Diagonal", "Permutation", "Cpp"),
)
_FILLING = ("IndexFill", "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad")
_HARMLESS_PACKAGES = ("bitsandbytes.", "torch.utils.checkpoint", "transformers.models.bloom.")

# Which of these a reshape becomes depends on strides and on who is looking.
_RESHAPING = frozenset(
    {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "CloneBackward0"}
)

_KINDS: dict[type, bool] = {}  # kind of node -> whether its name is one of those


class Graph:
    """What a walk from the losses to the first taps met.

    Attributes:
        kinds: The kinds of nodes, outside modules that are run again for each example.
        by_content: Whether rows may have been arranged by what they hold.
    """

    def __init__(self, losses: Tensor, num_units: int) -> None:
        """Walk the graph of `losses`, ``(B,)``."""
        self.by_content = False
        kinds: set[type] = set()
        start = losses.grad_fn
        seen, waiting = {start}, [start]
        while waiting:
            node: Any = waiting.pop()
            if node is None:
                continue
            kind = type(node)
            kinds.add(kind)
            moving = _KINDS.get(kind)
            if moving is None:
                moving = _KINDS[kind] = _is_moving(kind)
            if moving and not self.by_content:
                self.by_content = _arranges(node, kind.__name__, num_units)
            for after in _before(node):
                if after not in seen:
                    seen.add(after)
                    waiting.append(after)
        self.kinds = frozenset(kind for kind in kinds if kind.__name__ not in _RESHAPING)


def _before(node: Any) -> list[Any]:
    noted = getattr(node, "noted", None)
    if noted is not None and not isinstance(noted[2], UnitAxis):
        return list(node.given)  # over what is inside the module
    return [after for after, _ in node.next_functions]


def _is_moving(kind: type) -> bool:
    if issubclass(kind, torch.autograd.function.BackwardCFunction):
        package = getattr(kind, "_forward_cls", kind).__module__  # of the function it belongs to
        return not package.startswith(("hf_dp.engines.tap", *_HARMLESS_PACKAGES))
    name = kind.__name__
    return any(part in name for part in _MOVING) and not name.startswith(_FILLING)


def _arranges(node: Any, name: str, num_units: int) -> bool:
    """Whether the node moves, cuts or joins along an axis that may have the examples."""
    shapes = _shapes(node, name)
    indices = getattr(node, "_saved_indices", None) if name.startswith("Index") else None
    if isinstance(indices, tuple) and name.startswith("IndexBackward"):
        return _indexed_elsewhere(node, indices, shapes, num_units)
    if name.startswith("Embedding") and "Bag" not in name:
        return any(_has_units(shape, 0, num_units) for shape in shapes)
    axes = next((getattr(node, a) for a in ("_saved_dim", "_saved_dims") if hasattr(node, a)), None)
    if axes is None or not shapes:
        return True
    return any(
        _has_units(shape, _axis(axis, shape), num_units)
        for axis in (axes if isinstance(axes, tuple | list) else (axes,))
        for shape in shapes
    )


def _shapes(node: Any, name: str) -> list[tuple[int, ...]]:
    """The shapes of what went in; of what came out where pieces are joined."""
    given = [
        tuple(after._input_metadata[place].shape)
        for after, place in node.next_functions
        if after is not None and len(after._input_metadata) > place
    ]
    if "Cat" in name or "Stack" in name:
        return [tuple(metadata.shape) for metadata in node._input_metadata]
    return given


def _axis(axis: int, shape: tuple[int, ...]) -> int:
    axis = axis - 2**64 if axis >= 2**63 else axis  # a signed number read as unsigned
    return axis + len(shape) if axis < 0 else axis


def _has_units(shape: tuple[int, ...], axis: int, num_units: int) -> bool:
    """Whether an axis may have the examples, or rows of them folded together."""
    if axis >= len(shape):
        return True
    length = shape[axis]
    if axis == 0 or length == num_units:
        return length % num_units == 0
    elsewhere = num_units in shape or shape[0] % num_units == 0
    return length % num_units == 0 and not elsewhere


def _indexed_elsewhere(
    node: Any, indices: tuple[Any, ...], shapes: list[tuple[int, ...]], num_units: int
) -> bool:
    """Whether indexing takes examples from other places than each from its own."""
    [shape] = shapes[:1] or [()]
    axis = 0
    for index in indices:
        if index is None:
            axis += 1
            continue
        masks = index.dtype in (torch.bool, torch.uint8)
        width = index.dim() if masks else 1
        for covered in range(axis, axis + width):
            if _has_units(shape, covered, num_units) and (
                masks or not _each_its_own(index, num_units)
            ):
                return True
        axis += width
    return False


def _each_its_own(index: Tensor, num_units: int) -> bool:
    if index.numel() != num_units or index.shape[0] != num_units:
        return False
    return torch.equal(index.flatten(), torch.arange(num_units, device=index.device))
