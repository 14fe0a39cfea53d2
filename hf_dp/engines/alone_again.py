"""On every batch: two examples together and each alone, where code is involved of which nothing is known.

What a loss does may change from batch to batch: a setting, a flag in its file, a column that was not
there before, a branch that first becomes true. No list of what can be read off a function from outside
(its closure, attributes, globals, what those lead to) is ever complete, and one that is long pays for
each counter and each annealed temperature. So nothing is read. The two examples with the lowest and the
highest loss of the batch are run together and alone, and what differs is looked at in all detail
(`mates.check_mates`), which also decides: here rounding may be mistaken for influence, but costs time
alone.

Of a model that is known no forward pass is needed for that: the loss is given again, row by row, what
the model gave in this very batch. Then dropout does not matter, the two are also compared with their
losses among all others, and so are the gradients that the loss sends into the model's outputs. A model of
one's own, or a loss that calls it in ways of its own, is run on four rows without dropout and without
gradients; gradients are then compared on the first batch alone (`settle.compare_mates`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_dp.engines.base import ExampleLoss, checked_losses, is_out_of_memory
from hf_dp.engines.mates import GAPS, GRADIENT_GAPS, Batch, apart, coarseness, noting_half
from hf_dp.engines.probe import mode_of
from hf_dp.engines.rows import batch_size, select_rows
from hf_dp.engines.sharded import Ranks
from hf_dp.engines.undisturbed import without_dropout
from hf_dp.layers.factors import wide
from hf_dp.layers.randomness import Randomness, kept_randomness

_LITTLE = 1e-3  # of the longer gradient: the other counts as at least that long
_NO_LOSS = 0.1  # losses are compared relative to themselves and this, as in `mates`


class _OtherCallsError(Exception):
    """The loss does not call the model as it did."""


@dataclass
class _Given:
    """What one call of the model gave for a few rows."""

    leaves: list[Any]
    spec: Any

    @classmethod
    def of(cls, output: object, rows: Sequence[int], size: int) -> _Given:
        leaves, spec = tree_flatten(output)
        return cls([_rows_of(leaf, rows, size) for leaf in leaves], spec)

    def of_rows(self, rows: Sequence[int]) -> tuple[Any, list[Tensor]]:
        """The output for some of the rows, and what in it may have a gradient."""
        leaves = [leaf[list(rows)] if _has_rows(leaf) else leaf for leaf in self.leaves]
        starts = []
        for place, leaf in enumerate(leaves):
            if _has_rows(leaf) and leaf.is_floating_point():
                starts.append(leaf.requires_grad_())
                leaves[place] = leaf.clone()  # may be changed in place
        return tree_unflatten(leaves, self.spec), starts


def _rows_of(leaf: Any, rows: Sequence[int], size: int) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf if isinstance(leaf, bool | int | float | str) else None  # say a cache of keys
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
        outputs: Sequence[object] | None,
        ranks: Ranks,
    ) -> None:
        """Keep two rows of what is needed.

        Args:
            model: As the engine called it.
            inputs: Two or more examples.
            example_loss: One loss per example.
            losses: What it gave, ``(B,)``.
            outputs: What the model gave each time that it was called; None if it must be run again.
            ranks: Those that run the model together; then it is run again.
        """
        self._model, self._example_loss, self._ranks = model, example_loss, ranks
        self._among = wide(losses.detach()).double().cpu()
        size = len(self._among)
        rows = _lowest_and_highest(self._among)
        self._pair = select_rows(inputs, rows)
        self._among = self._among[rows]
        self._given: list[_Given] | None = None
        if outputs and not ranks.together:
            with contextlib.suppress(_OtherCallsError):
                self._given = [_Given.of(output, rows, size) for output in outputs]

    def show(self) -> bool:
        """Whether one of the two is another among others than alone, be it by rounding."""
        device = next(self._model.parameters()).device
        if self._given is not None:
            with kept_randomness(device):
                try:
                    return self._differ(self._replayed, Randomness.now(device), among=self._among)
                except Exception as error:  # a foreign loss may want of the model what was not kept
                    if is_out_of_memory(error):
                        raise
        with kept_randomness(device), mode_of(self._model, training=True), without_dropout():
            with noting_half(self._model) as halves, torch.no_grad():
                return self._differ(self._run_again, Randomness.now(device), halves=halves)

    def _differ(
        self,
        run: Callable[[Sequence[int]], _Run],
        before: Randomness,
        *,
        among: Tensor | None = None,
        halves: Sequence[bool] = (),
    ) -> bool:
        alone = _together(run([0]), run([1]))
        if self._ranks.any(not Randomness.now(before.device).same(before)):
            return False  # other draws for an example alone than among others
        together = run([0, 1])
        kind = coarseness(before.device, half=bool(halves) or self._is_half())
        gaps = _loss_gaps(together.losses, alone.losses)
        if among is not None:
            if bool((alone.losses.isnan() & among.isfinite()).any()):
                raise _OtherCallsError
            gaps = gaps.maximum(_loss_gaps(among, alone.losses))
        if self._ranks.any(bool((gaps > GAPS[kind]).any())):
            again = _together(run([0]), run([1]))  # what changes by itself is no coupling
            gaps = gaps - _loss_gaps(again.losses, alone.losses)
        shown = bool((gaps > GAPS[kind]).any())
        return shown or _gradients_differ(together, alone, GRADIENT_GAPS[kind])

    def _is_half(self) -> bool:
        least = torch.finfo(torch.float32).eps
        leaves = (leaf for given in self._given or () for leaf in given.leaves)
        floats = (t for t in leaves if isinstance(t, Tensor) and t.is_floating_point())
        return any(torch.finfo(t.dtype).eps > least for t in floats)

    def _run_again(self, rows: Sequence[int]) -> _Run:
        return _Run(self._losses(rows).detach().double().cpu(), [])

    def _replayed(self, rows: Sequence[int]) -> _Run:
        assert self._given is not None
        outputs = [given.of_rows(rows) for given in self._given]
        starts = [start for _, mine in outputs for start in mine]
        with torch.enable_grad(), _giving(self._model, [output for output, _ in outputs]):
            losses = self._losses(rows)
        grads: Sequence[Tensor | None] = [None] * len(starts)
        if losses.requires_grad and starts:
            grads = torch.autograd.grad(losses.sum(), starts, allow_unused=True)
        return _Run(losses.detach().double().cpu(), list(grads))

    def _losses(self, rows: Sequence[int]) -> Tensor:
        batch = select_rows(self._pair, rows)
        return wide(checked_losses(self._example_loss(self._model, batch), batch_size(batch)))


@contextlib.contextmanager
def _giving(model: nn.Module, outputs: Sequence[Any]) -> Iterator[None]:
    """Within it the model gives these outputs, one at each call, whatever it is given."""
    waiting = list(outputs)

    def forward(*_: object, **__: object) -> Any:
        if not waiting:
            raise _OtherCallsError
        return waiting.pop(0)

    own: Mapping[str, Any] = {
        name: vars(model)[name] for name in ("forward",) if name in vars(model)
    }
    vars(model)["forward"] = forward
    try:
        yield
    finally:
        del vars(model)["forward"]
        vars(model).update(own)
    if waiting:
        raise _OtherCallsError


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
