"""Which nodes of a graph may put rows of examples elsewhere, read off their names, axes and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

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
TURNING = ("TransposeBackward0", "PermuteBackward0", "TBackward0")
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


def parts_units(node: Any, num_units: int) -> int | None:
    """How many rows a reshape makes of what may have the examples on its first axis, if not whole examples.

    One row: an axis put before the examples, where they meet others by broadcasting. Other numbers: groups
    of rows that may belong to several of them. None if neither may be.
    """
    shape = node._input_metadata[0].shape
    if not shape or (shape[0] != 1 and shape[0] % num_units == 0):
        return None
    if any(before and before[0] % num_units == 0 for before in shapes_of(node)):
        return int(shape[0])
    return None


def shapes_of(node: Any) -> list[Shape | None]:
    """The shapes of what went in, where it has a graph; also of what came out where pieces are joined."""
    name = type(node).__name__
    joins = "Cat" in name
    came_out = [tuple(m.shape) for m in node._input_metadata] if joins or "Stack" in name else []
    went_in: list[Shape | None] = []
    for after, place in node.next_functions if joins or not came_out else ():
        given = () if after is None else after._input_metadata
        went_in.append(tuple(given[place].shape) if len(given) > place else None)
    return [*went_in, *came_out]


def may_broadcast(kind: type) -> bool:
    """Whether nodes of this kind take several tensors, which need not have one shape."""
    return kind.__name__.rstrip("0123456789") in _MEETING


class Sized(NamedTuple):
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
    if name not in TURNING or not tensors or tensors[0] is None:
        return None
    dims = list(range(len(tensors[0].shape)))
    if name == "PermuteBackward0":
        dims = [axis_of(dim, len(dims)) for dim in node._saved_dims]
    elif len(dims) > 1:
        pair = (0, 1) if name == "TBackward0" else (node._saved_dim0, node._saved_dim1)
        one, two = (axis_of(dim, len(dims)) for dim in pair)
        dims[one], dims[two] = dims[two], dims[one]
    moved = [old for new, old in enumerate(dims) if new != old]
    found = sum(tensors[0].has_units(axis) for axis in moved)
    single = tuple(length == 1 for length in tensors[0].shape)
    return Turn(tuple(dims), single, found > 1) if found else None


def axis_of(axis: int, rank: int) -> int:
    """An axis that a node names, counted from the front."""
    axis = axis - 2**64 if axis >= 2**63 else axis  # a signed number read as unsigned
    return axis + rank if axis < 0 else axis
