"""A rehearsal before the first step: does the engine do for this model what it promises?

It stops training or lets it begin, and anybody sees which. On real examples that one bit would depend
on them, and so be a release that nobody accounts for; a neighbouring data set might stop where this one
trains. So it is meant for made-up examples, public ones, of the shape of the data: then it releases
nothing, and its messages may name any number. What it cannot see on them is what only some example's
values bring about; the engines refuse or bound that whenever it comes up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.clipping.base import ClippingPolicy
from hf_dp.clipping.loss import LossRelease
from hf_dp.engines.base import ExampleLoss, GradientEngine, is_out_of_memory
from hf_dp.engines.coupling import FAINT, check_coupling
from hf_dp.engines.given_losses import with_own_batches
from hf_dp.engines.owners import Owners
from hf_dp.engines.rows import batch_size, select_rows
from hf_dp.engines.sequential import SequentialEngine
from hf_dp.engines.undisturbed import draws, evaluation_flags, undisturbed
from hf_dp.errors import PrivacyError, UncoveredParameterError, explain
from hf_dp.events import Norm
from hf_dp.sums import ClippedSum

TOLERANCE = 1e-4
_NOTHING = 1e-8  # a norm of rounding alone, where all gradients cancel
"""Relative, for float32; half precision needs about 5e-2."""

_ORDERS: Mapping[Norm, int] = {"l1": 1, "l2": 2}

Batch = Mapping[str, Any]
Piece = tuple[Batch, Owners | None]


def preflight(
    model: nn.Module,
    alone: Sequence[Batch],
    together: Batch | None,
    *,
    engine: GradientEngine,
    example_loss: ExampleLoss,
    clipping: ClippingPolicy,
    loss_release: LossRelease | None = None,
    tolerance: float = TOLERANCE,
    width: int = 0,
    owners: Owners | None = None,
) -> None:
    """Check engine, loss and clipping on a few public examples; a few steps' time.

    Checked are: every trainable parameter is covered; no example's loss or gradient depends on batch
    mates or padding; the engine agrees with the sequential one; removing any one example, or any one
    of their `owners`, moves the clipped sum by at most the sensitivity.

    Args:
        model: As it will be trained; afterwards it is as it was, generators and buffers included.
        alone: Two to four made-up examples, each as a batch of one without padding.
        together: The same as one padded batch, or None where training takes them one by one.
        engine: The one that will train; what it learns about the model stays with it.
        example_loss: One loss per example.
        clipping: The policy that will clip.
        loss_release: How the loss enters the release.
        tolerance: Relative.
        width: How many examples training takes together; what counts them may do so only when they
            are as many.
        owners: Which of the examples, in the order of `together`, have one owner: engine and influence
            are then checked user by user, on `together`. None if each is clipped by itself.

    Raises:
        ConfigurationError: Examples influence one another.
        UncoveredParameterError: A parameter is not covered, or its gradient comes out wrong.
        PrivacyError: One example moves the sum by more than the sensitivity.
    """
    example_loss = with_own_batches(example_loss)
    engine.prepare(model)  # what is recognised must be what trains, dropout included
    with undisturbed(model):
        if draws(lambda: example_loss(model, alone[0])):
            evaluation_flags(model)  # layers drop out, or the like: alone and together would differ
        if together is not None:
            check_coupling(model, together, alone, example_loss=example_loss, tolerance=tolerance)
            if width > batch_size(together):
                _check_width(model, together, alone, example_loss, tolerance, width)
        expected: list[Piece] = [(one, None) for one in alone]
        pieces = expected if together is None else [(together, owners)]
        if together is not None and owners is not None:
            expected = pieces
        trial = _Trial(model, example_loss, clipping, loss_release).at_the_typical_norm(expected)
        _check_agreement(trial, engine, pieces, expected, tolerance)
        _check_influence(trial, engine, pieces, tolerance)


def _check_width(
    model: nn.Module,
    together: Batch,
    alone: Sequence[Batch],
    example_loss: ExampleLoss,
    tolerance: float,
    width: int,
) -> None:
    """The same examples over and over, as wide a batch as in training: no loss may change."""
    places = [place % len(alone) for place in range(width)]
    wide = select_rows(together, places)
    try:
        with torch.no_grad():
            found, expected = example_loss(model, wide), example_loss(model, together)[places]
    except RuntimeError as error:
        if is_out_of_memory(error):
            return  # then training does not take as many together, either
        raise
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True):
        repeated = [alone[place] for place in places]
        check_coupling(model, wide, repeated, example_loss=example_loss, tolerance=tolerance / 2)


class _Trial:
    """What is tried out: a model, its loss and its clipping."""

    def __init__(
        self,
        model: nn.Module,
        example_loss: ExampleLoss,
        clipping: ClippingPolicy,
        loss_release: LossRelease | None,
    ) -> None:
        self.model = model
        self.example_loss = example_loss
        self.clipping = clipping
        self.loss_release = loss_release

    def at_the_typical_norm(self, pieces: Sequence[Piece]) -> _Trial:
        """The same with a sensitivity that clips some units and leaves others as they are."""
        norms = self.summed(SequentialEngine(), pieces).norms
        norms = norms[torch.isfinite(norms) & (norms > 0)]
        if norms.numel() == 0:
            return self
        factor = float(norms.median()) / self.clipping.sensitivity
        clipping = self.clipping.scaled(factor)
        return _Trial(self.model, self.example_loss, clipping, self.loss_release)

    def summed(self, engine: GradientEngine, pieces: Sequence[Piece]) -> ClippedSum:
        total: ClippedSum | None = None
        for batch, owners in pieces:
            part = engine.clipped_sum(
                self.model,
                batch,
                example_loss=self.example_loss,
                clipping=self.clipping,
                loss_release=self.loss_release,
                owners=owners,
            )
            total = part if total is None else total + part
        assert total is not None
        return total


def _check_agreement(
    trial: _Trial,
    engine: GradientEngine,
    pieces: Sequence[Piece],
    alone: Sequence[Piece],
    tolerance: float,
) -> None:
    """The engine's norms and sums against ordinary autograd on one example after the other."""
    found, expected = trial.summed(engine, pieces), trial.summed(SequentialEngine(), alone)
    norm = trial.clipping.norm
    gaps = _gaps(found.grads, expected.grads, norm)
    longest = float(expected.norms.nan_to_num(0, 0, 0).max())
    faint = max(_NOTHING, tolerance * FAINT * longest)
    norms = torch.allclose(found.norms, expected.norms, rtol=tolerance, atol=faint, equal_nan=True)
    size = _total(_gaps(expected.grads, {}, norm), norm)
    if not norms or not _total(gaps, norm) <= tolerance * max(size, trial.clipping.sensitivity):
        worst = max(gaps, key=lambda name: gaps[name])
        raise UncoveredParameterError(
            explain(
                f"engine={engine.name!r}, parameter {worst}",
                _owner(trial.model, worst),
                "clipped gradients as plain autograd gives them, one example at a time",
                "On made-up examples they differ, so norms, or what is added, are not those of the "
                "gradient.",
                "Mend the rule of that layer, freeze it, or use engine='sequential'.",
            )
        )


def _check_influence(
    trial: _Trial, engine: GradientEngine, pieces: Sequence[Piece], tolerance: float
) -> None:
    """Take each unit out in turn."""
    whole = _released(trial.summed(engine, pieces))
    num_rows = sum(batch_size(batch) for batch, _ in pieces)
    bound = trial.clipping.sensitivity * (1 + tolerance * num_rows)
    unit = "example" if pieces[0][1] is None else "user"
    for rest in _one_taken_out(pieces):
        norm = trial.clipping.norm
        moved = _total(_gaps(whole, _released(trial.summed(engine, rest)), norm), norm)
        if not moved <= bound:
            raise PrivacyError(
                explain(
                    "clipping",
                    type(trial.clipping).__qualname__,
                    f"the sum to move by at most the sensitivity when a single {unit} is removed",
                    f"It moved by {moved / trial.clipping.sensitivity:.3g} times as much, so the noise "
                    "is too small for what is claimed.",
                    "Use FlatClipping, or mend the policy's weights.",
                )
            )


def _one_taken_out(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    if len(pieces) > 1:
        for place in range(len(pieces)):
            yield [*pieces[:place], *pieces[place + 1 :]]
        return
    [(batch, owners)] = pieces
    sizes = (1,) * batch_size(batch) if owners is None else owners.sizes
    rows = iter(range(batch_size(batch)))
    units = [list(itertools.islice(rows, size)) for size in sizes]
    for place in range(len(units)):
        kept = [row for unit in (*units[:place], *units[place + 1 :]) for row in unit]
        others = owners and Owners((*sizes[:place], *sizes[place + 1 :]), owners.reduction)
        yield [(select_rows(batch, kept), others)]


def _released(summed: ClippedSum) -> dict[str, Tensor]:
    coordinate = {} if summed.loss_sum is None else {"": summed.loss_sum}
    return {**summed.grads, **coordinate}


def _gaps(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], norm: Norm
) -> dict[str, float]:
    """By name, how long ``found - expected`` is in `norm`; what `expected` lacks is zero."""
    return {name: _length(f - expected.get(name, 0.0), norm) for name, f in found.items()}


def _length(tensor: Tensor, norm: Norm) -> float:
    # a long vector's norm in float32 comes out too small
    return float(torch.linalg.vector_norm(tensor, _ORDERS[norm], dtype=torch.float64))


def _total(parts: Mapping[str, float], norm: Norm) -> float:
    return math.hypot(*parts.values()) if norm == "l2" else math.fsum(parts.values())


def _owner(model: nn.Module, parameter: str) -> str:
    return type(model.get_submodule(parameter.rpartition(".")[0])).__qualname__
