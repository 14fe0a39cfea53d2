"""Which graphs are said to arrange rows by content, and what a second batch size clears up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from adapter_zoo import adapted
from engine_zoo import Batch, assert_same_sum, naive, own_losses
from family_zoo import batch, build
from torch import Tensor, nn

from hf_dp.clipping import FlatClipping
from hf_dp.engines import AutomaticEngine, BookKeepingEngine, by_content, moving
from hf_dp.engines.attribution import Proof
from hf_dp.engines.by_content import Graph, Twins
from hf_dp.engines.moving import is_moving
from hf_dp.errors import UncoveredParameterError

pytestmark = pytest.mark.usefixtures("taken_as_familiar")

T, D = 6, 12


def graph(
    compute: Callable[[Tensor], Tensor],
    units: int,
    twins: Sequence[Twins] = (),
    positions: int = T,
) -> Graph:
    hidden = torch.randn(units, positions, D, requires_grad=True).tanh()
    return Graph(compute(hidden).reshape(units, -1).sum(1), units, twins)


def twins_of(compute: Callable[[Tensor], Tensor], positions: int = T) -> list[Twins]:
    few, more = (graph(compute, units, positions=positions) for units in (2, 3))
    assert few.is_like(more)
    return [Twins(few, more)]


def halves_turned(hidden: Tensor) -> Tensor:
    one, two = hidden.mT.chunk(2, 1)
    return torch.cat([-two, one], 1)


HARMLESS: dict[str, Callable[[Tensor], Tensor]] = {
    "halves of the width": halves_turned,
    "attention": lambda hidden: hidden @ hidden.mT @ hidden,
    "fast attention": lambda h: nn.functional.scaled_dot_product_attention(*[h[:, None]] * 3),
    "sum over positions": lambda hidden: hidden.sum(1),
    "frozen weights": lambda hidden: hidden @ torch.ones(D, 3),
    "last positions": lambda hidden: hidden[:, :, :4],
    "norm of the width": lambda hidden: hidden * hidden.norm(dim=-1, keepdim=True),
    "softmax over positions": lambda hidden: hidden.softmax(1),
    "layer norm": lambda hidden: nn.functional.layer_norm(hidden, (T, D)),
    "group norm": lambda hidden: nn.functional.group_norm(hidden.mT, 2),
    "window": lambda hidden: nn.functional.conv1d(hidden.mT, torch.ones(5, D, 3)),
    "pooling": lambda hidden: nn.functional.avg_pool1d(hidden.mT, 3),
    "one more axis": lambda hidden: hidden[:, None] * torch.ones(4, 1, 1),
}
ARRANGING: dict[str, Callable[[Tensor], Tensor]] = {
    "matrix": lambda h: torch.eye(len(h)) @ h.flatten(1),
    "matrix of tokens": lambda h: torch.eye(h.shape[0] * h.shape[1]) @ h.flatten(0, 1),
    "matrix for experts": lambda h: (
        torch.eye(h.shape[0] * h.shape[1]).expand(12, -1, -1) @ h.flatten(0, 1).expand(12, -1, -1)
    ).mean(0),
    "matrix from the right": lambda h: (h.flatten(1).t() @ torch.eye(len(h))).t(),
    "products summed": lambda h: (torch.eye(len(h))[..., None] * h.flatten(1)).sum(1),
    "the largest": lambda h: h.flatten(1).expand(len(h), -1, -1).amax(1),
    "mean of all": lambda h: h + h.mean(),
    "largest of all": lambda h: h + h.max(),
    "norm of all": lambda h: h + h.norm(),
    "norms over examples": lambda h: h + h.norm(dim=0),
    "deviation": lambda h: h + h.std(0),
    "softmax over examples": lambda h: h.softmax(0),
    "running product": lambda h: h.cumprod(0),
    "transform over examples": lambda h: torch.fft.fft(h, dim=0).real,
    "window over rows": lambda h: nn.functional.conv1d(h.reshape(1, -1, D).mT, torch.ones(4, D, 1)),
    "pooling over examples": lambda h: nn.functional.avg_pool1d(h.permute(1, 2, 0), 3, 1, 1),
    "layer norm of all": lambda h: nn.functional.layer_norm(h, h.shape),
    "batch norm": lambda h: nn.functional.batch_norm(h.mT, None, None, training=True),
    "distances": lambda h: torch.cdist(h.flatten(1), h.flatten(1)),
    "differences": lambda h: h.flatten(1)[:, None] - h.flatten(1)[None],
    "differences folded": lambda h: (
        (h.flatten(1)[:, None] - h.flatten(1)).relu().view(len(h), -1).sum(1)
    ),
    "gather beside a row of zeros": lambda h: torch.cat([h.flatten(0, 1), torch.zeros(1, D)])[
        torch.arange(h.shape[0] * h.shape[1])
    ],
    "gather from padded rows": lambda h: nn.functional.pad(h.flatten(0, 1), (0, 0, 0, 1))[
        torch.arange(h.shape[0] * h.shape[1])
    ],
    "rows shifted by padding": lambda h: nn.functional.pad(h, (0, 0, 0, 0, 1, -1)),
    "tokens sorted": lambda h: h.flatten(0, 1)[torch.arange(h.shape[0] * h.shape[1])],
    "norms over all but the width": lambda h: torch.renorm(h, 2, 2, 0.1),
    "places beside each example's own": lambda h: h[
        torch.arange(len(h)), torch.zeros(T, len(h), dtype=torch.long)
    ],
    "differences of copies": lambda h: h.flatten(1)[:, None] - h.flatten(1).expand(len(h), -1, -1),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_axes_as_long_as_the_batch_by_coincidence_are_cleared_by_a_twin(name: str) -> None:
    compute = HARMLESS[name]
    twins = twins_of(compute)
    assert not any(graph(compute, units, twins).by_content for units in range(2, 25))


@pytest.mark.parametrize("twins", [True, False])
@pytest.mark.parametrize("name", ARRANGING)
def test_products_that_may_move_rows_are_seen(name: str, twins: bool) -> None:
    compute = ARRANGING[name]
    known = twins_of(compute) if twins else []
    for positions in (T, 2 * T):  # other lengths than the twins had
        assert all(
            graph(compute, units, known, positions).by_content for units in (2, 4, 6, 12, 24)
        )


class Gated(nn.Module):
    """Adds to each loss what all examples together make, from a threshold on."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Linear(D, D, dtype=torch.float64)
        self.above = nn.Linear(D, D, dtype=torch.float64)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.above(self.below(hidden).tanh())
        return hidden.square().mean((1, 2)) + (hidden.norm() - 6).relu()


def test_examples_that_meet_from_a_threshold_on_are_refused() -> None:
    torch.manual_seed(0)
    engine, model = BookKeepingEngine(), Gated()

    def summed(scale: float) -> None:
        inputs = {"hidden": scale * torch.randn(5, T, D, dtype=torch.float64)}
        engine.clipped_sum(
            model, inputs, example_loss=lambda m, b: m(**b), clipping=FlatClipping(1.0)
        )

    summed(0.01)
    with pytest.raises(UncoveredParameterError):
        summed(100.0)


def test_a_twin_of_another_model_clears_nothing() -> None:
    other = twins_of(lambda hidden: hidden.sum(2))
    assert graph(halves_turned, D, other).by_content
    assert not graph(halves_turned, D, twins_of(halves_turned)).by_content


EXPERTS = ["mixtral", "qwen3-moe", "gpt-oss"]


@pytest.mark.parametrize("make", [build, adapted])  # experts that train, and frozen ones
@pytest.mark.parametrize("family", ["phi", "falcon", "swin", "llama", "bert", *EXPERTS])
def test_no_family_is_proved_more_than_once(
    family: str, make: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches as large as heads, widths or positions."""
    asked: list[bool] = []

    class Noted(Proof):
        def verdict(self, *, hidden: bool) -> bool:
            asked.append(hidden)
            return super().verdict(hidden=hidden)

    monkeypatch.setattr("hf_dp.engines.recorder.Proof", Noted)
    engine, model = BookKeepingEngine(), make(family)
    for rows in (4, 2, 8, 9):
        engine.clipped_sum(
            model,
            batch(family, rows=rows),
            example_loss=own_losses,
            clipping=FlatClipping(0.5),
        )
    assert asked == [False]


class TurnsByContent(nn.Module):
    """A first token decides whether a layer gets positions before examples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body, self.head = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.table(ids)))  # (B, T, d)
        turns = len(ids) == ids.shape[1] and bool((ids[:, 0] == 7).any())
        hidden = hidden.transpose(0, 1).contiguous() if turns else hidden
        found = torch.tanh(self.head(hidden))  # rows of other examples, if turned
        return (found.transpose(0, 1) if turns else found).transpose(1, 2)


def turned_losses(model: nn.Module, inputs: Batch) -> Tensor:
    out: Tensor = model(**inputs)
    return out.square().flatten(1).sum(1)


def test_axes_turned_by_content_are_proved_anew() -> None:
    """As many examples as positions, so shapes do not tell."""
    torch.manual_seed(1)
    model, engine = TurnsByContent(), BookKeepingEngine()
    first, later = torch.randint(8, 50, (4, 4)), torch.randint(8, 50, (4, 4))
    later[1, 0] = 7
    for ids in (first, later):
        inputs = {"ids": ids}
        found = engine.clipped_sum(
            model, inputs, example_loss=turned_losses, clipping=FlatClipping(0.1)
        )
        assert_same_sum(found, naive(model, inputs, 0.1, turned_losses), 1e-10)


class PicksOfTurned(nn.Module):
    """Takes masked numbers from the place that turning examples and positions round gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = self.layer(x)
        if hidden.shape[0] == hidden.shape[1]:
            hidden = torch.where(mask[:, :, None], hidden, hidden.transpose(0, 1))
        losses: Tensor = self.head(hidden).square().flatten(1).sum(1)
        return losses


def picked_of_turned(engine: BookKeepingEngine) -> None:
    """The same graph twice, which only in the second batch lets examples meet."""
    torch.manual_seed(1)
    model, x = PicksOfTurned().double(), torch.randn(4, 4, 3).double()
    own = torch.ones(4, 4, dtype=torch.bool)
    losses = {"example_loss": lambda m, b: m(**b), "clipping": FlatClipping(0.1)}
    engine.clipped_sum(model, {"x": x, "mask": own}, **losses)
    engine.clipped_sum(model, {"x": x, "mask": own.triu()}, **losses)


def test_what_a_mask_picks_of_turned_axes_is_proved_every_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UncoveredParameterError):
        picked_of_turned(BookKeepingEngine())
    turned = moving.turned

    def certain(node: Any, tensors: Any) -> Any:
        turn = turned(node, tensors)
        return None if turn is None else replace(turn, ambiguous=False)

    monkeypatch.setattr(by_content, "turned", certain)  # planted
    monkeypatch.setattr(by_content, "arranges", lambda *_: False)  # sees a graph without twins
    picked_of_turned(BookKeepingEngine())


class Reshaped(nn.Module):
    """Examples meet by broadcasting a reshape, once they are far apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        count, width = h.shape
        gaps = (h.view(count, 1, width) - h.view(1, count, width)).pow(2).sum(2)
        losses: Tensor = h.pow(2).sum(1) + torch.relu(gaps - 40).mean(1)
        return losses


def test_examples_that_meet_by_reshapes_are_refused() -> None:
    torch.manual_seed(0)
    model, engine = Reshaped().double(), BookKeepingEngine()

    def summed(scale: float) -> object:
        batch = {"x": torch.randn(5, 4).double() * scale}
        losses = lambda model, batch: model(batch["x"])  # noqa: E731
        return engine.clipped_sum(model, batch, example_loss=losses, clipping=FlatClipping(1.0))

    summed(0.1)
    with pytest.raises(UncoveredParameterError):
        summed(30.0)


def test_a_function_that_is_not_known_is_proved_every_time() -> None:
    kind = type("FancyNewBackward0", (), {})
    assert is_moving(kind)
    assert not is_moving(type("SiluBackward0", (), {}))


class Grouped(nn.Module):
    """Adds to each token the mean of its group of six, whoever owns the others."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(D, D), nn.Linear(D, D)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        groups = self.below(x).tanh().reshape(-1, 6, D)
        found = self.above((groups + groups.mean(1, keepdim=True)).reshape(x.shape))
        losses: Tensor = found.square().sum((1, 2))
        return losses


class TurnsPositions(Grouped):
    """Flattens positions before examples, where there are several."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.above(self.below(x).tanh().transpose(0, 1).reshape(-1, D))
        losses: Tensor = rows.reshape(x.shape[1], x.shape[0], D).square().sum((0, 2))
        return losses


def at_lengths(model: nn.Module, first: int, later: int) -> None:
    torch.manual_seed(0)
    engine, sizes = AutomaticEngine(), {"first": first, "later": later}
    for positions in sizes.values():
        inputs = {"x": torch.randn(4, positions, D, dtype=torch.float64)}
        found = engine.clipped_sum(
            model, inputs, example_loss=lambda m, b: m(**b), clipping=FlatClipping(0.1)
        )
        if positions % 6 == 0 or isinstance(model, TurnsPositions):
            assert_same_sum(found, naive(model, inputs, 0.1, lambda m, b: m(**b)), 1e-9)


def test_groups_of_tokens_of_several_examples_are_seen() -> None:
    """Six positions are a group of one example's; of nine some groups are of two."""
    at_lengths(Grouped(), 6, 12)
    with pytest.raises((UncoveredParameterError, RuntimeError)):  # alone, nine make no groups
        at_lengths(Grouped(), 6, 9)


def test_an_axis_that_was_turned_while_it_had_one_place_is_proved_anew() -> None:
    at_lengths(TurnsPositions(), 1, 5)
