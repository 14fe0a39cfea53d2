"""Rows picked, sorted or joined by content: never credited to another example, in any later batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_zoo import Batch, assert_same_sum, length, naive
from influence import ROUNDING, clipped, joined, without
from torch import Tensor, nn

from hf_dp.clipping import FlatClipping
from hf_dp.engines import (
    BookKeepingEngine,
    GradientEngine,
    TwoPassEngine,
    engine_named,
    recorder,
)
from hf_dp.engines.by_content import Graph, Twins
from hf_dp.layers.base import UnitAxis

pytestmark = pytest.mark.usefixtures("taken_as_familiar")

MARKER, C = 7, 0.1


class Picks(nn.Module):
    """A head on the hidden states of marker tokens, added to that of the first token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body = nn.Embedding(50, 8), nn.Linear(8, 8)
        self.head, self.other = nn.Linear(8, 3), nn.Linear(8, 3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.table(ids)))
        found, who = self.picked(hidden, ids)
        return self.together(self.other(hidden[:, 0]), who, torch.tanh(self.head(found)))

    def together(self, firsts: Tensor, who: Tensor, found: Tensor) -> Tensor:
        return firsts.index_add(0, who, found)

    def picked(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        marked = ids == MARKER
        return hidden[marked], marked.nonzero()[:, 0]


class ByIndices(Picks):
    def picked(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        who, where = (ids == MARKER).nonzero(as_tuple=True)
        return hidden.flatten(0, 1).index_select(0, who * ids.shape[1] + where), who


class ByLooping(Picks):
    def picked(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        places = [(b, t) for b, row in enumerate(ids.tolist()) for t, i in enumerate(row) if i == 7]
        rows = [hidden[b, t] for b, t in places]
        return torch.stack(rows or [hidden[:0, 0].sum(0)])[: len(rows)], torch.tensor(
            [b for b, _ in places], dtype=torch.long
        )


class ByTop(Picks):
    """The tokens on top of an order over the whole batch."""

    def picked(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        score = (ids == MARKER).double().flatten()
        places = score.sort(descending=True, stable=True).indices[: int(score.sum())]
        return hidden.flatten(0, 1)[places], places // ids.shape[1]


class Sorted(Picks):
    """Examples sorted by how many markers they have, and put back."""

    def picked(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        order = (ids == MARKER).sum(1).argsort(stable=True, descending=True)
        return hidden[order, 1], order


class ByMatrix(Picks):
    """The tokens of `Picks`, multiplied out by a matrix of ones and zeros."""

    def picked(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        chosen = (ids == MARKER).flatten()
        matrix = torch.eye(len(chosen)).to(hidden)[chosen]
        return self.product(matrix, hidden.flatten(0, 1)), (ids == MARKER).nonzero()[:, 0]

    def together(self, firsts: Tensor, who: Tensor, found: Tensor) -> Tensor:
        matrix = torch.eye(len(firsts)).to(found)[who].mT
        return firsts + self.product(matrix, found)

    def product(self, matrix: Tensor, rows: Tensor) -> Tensor:
        return matrix @ rows


class BySum(ByMatrix):
    def product(self, matrix: Tensor, rows: Tensor) -> Tensor:
        return (matrix[:, :, None] * rows).sum(1)


class ByBatchedMatrix(ByMatrix):
    """As for eight experts, which all get the same: their axis is a multiple of the batch."""

    def product(self, matrix: Tensor, rows: Tensor) -> Tensor:
        return torch.bmm(matrix.expand(8, -1, -1), rows.expand(8, -1, -1)).mean(0)


class SortsTokens(nn.Module):
    """Large tokens last, and back; with a parameter for which only the whole model can answer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.gain = nn.Linear(3, 3), nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        order = (tokens[:, 0] > 1).long().argsort(stable=True)
        rows = torch.tanh(self.layer(tokens[order]))
        back = torch.zeros_like(rows).index_add(0, order, rows)
        losses: Tensor = (back * self.gain).view_as(x).square().sum((1, 2))
        return losses


KINDS = [Picks, ByIndices, ByLooping, ByTop, Sorted, ByMatrix, BySum, ByBatchedMatrix]
ENGINES = [BookKeepingEngine, TwoPassEngine]


def marked(*counts: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, 50, (len(counts), 6), generator=generator)
    for row, count in zip(ids, counts, strict=True):
        row[1 : 1 + count] = MARKER
    return {"ids": ids}


def losses(model: nn.Module, inputs: Batch) -> Tensor:
    out: Tensor = model(**inputs)
    return out.square().sum(1)


def picked_losses(model: nn.Module, inputs: Batch) -> Tensor:
    """The loss picks rows, too."""
    out: Tensor = model(**inputs)
    who = inputs["ids"][:, 1:].eq(MARKER).nonzero()[:, 0]
    return out[:, 0].square().index_add(0, who, out[who, 1].square())


def check_all(engine: GradientEngine, model: nn.Module, loss: Any, batches: list[Batch]) -> None:
    for inputs in batches:
        found = engine.clipped_sum(model, inputs, example_loss=loss, clipping=FlatClipping(C))
        assert_same_sum(found, naive(model, inputs, C, loss), 1e-10)


LATER = [marked(1, 1, 1, 1), marked(2, 0, 1, 1), marked(0, 2), marked(1, 1, 1)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_picked_by_content_are_the_examples_own(kind: Any, engine: Any) -> None:
    check_all(engine(), kind(), losses, LATER)
    check_all(engine(), kind(), losses, LATER[1:])


@pytest.mark.parametrize("kind", [Picks, Sorted])
def test_losses_that_pick_rows_are_the_examples_own(kind: Any) -> None:
    check_all(engine_named("auto"), kind(), picked_losses, LATER)


@pytest.mark.parametrize("kind", KINDS)
def test_removing_an_example_moves_the_sum_by_no_more_than_the_norm(kind: Any) -> None:
    model, engine, inputs = kind(), BookKeepingEngine(), marked(2, 0, 1, 1)
    engine.clipped_sum(model, LATER[0], example_loss=losses, clipping=FlatClipping(C))

    def summed(inputs: Batch) -> dict[str, Tensor]:
        found = engine.clipped_sum(model, inputs, example_loss=losses, clipping=FlatClipping(C))
        return joined(found)

    whole = summed(inputs)
    rest = [summed(without(inputs, index)) for index in range(4)]
    for sums in rest:
        assert length({k: whole[k] - sums[k] for k in whole}) <= C * ROUNDING


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {Sorted}, key=str))
def test_without_the_proof_rows_are_credited_to_others(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: nobody proves anything. Then a later batch's sum is wrong."""
    monkeypatch.setattr("hf_dp.engines.recorder.Proof.verdict", lambda *_, **__: True)
    engine, model = BookKeepingEngine(), kind()
    with pytest.raises(AssertionError):
        check_all(engine, model, losses, LATER[:2])


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {Sorted}, key=str))
def test_a_proof_for_the_first_batch_only_is_not_enough(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: no operation is said to arrange rows by content."""
    monkeypatch.setattr("hf_dp.engines.by_content.arranges", lambda *_: False)
    monkeypatch.setattr("hf_dp.engines.by_content.meets", lambda *_: False)
    engine, model = BookKeepingEngine(), kind()
    with pytest.raises(AssertionError):
        check_all(engine, model, losses, LATER[:2])


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_that_are_not_finite_do_not_hide_whose_they_are(engine: Any) -> None:
    """An example with a finite loss and an infinite gradient adds nothing, and hides nobody's row."""

    def rooted(model: nn.Module, inputs: Batch) -> Tensor:
        out = losses(model, inputs)
        return out + ((inputs["ids"][:, 0] != 0) + 0 * out).sqrt()

    chosen, model, inputs = engine(), Picks(), marked(2, 0, 1, 1)
    check_all(chosen, model, rooted, LATER[:1])
    inputs["ids"][:, 0] = torch.tensor([0, 9, 9, 9])

    def summed(inputs: Batch) -> dict[str, Tensor]:
        found = chosen.clipped_sum(model, inputs, example_loss=rooted, clipping=FlatClipping(C))
        return joined(found)

    whole, alone = summed(inputs), naive(model, without(inputs, 0), C, rooted)
    assert length({k: whole[k] - alone.grads[k] for k in whole}) <= 1e-10


def test_a_graph_that_showed_nothing_is_proved_at_the_next_micro_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only gradients that are finite for all show whose they are."""
    proofs: list[bool] = []

    class Noted(recorder.Proof):
        def verdict(self, *, hidden: bool) -> bool:
            proofs.append(super().verdict(hidden=hidden))
            return proofs[-1]

    def rooted(model: nn.Module, inputs: Batch) -> Tensor:
        return (
            model(inputs["x"]).square().sum(1)
            + (model(inputs["x"])[:, 0] * 0 + inputs["x"][:, 0]).sqrt()
        )

    monkeypatch.setattr(recorder, "Proof", Noted)
    model, engine = nn.Linear(3, 3).double(), BookKeepingEngine()
    good = {"x": torch.rand(4, 3).double() + 1}
    bad = {"x": good["x"] * torch.tensor([[0.0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]])}
    for inputs in (bad, bad, good, bad, good):
        engine.clipped_sum(model, inputs, example_loss=rooted, clipping=FlatClipping(C))
    assert proofs == [False, True]  # the others of the first batch are run again, and show it


def test_each_example_s_own_row_by_index_is_no_arrangement() -> None:
    def graph(units: int, rows: Tensor, twins: Sequence[Twins] = ()) -> Graph:
        hidden = torch.randn(units, 6, 8, requires_grad=True).tanh()
        return Graph(hidden[rows, torch.arange(units)].sum(1), units, twins)

    few, more = (graph(units, torch.arange(units)) for units in (2, 3))
    assert not graph(4, torch.arange(4), [Twins(few, more)]).by_content
    assert graph(4, torch.arange(4).flip(0), [Twins(few, more)]).by_content


def test_a_gather_inside_each_example_is_no_arrangement() -> None:
    def graph(units: int, twins: Sequence[Twins] = ()) -> Graph:
        hidden = torch.randn(units, 6, 8, requires_grad=True).tanh()
        last = torch.arange(units)
        return Graph(hidden[:, :3].flatten(1).gather(1, last[:, None])[:, 0], units, twins)

    assert not graph(4, [Twins(graph(2), graph(3))]).by_content


def test_a_batch_of_one_after_others_needs_no_proof() -> None:
    assert clipped("auto", Picks(), marked(1, 1), losses).norms.shape == (2,)


@pytest.mark.parametrize("seen", [True, False])
def test_layers_inside_a_module_that_is_run_again_are_proved(
    seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not seen:  # planted: the walk goes over all that is inside

        def outside(node: Any) -> list[Any]:
            noted = getattr(node, "noted", (None,) * 3)
            whole = noted[0] is not None and not isinstance(noted[2], UnitAxis)
            return [] if whole else [after for after, _ in node.next_functions]

        monkeypatch.setattr("hf_dp.engines.by_content._before", outside)
    engine, model, x = BookKeepingEngine(), SortsTokens(), torch.rand(5, 4, 3).double()
    later = torch.where(torch.rand(5, 4, 1) < 0.5, x + 1, x)
    with contextlib.nullcontext() if seen else pytest.raises(AssertionError):
        for inputs in ({"x": x}, {"x": later}):
            found = engine.clipped_sum(
                model, inputs, example_loss=lambda m, b: m(**b), clipping=FlatClipping(C)
            )
            assert_same_sum(found, naive(model, inputs, C, lambda m, b: m(**b)), 1e-9)
