"""On every batch: two examples among all others and each alone, where code of unknown origin is involved.

What a loss does may change from batch to batch: a setting, a flag in its file, a column that was not
there before, a branch that first becomes true. No list of what can be read off a function from outside
(its closure, attributes, globals, what those lead to) is ever complete, and one that is long pays for
each counter and each annealed temperature. So nothing is read. The two examples with the lowest and the
highest loss of the batch are run alone, and what differs is looked at in all detail
(`mates.check_mates`), which also decides: here rounding may be mistaken for influence, but costs time
alone.

Of a model that is known no forward pass is needed for that: the loss is given again, row by row, what
the model gave in this very batch, as long as it calls the model with what it did then. So dropout does not
matter, and the gradients that the loss sends into the model's outputs are compared too. A model of
one's own, or a loss that calls it otherwise for one example, is run on the two rows without gradients, and
without dropout; if numbers were drawn in this batch, on all of it as well. Gradients are then compared on
the first batch alone (`settle.compare_mates`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_dp.engines.base import ExampleLoss, checked_losses, is_out_of_memory
from hf_dp.engines.mates import GAPS, GRADIENT_GAPS, Batch, apart, coarseness, noting_half
from hf_dp.engines.own_losses import ModelCall
from hf_dp.engines.probe import mode_of
from hf_dp.engines.rows import batch_size, select_rows
from hf_dp.engines.sharded import Ranks
from hf_dp.engines.undisturbed import without_dropout
from hf_dp.layers.factors import wide
from hf_dp.layers.randomness import Randomness, kept_randomness

_LITTLE = 1e-3  # of the longer gradient: the other counts as at least that long
_PLAIN = (bool, int, float, str)
_NO_LOSS = 0.1  # losses are compared relative to themselves and this, as in `mates`


class _OtherCallsError(Exception):
    """The loss does not call the model as it did."""


@dataclass
class _Call:
    """What one call of the model was given, and what it gave, for a few rows."""

    taken: list[Any]
    leaves: list[Any]
    spec: Any

    @classmethod
    def of(cls, call: ModelCall, rows: Sequence[int], size: int) -> _Call:
        leaves, spec = tree_flatten(call.output)
        taken = [_taken(leaf, rows, size) for leaf in tree_flatten(call.arguments)[0]]
        return cls(taken, [_rows_of(leaf, rows, size) for leaf in leaves], spec)

    def of_rows(self, rows: Sequence[int]) -> tuple[Any, list[Tensor]]:
        """The output for some of the rows, and what in it may have a gradient."""
        leaves = [leaf[list(rows)] if _has_rows(leaf) else leaf for leaf in self.leaves]
        starts = []
        for place, leaf in enumerate(leaves):
            if _has_rows(leaf) and leaf.is_floating_point():
                starts.append(leaf.requires_grad_())
                leaves[place] = leaf.clone()  # may be changed in place
        return tree_unflatten(leaves, self.spec), starts

    def is_repeated(self, arguments: object, rows: Sequence[int], little: float) -> bool:
        """Whether the model is given for some of the rows what it was given for them before."""
        leaves = tree_flatten(arguments)[0]
        return len(leaves) == len(self.taken) and all(
            _are_alike(was(rows) if callable(was) else was, leaf, little)
            for was, leaf in zip(self.taken, leaves, strict=True)
        )


def _taken(leaf: Any, rows: Sequence[int], size: int) -> Any:
    """An argument; of one that has a row for each example a function that gives some of the rows."""
    if not isinstance(leaf, Tensor):
        return leaf if isinstance(leaf, _PLAIN) else None
    if leaf.dim() == 0 or len(leaf) != size:
        return leaf.detach()
    kept = leaf.detach()[list(rows)]
    return lambda some: kept[list(some)]


def _are_alike(was: Any, now: Any, little: float) -> bool:
    if not isinstance(was, Tensor) or not isinstance(now, Tensor):
        return was is None or (isinstance(now, _PLAIN) and was == now)
    if was.shape != now.shape or was.dtype != now.dtype:
        return False
    if not was.is_floating_point() or was.numel() == 0:
        return torch.equal(was, now)
    before, after = wide(was), wide(now.detach())
    allowed = little * before.abs().nan_to_num(0, 0, 0).max()
    return bool((apart(before, after) <= allowed).all())


def _rows_of(leaf: Any, rows: Sequence[int], size: int) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf if isinstance(leaf, _PLAIN) else None  # say a cache of keys
    if leaf.dim() == 0:  # of the whole batch: who uses it gets no number
        return leaf.detach() * torch.nan if leaf.is_floating_point() else leaf.detach()
    if len(leaf) != size:
        raise _OtherCallsError
    return leaf.detach()[list(rows)]


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


@dataclass
class _Run:
    """Losses ``(R,)``, and the gradients that they send into the outputs, each ``(R, ...)``."""

    losses: Tensor
    grads: list[Tensor | None]


class Ends:
    """Two examples of a batch, to be run again when the pass is over."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Batch,
        example_loss: ExampleLoss,
        losses: Tensor,
        calls: Sequence[ModelCall],
        *,
        drawn: bool,
        ranks: Ranks,
    ) -> None:
        """Keep two rows of what is needed.

        Args:
            model: As the engine called it.
            inputs: Two or more examples.
            example_loss: One loss per example.
            losses: What it gave, ``(B,)``.
            calls: Of a model that is known, each as it was; none if it must be run again.
            drawn: Whether random numbers may have been.
            ranks: Those that run the model together; then it is run again.
        """
        self._model, self._example_loss, self._ranks = model, example_loss, ranks
        self._inputs, self._drawn = inputs, drawn
        self._among = wide(losses.detach()).double().cpu()
        size = len(self._among)
        self._rows = _lowest_and_highest(self._among)
        self._pair = select_rows(inputs, self._rows)
        self._calls: list[_Call] = []
        if not ranks.together:
            with contextlib.suppress(_OtherCallsError):
                self._calls = [_Call.of(call, self._rows, size) for call in calls]

    def show(self) -> bool:
        """Whether one of the two is another among others than alone, be it by rounding."""
        device = next(self._model.parameters()).device
        if self._calls:
            with kept_randomness(device):
                try:
                    return self._differ_replayed(Randomness.now(device))
                except Exception as error:  # a foreign loss may want of the model what was not kept
                    if is_out_of_memory(error):
                        raise
        with kept_randomness(device), mode_of(self._model, training=True), without_dropout():
            with noting_half(self._model) as halves, torch.no_grad():
                return self._differ_run_again(Randomness.now(device), halves)

    def _differ_replayed(self, before: Randomness) -> bool:
        kind = coarseness(before.device, half=self._is_half())
        replayed = functools.partial(self._replayed, little=GAPS[kind])
        alone = _together(replayed([0]), replayed([1]))
        if not Randomness.now(before.device).same(before):
            return False  # other draws for an example alone than among others
        if bool((alone.losses.isnan() & self._among[self._rows].isfinite()).any()):
            raise _OtherCallsError
        together = replayed([0, 1])
        gaps = _loss_gaps(self._among[self._rows], alone.losses)
        gaps = gaps.maximum(_loss_gaps(together.losses, alone.losses))
        if bool((gaps > GAPS[kind]).any()):  # what changes by itself is no coupling
            again = _together(replayed([0]), replayed([1]))
            gaps = gaps - _loss_gaps(again.losses, alone.losses)
        shown = bool((gaps > GAPS[kind]).any())
        return shown or _gradients_differ(together, alone, GRADIENT_GAPS[kind])

    def _differ_run_again(self, before: Randomness, halves: Sequence[bool]) -> bool:
        among = self._among
        if self._ranks.any(self._drawn):
            among = self._losses(self._inputs)
        alone = self._each_alone()
        if self._ranks.any(not Randomness.now(before.device).same(before)):
            return False  # likewise
        little = GAPS[coarseness(before.device, half=bool(halves))]
        gaps = _loss_gaps(among[self._rows], alone)
        if self._ranks.any(bool((gaps > little).any())):
            gaps = gaps - _loss_gaps(self._each_alone(), alone)
        return bool((gaps > little).any())

    def _each_alone(self) -> Tensor:
        return torch.cat([self._losses(select_rows(self._pair, [place])) for place in (0, 1)])

    def _is_half(self) -> bool:
        least = torch.finfo(torch.float32).eps
        leaves = (leaf for call in self._calls for leaf in call.leaves)
        floats = (t for t in leaves if isinstance(t, Tensor) and t.is_floating_point())
        return any(torch.finfo(t.dtype).eps > least for t in floats)

    def _replayed(self, rows: Sequence[int], *, little: float) -> _Run:
        outputs, starts = [], []
        for call in self._calls:
            output, mine = call.of_rows(rows)
            outputs.append(output)
            starts += mine

        def answer(number: int, arguments: object) -> Any:
            if number >= len(outputs) or not self._calls[number].is_repeated(
                arguments, rows, little
            ):
                raise _OtherCallsError
            return outputs[number]

        batch = select_rows(self._pair, rows)
        with torch.enable_grad(), _answering(self._model, answer) as count:
            losses = checked_losses(self._example_loss(self._model, batch), len(rows))
        if next(count) < len(outputs):
            raise _OtherCallsError
        losses = wide(losses)
        grads: Sequence[Tensor | None] = [None] * len(starts)
        if losses.requires_grad and starts:
            grads = torch.autograd.grad(losses.sum(), starts, allow_unused=True)
        return _Run(losses.detach().double().cpu(), list(grads))

    def _losses(self, batch: Batch) -> Tensor:
        losses = checked_losses(self._example_loss(self._model, batch), batch_size(batch))
        return wide(losses).double().cpu()


@contextlib.contextmanager
def _answering(model: nn.Module, answer: Callable[[int, object], Any]) -> Iterator[Iterator[int]]:
    """Within it `answer(number, arguments)` stands for the model; what is given counts the calls."""
    count = itertools.count()

    def forward(*args: object, **kwargs: object) -> Any:
        return answer(next(count), (args, kwargs))

    own = {name: vars(model)[name] for name in ("forward",) if name in vars(model)}
    vars(model)["forward"] = forward
    try:
        yield count
    finally:
        del vars(model)["forward"]
        vars(model).update(own)


def _lowest_and_highest(losses: Tensor) -> list[int]:
    """Two places; of what is no number only where others lack."""
    order = [int(place) for place in losses.argsort()]
    numbers = [place for place in order if bool(losses[place].isfinite())]
    rest = [place for place in order if place not in numbers]
    return [numbers[0], numbers[-1]] if len(numbers) > 1 else [*numbers, *rest][:2]


def _together(one: _Run, two: _Run) -> _Run:
    """Two runs of one example each as one of both."""
    grads = [
        None if a is None or b is None else torch.cat([a, b])
        for a, b in zip(one.grads, two.grads, strict=True)
    ]
    return _Run(torch.cat([one.losses, two.losses]), grads)


def _loss_gaps(found: Tensor, alone: Tensor) -> Tensor:
    """Relative."""
    scale = alone.abs().nan_to_num(0, 0, 0)
    return apart(found, alone) / (scale + scale.mean() + _NO_LOSS)


def _gradients_differ(together: _Run, alone: _Run, little: float) -> bool:
    gaps, sizes = torch.zeros(2), torch.zeros(2)
    for a, b in zip(together.grads, alone.grads, strict=True):
        if a is not None and b is not None:
            gaps += _squares(a - b)
            sizes += _squares(b)
    allowed = sizes.maximum(_LITTLE**2 * sizes.max()) * little**2
    return bool((gaps > allowed).any())


def _squares(rows: Tensor) -> Tensor:
    return wide(rows).flatten(1).square().sum(1).nan_to_num(0, 0, 0).cpu()
