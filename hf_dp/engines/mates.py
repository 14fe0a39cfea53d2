"""Whether an example's loss or gradient changes with its batch mates, tried when a loss is new.

Some examples are compared among others with the same alone. Losses that look at the batch need not show it
in all examples: those that keep the hardest, or leave out what is learnt, change one example at the least,
at an end of their order. So the examples with the lowest and with the highest losses are compared. One that
shows a gap may owe it to rounding, which tips a router over; then it gives its place to another example,
and so do those whose loss is next to nothing. A rule that goes by rank finds its next victim among the
rest; rounding does not.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.engines.base import ExampleLoss, checked_losses, trainable_parameters
from hf_dp.engines.coupling import gradient_gap, mates_refusal
from hf_dp.engines.probe import mode_of, modes_of
from hf_dp.engines.rows import batch_size, row, select_rows, tensors_in
from hf_dp.engines.sharded import Ranks
from hf_dp.engines.undisturbed import without_dropout
from hf_dp.layers.factors import wide
from hf_dp.layers.randomness import Randomness, kept_randomness

Batch = Mapping[str, Any]

_TRIED, _PAIR = 4, 2
_ROUNDS = 4
# Of losses, relative: what rounding does not explain in several examples.
GAPS = {"float32": 1e-4, "accelerator": 2e-3, "half": 5e-2}
GRADIENT_GAPS = {"float32": 1e-2, "accelerator": 5e-2, "half": 0.5}
_LITTLE_LOSS = 0.1  # losses are compared relative to themselves and this
# Losses up to which gradients may be all rounding: they are as long, and so are the logits' last digits.
_NO_LOSSES = {"float32": 1e-4, "accelerator": 0.1, "half": 0.1}
_LITTLE_GRADIENT = 2e-3  # of the loss: gradients that are shorter count as this long, for rounding


def check_mates(model: nn.Module, inputs: Batch, example_loss: ExampleLoss) -> None:
    """Compare the losses of a few examples among others with those of the same examples alone.

    In evaluation mode and, where nothing but dropout is drawn, with every module in the mode that it is
    in. All rows keep their padding. A gap must show in two examples, where there are more than two. So with
    gradients, in which what lies behind a branch that starts at zero shows first; where the loss is next
    to nothing, they are all rounding.

    Args:
        model: As the engine calls it.
        inputs: Two or more examples.
        example_loss: One loss per example.

    Raises:
        ConfigurationError: They differ by more than rounding.
    """
    device = next(model.parameters()).device
    for training in modes_of(model):
        with kept_randomness(device), mode_of(model, training=training), without_dropout():
            before = Randomness.now(device)
            with noting_half(model) as halves, torch.no_grad():
                example_loss(model, inputs)
            if not Randomness.now(device).same(before):
                continue  # other draws for an example alone than among others
            rounding = coarseness(device, half=bool(halves))
            mates = _Mates(model, inputs, example_loss, GAPS[rounding], _NO_LOSSES[rounding])
            index = mates.row_that_shows(mates.loss_gaps, outliers=True)
            if index is None and not mates.ranks.together:
                gap = GRADIENT_GAPS[rounding]
                mates = _Mates(model, inputs, example_loss, gap, _NO_LOSSES[rounding])
                index = mates.row_that_shows(mates.gradient_gaps)
            if index is not None:
                raise mates_refusal(model, inputs, index, example_loss, GAPS[rounding])


@dataclass(frozen=True)
class _Compared:
    """What one batch showed.

    Attributes:
        losses: Of all of its examples, ``(B,)``, float64.
        gaps: Place in the batch -> how far the example there is from itself alone, relative.
        idle: Places whose examples would show next to nothing if they were left out.
    """

    losses: Tensor
    gaps: Mapping[int, float]
    idle: Sequence[int]


class _Mates:
    """The examples of a batch, put together in several ways; as often on all ranks of a sharded model."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Batch,
        example_loss: ExampleLoss,
        little: float,
        no_loss: float,
    ) -> None:
        self._model, self._inputs, self._example_loss = model, inputs, example_loss
        self._little, self._no_loss = little, no_loss
        self._size = batch_size(inputs)
        self._shown: dict[int, float] = {}  # row -> its largest gap
        self._idle: set[int] = set()
        self.ranks = Ranks(model)

    def row_that_shows(
        self, measure: Callable[[Batch], _Compared], *, outliers: bool = False
    ) -> int | None:
        """The row with the largest gap, if gaps show in more rows than rounding explains; else None.

        Args:
            measure: Compares examples of a batch among others with the same alone.
            outliers: Try also the highest loss among copies of the lowest, and the other way round.
        """
        compared = self._compare(measure, list(range(self._size)))
        order = [int(place) for place in compared.losses.argsort()]
        known: set[int] = set()
        for attempt in range(_ROUNDS):
            replaced = self._idle.union(self._shown)
            if not self.ranks.any(replaced != known) and (attempt or not outliers):
                break
            known = replaced
            for rows in self._arranged(order, outliers=outliers):
                if not self._is_shown():
                    self._compare(measure, rows)
            if self._is_shown():
                break
        return (
            max(self._shown, key=self._shown.__getitem__, default=0) if self._is_shown() else None
        )

    def _arranged(self, order: Sequence[int], *, outliers: bool) -> Iterator[list[int]]:
        """Batches of the same size in which others stand for rows that showed or would show nothing."""
        numbers = range(self._size)
        for replaced in (set(self._shown), self._idle.union(self._shown)):
            rest = [number for number in order if number not in replaced] or order
            ends = rest[0], rest[-1]
            if self.ranks.any(bool(replaced)):
                for filler in ends:
                    yield [filler if number in replaced else number for number in numbers]
        if outliers:
            for kept, other in (ends, ends[::-1]):
                yield [kept if number == kept else other for number in numbers]

    def _is_shown(self) -> bool:
        return self.ranks.any(len(self._shown) > (self._size > _PAIR))

    def _compare(self, measure: Callable[[Batch], _Compared], rows: list[int]) -> _Compared:
        compared = measure(select_rows(self._inputs, rows))
        for place, gap in compared.gaps.items():
            if gap > self._little:
                self._shown[rows[place]] = max(gap, self._shown.get(rows[place], 0))
        self._idle.update(rows[place] for place in compared.idle)
        return compared

    @torch.no_grad()
    def loss_gaps(self, batch: Batch) -> _Compared:
        """How far losses among others are from losses alone, relative; all of it if one is no number."""
        losses = self._losses(batch)
        places = _ends(losses)
        among = losses[places]
        alone = torch.cat([self._losses(row(batch, place)) for place in places])
        least = losses.abs().nan_to_num(0, 0, 0).mean() + _LITTLE_LOSS
        scale = alone.abs().nan_to_num(0, 0, 0) + least
        gaps = apart(among, alone) / scale
        if self.ranks.any(bool((gaps > self._little).any())):
            again = self._losses(batch)[places]  # what changes by itself is no coupling
            gaps = gaps - apart(among, again) / scale
        heights = losses.abs().nan_to_num(0, 0, 0)
        heights[places] = heights[places].maximum(alone.abs().nan_to_num(0, 0, 0))
        idle = (heights <= self._little * least).nonzero().flatten().tolist()
        return _Compared(losses, dict(zip(places, gaps.tolist(), strict=True)), idle)

    def gradient_gaps(self, batch: Batch) -> _Compared:
        """How far gradients among others are from gradients alone, relative to their length."""
        parameters = list(trainable_parameters(self._model).values())
        together = checked_losses(self._example_loss(self._model, batch), self._size)
        losses = wide(together.detach()).double().cpu()
        gaps = {}
        for place in _ends(losses):
            alone = checked_losses(self._example_loss(self._model, row(batch, place)), 1)
            loss = float(alone.detach().abs())
            if loss > self._no_loss:
                gap, length = gradient_gap(together[place], alone, parameters)
                found = (gap / max(length, (_LITTLE_GRADIENT * loss) ** 2)) ** 0.5
                gaps[place] = found if math.isfinite(found) else 0.0
        heights = losses.abs().nan_to_num(0, 0, 0)
        idle = (heights <= self._no_loss).nonzero().flatten().tolist()
        return _Compared(losses, gaps, idle)

    def _losses(self, batch: Batch) -> Tensor:
        losses = checked_losses(self._example_loss(self._model, batch), batch_size(batch))
        return wide(losses).double().cpu()


def coarseness(device: torch.device, *, half: bool) -> str:
    """Which of `GAPS` holds on a device, where fewer digits than float32's may have been computed with."""
    return "half" if half else "float32" if device.type == "cpu" else "accelerator"


def apart(one: Tensor, other: Tensor) -> Tensor:
    """Distances; infinite between a number and what is none."""
    gaps = (one - other).abs().nan_to_num(0, 0, 0)
    return gaps.masked_fill(one.isfinite() != other.isfinite(), torch.inf)


def _ends(losses: Tensor) -> list[int]:
    """Places of the lowest and of the highest losses; of what is no number only where others lack."""
    order = [int(place) for place in losses.argsort()]
    numbers = [place for place in order if bool(losses[place].isfinite())]
    half = _TRIED // 2
    if len(numbers) > _TRIED:
        return [*numbers[:half], *numbers[-half:]]
    return [*numbers, *(place for place in order if place not in numbers)][:_TRIED]


@contextlib.contextmanager
def noting_half(model: nn.Module) -> Iterator[list[bool]]:
    """A list that is not empty once a module gave numbers with fewer digits than float32 has."""
    found: list[bool] = []
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(module.register_forward_hook(functools.partial(_note_half, found)))
        yield found


def _note_half(found: list[bool], module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook; models that copy themselves take it along."""
    least = torch.finfo(torch.float32).eps
    floats = (t for t in tensors_in(output) if t.is_floating_point())
    if not found and any(torch.finfo(t.dtype).eps > least for t in floats):
        found.append(True)
