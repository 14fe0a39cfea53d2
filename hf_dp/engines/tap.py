"""Taps: one autograd function behind each module, through which its gradients are seen.

A tap saves what the module was given with ``save_for_backward`` (so that checkpointing recomputes it)
and receives the gradient of the module's output. The parameters' ``requires_grad`` is off while their
module runs, so no ordinary weight gradient is ever computed, and a use of a trainable parameter
outside its tapped module shows in the graph.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.engines.coverage import Coverage, Layout, LayoutUnknownError, TapPoint
from hf_dp.engines.reentrant import reentrant_refused
from hf_dp.engines.sharded import Ranks
from hf_dp.errors import UncoveredParameterError
from hf_dp.layers.base import UnitAxis


class OwnBackwardError(UncoveredParameterError):
    """Foreign code wants gradients of its own while the examples' are told apart."""

    def __init__(self) -> None:
        """Say so."""
        super().__init__(
            "a loss or a model that runs a backward pass of its own, as adversarial training does: expected "
            "forward passes alone. Its gradients would be taken for the examples'. Use engine='sequential', "
            "or 'auto', which then takes one example at a time."
        )


@dataclass
class Call:
    """What one call of a tapped module left behind: inputs and output gradients.

    Attributes:
        point: The tap point.
        inputs: The tensors it was given.
        output_grads: The gradients of its outputs; None where nothing depends on one.
        context: What else the tap noted about the call.
        key: The same for one call in all backward passes of a graph.
    """

    point: TapPoint
    inputs: tuple[Tensor, ...]
    output_grads: tuple[Tensor | None, ...]
    context: Any
    key: int = 0


class UsedOutsideError(UncoveredParameterError):
    """Trainable parameters were used outside the modules that answer for them."""

    def __init__(self, names: Sequence[str]) -> None:
        """Name the parameters."""
        self.names = list(names)
        super().__init__(
            f"parameters {self.names}: expected every use to be inside a module with a layer rule. "
            "A use elsewhere has a gradient that is not clipped. "
            "Use engine='sequential', freeze them, or add a rule for the module that uses them."
        )


@dataclass
class Recording:
    """One forward pass, and its backward passes.

    Attributes:
        parameters: Name -> trainable parameter.
        anchor: A scalar that every tap depends on, so that a graph exists.
        num_units: B.
        on_call: What the running backward pass does with each call, as soon as its gradient is there.
        uses: Parameter's id -> how often the forward pass used it; a call that did not contribute to
            the losses counts, a recomputation of a checkpoint does not.
        silent: While it is positive, taps do nothing.
        folds: Folded axes seen: what was found, and what it must equal.
        sizes: Numbers of positions seen, by source.
        counts: Whether these are needed.
        recomputed: Whether a backward pass ran tapped modules again, as checkpoints do.
        held: Parameters that record no gradient during a backward pass either: a checkpoint runs their
            module's forward again without its hooks, and must find what the forward pass found.
        ranks: Those that run the model along: what one of them cannot do is told to all after a pass,
            which the others would wait for.
        failed: What that is on this rank.
        without: Whether a tapped module ran without gradients, as within a reentrant checkpoint.
        around: The ways around the inside of modules that keep tokens apart: an output's node, and those
            of all that the module was given.
    """

    parameters: Mapping[str, nn.Parameter]
    anchor: Tensor
    num_units: int
    on_call: Callable[[Call], None] | None = None
    uses: Counter[int] = field(default_factory=Counter)
    silent: int = 0
    folds: list[tuple[TapPoint, int, frozenset[tuple[int, Any]], Tensor]] = field(
        default_factory=list
    )
    sizes: dict[Any, set[int]] = field(default_factory=dict)
    counts: bool = False
    recomputed: bool = False
    held: list[nn.Parameter] = field(default_factory=list)
    ranks: Ranks = field(default_factory=Ranks)
    failed: UncoveredParameterError | None = None
    without: bool = False
    around: dict[Any, list[Any]] = field(default_factory=dict)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Keep a refusal until `tell`, where other ranks run the model along."""
        try:
            yield
        except UncoveredParameterError as error:
            self._note(error)

    def hand_on(self, call: Call) -> None:
        """Give a call to the running backward pass; a refusal is kept as by `noting`."""
        if self.on_call is None:
            raise OwnBackwardError
        try:
            self.on_call(call)
        except UncoveredParameterError as error:
            self._note(error)

    def _note(self, error: UncoveredParameterError) -> None:
        if not self.ranks.together:
            raise error
        self.failed = self.failed or error

    def tell(self) -> None:
        """Raise on every rank what was noted on one.

        Raises:
            UncoveredParameterError: Some rank cannot tell its examples apart.
        """
        failed, self.failed = self.failed, None
        self.ranks.raise_any(failed)

    def backward(
        self, losses: Tensor, on_call: Callable[[Call], None], *, again: bool = False
    ) -> None:
        """Run a backward pass, handing each call to `on_call`; `again` keeps the graph for one more.

        Raises:
            UsedOutsideError: A trainable parameter was used outside its tapped module.
        """
        if not losses.requires_grad:
            return  # no trainable parameter took part: every gradient is zero
        self.on_call = on_call
        targets = [self.anchor, *self.parameters.values()]
        total = losses.sum()
        if self.held:
            total.register_hook(lambda _: set_requires_grad(self.held, False))
        try:
            with reentrant_refused():
                grads = torch.autograd.grad(total, targets, retain_graph=again, allow_unused=True)
        finally:
            self.on_call = None  # it leads to the losses, their graph to it: nobody would free it
            set_requires_grad(self.held, True)
        used = [
            name for name, grad in zip(self.parameters, grads[1:], strict=True) if grad is not None
        ]
        with self.noting():
            if used:
                raise UsedOutsideError(used)
        self.tell()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Run modules again without taps."""
        self.silent += 1
        try:
            yield
        finally:
            self.silent -= 1

    def through(
        self,
        point: TapPoint,
        context: Any,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """The outputs as the rest of the model gets them."""
        if self.on_call is None:
            for parameter in point.parameters:
                self.uses[id(parameter)] += 1
        else:
            self.recomputed = True
        apply = _Tap.apply if torch._C._are_functorch_transforms_active() else _APPLY
        return apply((self, point, context, len(outputs)), self.anchor, *outputs, *inputs)


class _Tap(torch.autograd.Function):
    """Identity forward; backward hands the output gradients to the recording."""

    @staticmethod
    def forward(
        ctx: Any,
        noted: tuple[Recording, TapPoint, Any, int],  # one argument: torch looks at each
        anchor: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        num_outputs = noted[3]
        ctx.noted = noted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[num_outputs:])
        # returning an input would make a view and break in-place operations
        return tuple([output.detach() for output in tensors[:num_outputs]])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        recording, point, context, _ = ctx.noted
        inputs = tuple([saved.detach() for saved in ctx.saved_tensors])
        if any([grad is not None for grad in grads]):
            recording.hand_on(Call(point, inputs, grads, context, id(ctx)))
        # the anchor's own gradient is of no use: zeros would be added up, two kernels for each call
        return None, None, *grads, *[None] * len(inputs)


# What `Function.apply` comes to where no transform of `torch.func` runs; to make sure of that it looks into
# every argument, which takes a third of a tap's time.
_APPLY: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Tap).apply


class PointTap(ABC):
    """The hooks of one tap point, next to the module's forward: other people's hooks stay outside."""

    def __init__(self, record: Recording, point: TapPoint, coverage: Coverage) -> None:
        """Tap `point` where `coverage` knows the examples to be."""
        self.record = record
        self.point = point
        self.layouts: Mapping[Hashable, Layout] = coverage.layouts(point)
        self.counts = record.counts

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies of a tapped module have taps that do nothing."""
        return _silent, (type(self),)

    def attach(self, stack: contextlib.ExitStack) -> None:
        """Register the hooks for as long as `stack` lives."""
        module = self.point.module
        stack.enter_context(module.register_forward_pre_hook(self.before, with_kwargs=True))
        after = module.register_forward_hook(self.after, prepend=True, with_kwargs=True)
        stack.enter_context(after)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The module is about to run."""
        if not self.record.silent:
            self.set_requires_grad(False)

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The module has run; what this returns takes the place of its output."""
        if self.record.silent:
            return output
        self.set_requires_grad(True)
        if not torch.is_grad_enabled():
            self.record.without = True
            return output
        found = output
        with self.record.noting():
            found = self.tapped(args, kwargs, output)
        return found

    @abstractmethod
    def tapped(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output with the tap behind it."""

    def set_requires_grad(self, value: bool) -> None:
        """Whether the point's parameters record gradients."""
        set_requires_grad(self.point.parameters, value)

    def check_rows(self, layout: Layout, index: int, axis: UnitAxis | None, leaf: Tensor) -> None:
        """Refuse a tensor that has not the examples where calls of this kind have them."""
        units = self.record.num_units
        if axis is None:
            raise self.unseen()
        if axis.dim is None and not axis.row:
            return
        units, dim = (units, axis.dim) if axis.dim is not None else (1, 0)
        rows = leaf.shape[dim] if leaf.dim() > dim else 0
        if rows != units and not (axis.folded and rows > 0 and rows % units == 0):
            raise LayoutUnknownError(
                self.point,
                f"{self.point.described} got a tensor of shape {tuple(leaf.shape)}: expected "
                f"a length of {units} on axis {dim}, as for the first examples. Without that axis one "
                "example's gradient cannot be told from another's. Use engine='sequential'.",
            )
        if axis.folded:
            self.record.folds.append((self.point, index, layout.folds[index], leaf.detach()))

    def unseen(self) -> LayoutUnknownError:
        """This kind of call was not made for the first examples."""
        return LayoutUnknownError(
            self.point,
            f"{self.point.described} took part for some examples only, or in another way: expected every "
            "module with trainable parameters to run alike for the first examples too, which shows "
            "where it has the examples. Use engine='sequential', or freeze it.",
        )


def _silent(kind: type[PointTap]) -> PointTap:
    tap = object.__new__(kind)
    tap.record = Recording({}, torch.empty(0), 0, silent=1)
    return tap


def set_requires_grad(parameters: Iterable[nn.Parameter], value: bool) -> None:
    """Whether `parameters` record gradients."""
    for parameter in parameters:
        parameter.requires_grad_(value)


def note_sizes(sizes: dict[Any, set[int]], name: str, tensor: Tensor) -> None:
    """Note the numbers of positions that `tensor`, with the examples first, shows."""
    product = 1
    last = tensor.dim() - (1 if tensor.is_floating_point() else 0)
    for axis in range(1, last):
        product *= tensor.shape[axis]
        sizes.setdefault((name, axis), set()).add(product)
