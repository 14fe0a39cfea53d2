"""Whether a node of a graph moves, cuts, joins or sums along an axis that may have the examples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_dp.engines.moving import TURNING, Sized, axis_of

_FILLING = ("ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad")
# These keep the examples apart if they are on the first axis: windows, and means over the others.
_WINDOWS = ("Convolution", "Pool", "Upsample", "Im2Col", "Col2Im", "GridSampler", "GroupNorm")
_SHIFTING = ("UnsqueezeBackward0", "ExpandBackward0")  # and then meet the others by broadcasting
_EACH_BY_ITSELF = ("Renorm", "WeightNorm")
_NORMED = "_saved_normalized_shape"
# Products, and the axis that each of their operands is summed over: with ones and zeros likewise.
_PRODUCTS: dict[str, dict[int, int]] = {
    "MmBackward0": {0: 1, 1: 0},
    "AddmmBackward0": {1: 1, 2: 0},
    "MvBackward0": {0: 1, 1: 0},
    "AddmvBackward0": {1: 1, 2: 0},
    "BmmBackward0": {0: 2, 1: 1},
    "BaddbmmBackward0": {1: 2, 2: 1},
    "AddbmmBackward0": {1: 0, 2: 0},
    "LinearBackward0": {0: -1},
}


def arranges(node: Any, tensors: Sequence[Sized | None]) -> bool:
    """Whether the node moves, cuts, joins or sums along an axis that may have the examples."""
    kind: type = type(node)
    return _judge_of(kind)(node, tensors)


@functools.cache
def _judge_of(kind: type) -> Callable[[Any, Sequence[Sized | None]], bool]:
    """What `arranges` asks of nodes of one kind; names are compared once, for there are few kinds."""
    name = kind.__name__
    if name in TURNING:
        return _never  # the same for all rows: another kind of graph, if they are those of examples
    if name.startswith("IndexBackward"):
        return _index_arranges
    if name.startswith("Embedding") and "Bag" not in name:
        return _lookup_arranges
    if name.startswith("AsStrided"):
        return _strides_arrange
    if "Loss" in name and hasattr(kind, "_saved_reduction"):
        return _loss_arranges
    if "BatchNorm" in name:
        return _batch_norm_arranges
    if name in _PRODUCTS:
        return _product_arranges
    if _is_attention(name):
        return _attention_arranges
    return _shift_arranges if name in _SHIFTING else _axes_arrange


def _never(node: Any, tensors: Sequence[Sized | None]) -> bool:
    return False


def _index_arranges(node: Any, tensors: Sequence[Sized | None]) -> bool:
    indices = getattr(node, "_saved_indices", None)
    if not isinstance(indices, tuple):
        return _axes_arrange(node, tensors)
    known = _known(tensors)
    return not known or _indexed_elsewhere(indices, known[0])


def _lookup_arranges(node: Any, tensors: Sequence[Sized | None]) -> bool:
    return any(tensor.has_units(0) for tensor in _known(tensors))


def _strides_arrange(node: Any, tensors: Sequence[Sized | None]) -> bool:
    return not _stays(node, _known(tensors)) and _axes_arrange(node, tensors)


def _loss_arranges(node: Any, tensors: Sequence[Sized | None]) -> bool:
    return bool(node._saved_reduction)  # 0 keeps one for each


def _batch_norm_arranges(node: Any, tensors: Sequence[Sized | None]) -> bool:
    return getattr(node, "_saved_training", True) is not False


def _shift_arranges(node: Any, tensors: Sequence[Sized | None]) -> bool:
    return any(t.has_units(axis) for t in _known(tensors) for axis in _shifted(node, t))


def _product_arranges(node: Any, tensors: Sequence[Sized | None]) -> bool:
    for place, axis in _PRODUCTS[type(node).__name__].items():
        operand = tensors[place] if place < len(tensors) else None
        if operand is not None and operand.has_units(axis_of(axis, len(operand.shape))):
            return True
    return not _known(tensors)


def _attention_arranges(node: Any, tensors: Sequence[Sized | None]) -> bool:
    keys_and_values = _known(tensors[1:3])
    return any(t.has_units(len(t.shape) - 2) for t in keys_and_values) or not _known(tensors)


def _axes_arrange(node: Any, tensors: Sequence[Sized | None]) -> bool:
    known, axes = _known(tensors), list(_axes(node, tensors))
    if known and not axes and type(node).__name__.startswith(_FILLING):
        return False  # filled up by nothing
    if not axes or not known:
        return True
    return any(tensor is not None and tensor.has_units(axis) for tensor, axis in axes)


def _known(tensors: Sequence[Sized | None]) -> list[Sized]:
    return [tensor for tensor in tensors if tensor is not None]


def _axes(node: Any, tensors: Sequence[Sized | None]) -> Iterator[tuple[Sized | None, int]]:
    """Each operand with each of the axes that the node works along."""
    name = type(node).__name__
    if name.startswith(_EACH_BY_ITSELF):
        return  # the axis it names is the one that it does not sum over
    elif name.startswith(_FILLING):
        widths = getattr(node, "_saved_pad", None) or getattr(node, "_saved_padding", None) or ()
        padded = [place // 2 for place, width in enumerate(widths) if width]
        yield from (
            (t, len(t.shape) - 1 - axis) for t in tensors if t is not None for axis in padded
        )
    elif _is_windowed(name) or hasattr(node, _NORMED):
        tensor = tensors[0] if tensors else None
        rank = 1 if tensor is None else len(tensor.shape)
        first = rank - len(getattr(node, _NORMED)) if hasattr(node, _NORMED) else 1
        yield from ((tensor, axis) for axis in range(first, rank))
    else:
        axes = next(
            (getattr(node, a) for a in ("_saved_dim", "_saved_dims") if hasattr(node, a)), ()
        )
        axes = () if axes is None else axes  # all of them
        for axis in axes if isinstance(axes, tuple | list) else (axes,):
            yield from ((t, axis_of(axis, len(t.shape))) for t in tensors if t is not None)


def _shifted(node: Any, tensor: Sized) -> range:
    """The axes that get another place from the front."""
    rank = len(tensor.shape)
    if hasattr(node, "_saved_dim"):
        return range(axis_of(node._saved_dim, rank + 1), rank)
    return range(rank if len(node._input_metadata[0].shape) == rank else 0, rank)


def _is_attention(name: str) -> bool:
    return name.startswith("ScaledDotProduct")


def _is_windowed(name: str) -> bool:
    return any(part in name for part in _WINDOWS)


def _stays(node: Any, known: Sequence[Sized]) -> bool:
    """Whether it only writes strides anew, of a mean, which lies in memory as its shape says."""
    before = node.next_functions[0][0]
    if type(before).__name__ != "MeanBackward1" or len(known) != 1:
        return False
    shape, stride = tuple(node._saved_size), 1
    if shape != known[0].shape or node._saved_storage_offset not in (None, 0):
        return False
    for length, step in zip(reversed(shape), reversed(tuple(node._saved_stride)), strict=True):
        if length > 1 and step != stride:
            return False
        stride *= length
    return True


def _indexed_elsewhere(indices: tuple[Any, ...], tensor: Sized) -> bool:
    """Whether indexing takes examples from other places than each from its own."""
    axis = 0
    if sum(index is not None for index in indices) > 1 and any(
        index is not None and index.dim() > 1 for index in indices
    ):  # what comes out has axes of its own, wherever the examples were
        return not tensor.all_free
    for index in indices:
        if index is None:
            axis += 1
            continue
        masks = index.dtype in (torch.bool, torch.uint8)
        width = index.dim() if masks else 1
        for covered in range(axis, axis + width):
            if tensor.has_units(covered) and (masks or not _each_its_own(index, tensor.num_units)):
                return True
        axis += width
    return False


def _each_its_own(index: Tensor, num_units: int) -> bool:
    if index.numel() != num_units or index.shape[0] != num_units:
        return False
    return torch.equal(index.flatten(), torch.arange(num_units, device=index.device))
