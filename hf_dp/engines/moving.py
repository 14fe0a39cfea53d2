"""Which nodes of a graph may put rows of examples elsewhere, read off their names, axes and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Functions of each number alone, or of numbers in the same place: what is not known to be one of
# these may put rows elsewhere.
_STAYING = frozenset(
    f"{name}Backward{version}"
    for version in range(4)
    for name in (
        *(
            "Add",
            "Sub",
            "Rsub",
            "Mul",
            "Div",
            "Neg",
            "Pow",
            "Sqrt",
            "Rsqrt",
            "Reciprocal",
            "Square",
        ),
        *("Exp", "Exp2", "Expm1", "Log", "Log1P", "Log2", "Log10", "Abs", "Sign", "Sgn", "Maximum"),
        *("Minimum", "Clamp", "ClampMin", "ClampMax", "Floor", "Ceil", "Round", "Trunc", "Fmod"),
        *("Remainder", "Lerp", "Addcmul", "Addcdiv", "Where", "MaskedFill", "Fill", "NanToNum"),
        *("Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Atan2", "Sinh", "Cosh", "Tanh", "Erf"),
        *("Erfc", "Erfinv", "Sigmoid", "LogSigmoid", "Relu", "LeakyRelu", "Elu", "Gelu", "Silu"),
        *("Mish", "Softplus", "Hardtanh", "Hardsigmoid", "Hardswish", "Softshrink", "Hardshrink"),
        *("Threshold", "RreluWithNoise", "NativeDropout", "FusedDropout", "Xlogy", "Logaddexp"),
        *("Alias", "Clone", "Detach", "Copy", "ToCopy", "Zero", "Real", "Imag", "Angle", "Complex"),
        *("ViewAsReal", "ViewAsComplex", "Conj", "ConjPhysical", "Polar", "Squeeze", "Lift"),
        *("View", "UnsafeView", "ReshapeAlias"),  # looked at apart
    )
) | {"AccumulateGrad"}
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
_TURNING = ("TransposeBackward0", "PermuteBackward0", "TBackward0")
_HARMLESS_PACKAGES = (
    *("bitsandbytes.", "torch.utils.checkpoint", "transformers.models.bloom."),
    *("hf_dp.engines.tap", "hf_dp.training.reductions"),
)

_MEETING = frozenset(
    f"{name}Backward"
    for name in (
        *("Add", "Sub", "Rsub", "Mul", "Div", "Pow", "Maximum", "Minimum", "Fmod", "Remainder"),
        *("Lerp", "Addcmul", "Addcdiv", "Where", "MaskedFill", "Atan2", "Xlogy", "Logaddexp"),
        *("Copy", "Complex", "Polar", "Clamp"),
    )
)

Shape = tuple[int, ...]


def is_moving(kind: type) -> bool:
    """Whether nodes of this kind may put rows elsewhere along some axis."""
    if issubclass(kind, torch.autograd.function.BackwardCFunction):
        package = getattr(kind, "_forward_cls", kind).__module__  # of the function it belongs to
        return not package.startswith(_HARMLESS_PACKAGES)
    return kind.__name__ not in _STAYING


def hides_units(node: Any, num_units: int) -> bool:
    """Whether a reshape puts an axis of one before the examples, where they meet others by broadcasting."""
    return _new_length(node, num_units) == 1


def straddles(node: Any, num_units: int) -> bool:
    """Whether a reshape cuts the examples' rows into groups that may belong to several of them."""
    length = _new_length(node, num_units)
    return length is not None and length != 1 and length % num_units != 0


def _new_length(node: Any, num_units: int) -> int | None:
    """How long a reshape makes the first axis of what may have the examples there; else None."""
    shape = node._input_metadata[0].shape
    if len(shape) and any(before and before[0] % num_units == 0 for before in shapes_of(node)):
        return int(shape[0])
    return None


def _is_attention(name: str) -> bool:
    return name.startswith("ScaledDotProduct")


def _is_windowed(name: str) -> bool:
    return any(part in name for part in _WINDOWS)


def shapes_of(node: Any) -> list[Shape | None]:
    """The shapes of what went in, where it has a graph; also of what came out where pieces are joined."""
    name = type(node).__name__
    came_out = [tuple(metadata.shape) for metadata in node._input_metadata]
    if "Stack" in name:
        return list(came_out)
    went_in = [
        tuple(after._input_metadata[place].shape)
        if after is not None and len(after._input_metadata) > place
        else None
        for after, place in node.next_functions
    ]
    return [*went_in, *came_out] if "Cat" in name else went_in


def may_broadcast(kind: type) -> bool:
    """Whether nodes of this kind take several tensors, which need not have one shape."""
    return kind.__name__.rstrip("0123456789") in _MEETING


@dataclass(frozen=True)
class Sized:
    """A tensor's shape in a batch of B, and which of its axes do not grow with the batch.

    Attributes:
        shape: Its shape.
        num_units: B.
        free: Whether each axis was as long in two batches of the same inputs that differed in the
            number of examples alone; None if that is not known.
    """

    shape: Shape
    num_units: int
    free: tuple[bool, ...] | None = None

    def has_units(self, axis: int) -> bool:
        """Whether an axis may have the examples, or rows of them folded together.

        Of B examples an axis has all, and so a multiple of B rows, until something cuts or joins along
        it, which is seen where it does so. Apart from that only a length that did not grow with the
        batch shows that an axis has none: that it does not grow now could be by coincidence.
        """
        if axis >= len(self.shape):
            return True
        if self.shape[axis] % self.num_units:
            return False
        return self.free is None or not self.free[axis]

    @property
    def all_free(self) -> bool:
        """Whether no axis may have the examples."""
        return not any(self.has_units(axis) for axis in range(len(self.shape)))


def meets(out: Sized, given: Sized) -> bool:
    """Whether broadcasting puts an axis that may have the examples elsewhere, or repeats it along one.

    Args:
        out: What a function of numbers in the same place gave.
        given: One of those that it was given.
    """
    lead = len(out.shape) - len(given.shape)
    if lead > 0:
        return not given.all_free
    return any(
        given.shape[axis] == 1 and out.shape[axis] != 1 and out.has_units(axis)
        for axis in range(len(out.shape))
    )


def arranges(node: Any, tensors: Sequence[Sized | None]) -> bool:
    """Whether the node moves, cuts, joins or sums along an axis that may have the examples."""
    name = type(node).__name__
    if name in _TURNING:
        return False  # the same for all rows: another kind of graph, if they are those of examples
    known = [tensor for tensor in tensors if tensor is not None]
    indices = getattr(node, "_saved_indices", None) if name.startswith("Index") else None
    if isinstance(indices, tuple) and name.startswith("IndexBackward"):
        return not known or _indexed_elsewhere(indices, known[0])
    if name.startswith("Embedding") and "Bag" not in name:
        return any(tensor.has_units(0) for tensor in known)
    if name.startswith("AsStrided") and _stays(node, known):
        return False
    if "Loss" in name and hasattr(node, "_saved_reduction"):
        return bool(node._saved_reduction)  # 0 keeps one for each
    if "BatchNorm" in name:
        return getattr(node, "_saved_training", True) is not False
    if name in _SHIFTING:
        return any(tensor.has_units(axis) for tensor in known for axis in _shifted(node, tensor))
    axes = list(_axes(node, tensors))
    if known and not axes and name.startswith(_FILLING):
        return False  # filled up by nothing
    if not axes or not known:
        return True
    return any(tensor is not None and tensor.has_units(axis) for tensor, axis in axes)


@dataclass(frozen=True)
class Turn:
    """Axes in another order, of which one may have the examples.

    Attributes:
        order: The axes in their new order.
        single: Whether each of them, before that, had a length of one: then its place does not show.
        ambiguous: Several of those that get another place may have them, so that what was turned fits
            what was not: numbers of each may then be picked by content, as with ``where``.
    """

    order: tuple[int, ...]
    single: tuple[bool, ...]
    ambiguous: bool


def turned(node: Any, tensors: Sequence[Sized | None]) -> Turn | None:
    """How the node turns its tensor, if an axis that may have the examples gets another place."""
    name = type(node).__name__
    if name not in _TURNING or not tensors or tensors[0] is None:
        return None
    dims = list(range(len(tensors[0].shape)))
    if name == "PermuteBackward0":
        dims = [_axis(dim, len(dims)) for dim in node._saved_dims]
    elif len(dims) > 1:
        pair = (0, 1) if name == "TBackward0" else (node._saved_dim0, node._saved_dim1)
        one, two = (_axis(dim, len(dims)) for dim in pair)
        dims[one], dims[two] = dims[two], dims[one]
    moved = [old for new, old in enumerate(dims) if new != old]
    found = sum(tensors[0].has_units(axis) for axis in moved)
    single = tuple(length == 1 for length in tensors[0].shape)
    return Turn(tuple(dims), single, found > 1) if found else None


def _axes(node: Any, tensors: Sequence[Sized | None]) -> Iterator[tuple[Sized | None, int]]:
    """Each operand with each of the axes that the node works along."""
    name = type(node).__name__
    if name in _PRODUCTS:
        along = _PRODUCTS[name]
        yield from (
            (tensors[place], _axis(axis, len(tensor.shape)))
            for place, axis in along.items()
            if place < len(tensors) and (tensor := tensors[place]) is not None
        )
        if not any(place < len(tensors) and tensors[place] is not None for place in along):
            yield None, 0
    elif _is_attention(name):
        yield from (
            (tensor, len(tensor.shape) - 2) for tensor in tensors[1:3] if tensor is not None
        )
        yield None, 0
    elif name.startswith(_EACH_BY_ITSELF):
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
            yield from ((t, _axis(axis, len(t.shape))) for t in tensors if t is not None)


def _shifted(node: Any, tensor: Sized) -> range:
    """The axes that get another place from the front."""
    rank = len(tensor.shape)
    if hasattr(node, "_saved_dim"):
        return range(_axis(node._saved_dim, rank + 1), rank)
    return range(rank if len(node._input_metadata[0].shape) == rank else 0, rank)


def _axis(axis: int, rank: int) -> int:
    axis = axis - 2**64 if axis >= 2**63 else axis  # a signed number read as unsigned
    return axis + rank if axis < 0 else axis


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
