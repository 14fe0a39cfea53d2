"""An example that is dropped does not harm its batch mates, whatever the model does with gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_zoo import Batch, assert_same_sum, difference, length, naive
from torch import Tensor, nn

from hf_dp.clipping import FlatClipping, LossRelease
from hf_dp.engines import AutomaticEngine, BookKeepingEngine, TwoPassEngine
from hf_dp.engines.by_content import hooks_on_gradients
from hf_dp.engines.owners import Owners

pytestmark = pytest.mark.usefixtures("taken_as_familiar")

C = 0.1
ENGINES = [BookKeepingEngine, TwoPassEngine]


class Guard(torch.autograd.Function):
    """Empties the gradients of a whole batch if one of them is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> Tensor:
        return emptied(grads)


def emptied(grads: Tensor) -> Tensor:
    return grads if bool(torch.isfinite(grads).all()) else torch.zeros_like(grads)


def hooked(hidden: Tensor) -> Tensor:
    if hidden.requires_grad:
        hidden.register_hook(emptied)
    return hidden


class Net(nn.Module):
    def __init__(self, guard: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below, self.above, self.guard = nn.Linear(4, 4), nn.Linear(4, 4), guard
        self.double()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        hidden = self.guard(torch.tanh(self.below(x)))
        return self.above(hidden).square().sum((1, 2)) * scale


def losses(model: nn.Module, inputs: Batch) -> Tensor:
    out: Tensor = model(**inputs)
    return out


def data(rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 3, 4, generator=generator, dtype=torch.float64)
    return {"x": x, "scale": torch.ones(rows, dtype=torch.float64)}


def of_others(inputs: Batch, bad: int) -> Batch:
    return {k: torch.cat([v[:bad], v[bad + 1 :]]) for k, v in inputs.items()}


@pytest.mark.parametrize("guard", [Guard.apply, hooked], ids=["function", "hook"])
@pytest.mark.parametrize("kind", ENGINES)
def test_guards_against_overflow_do_not_empty_batch_mates(
    kind: Any, guard: Callable[[Tensor], Tensor]
) -> None:
    engine, model = kind(), Net(guard)
    options = {"example_loss": losses, "clipping": FlatClipping(C)}
    engine.clipped_sum(model, data(), **options)
    inputs = data()
    inputs["scale"][2] = torch.inf
    found = engine.clipped_sum(model, inputs, loss_release=LossRelease(), **options)
    others = of_others(inputs, 2)
    expected = naive(model, others, C * LossRelease().gradient_share("l2"), losses)
    assert length(difference(found.grads, expected.grads)) <= 1e-6 * C
    assert not torch.isfinite(found.norms[2])
    torch.testing.assert_close(found.norms[[0, 1, 3, 4, 5]], expected.norms, rtol=1e-9, atol=0)
    rest = engine.clipped_sum(model, others, loss_release=LossRelease(), **options)
    torch.testing.assert_close(found.loss_sum, rest.loss_sum, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_user_with_one_bad_row_is_taken_out_whole(kind: Any) -> None:
    engine, model, inputs = kind(), Net(Guard.apply), data()
    inputs["scale"][2] = torch.nan
    options = {"example_loss": losses, "clipping": FlatClipping(C)}
    found = engine.clipped_sum(model, inputs, owners=Owners((1, 3, 2)), **options)
    rows = [0, 4, 5]
    rest = {name: value[rows] for name, value in inputs.items()}
    expected = engine.clipped_sum(model, rest, owners=Owners((1, 2)), **options)
    assert_same_sum_of_others(found, expected)


def assert_same_sum_of_others(found: Any, expected: Any) -> None:
    assert not torch.isfinite(found.norms[1])
    torch.testing.assert_close(found.norms[[0, 2]], expected.norms, rtol=1e-12, atol=0)
    assert length(difference(found.grads, expected.grads)) <= 1e-12 * length(expected.grads)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_batch_of_bad_examples_adds_nothing(kind: Any) -> None:
    inputs = data(3)
    inputs["scale"][:] = torch.nan
    found = kind().clipped_sum(
        Net(Guard.apply), inputs, example_loss=losses, clipping=FlatClipping(C)
    )
    assert length(found.grads) == 0
    assert not torch.isfinite(found.norms).any()


@pytest.mark.parametrize("kind", ENGINES)
def test_left_in_the_batch_it_would_empty_them(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the sum of the pass in which something was dropped."""
    monkeypatch.setattr("hf_dp.engines.vectorised.without_dropped", lambda summed, *_: summed)
    with pytest.raises(AssertionError):
        test_guards_against_overflow_do_not_empty_batch_mates(kind, Guard.apply)


def test_what_bounds_all_gradients_together_is_seen_in_the_first_batch() -> None:
    """Inactive on what the model sees first, and by a factor of a thousand."""

    class Bounded(Net):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            def bound(grads: Tensor) -> Tensor:
                return grads * (1e3 / grads.norm()).clamp_max(1)

            self.guard = lambda hidden: hooked_by(hidden, bound)
            return super().forward(x, scale)

    engine, model, inputs = AutomaticEngine(), Bounded(hooked), data()
    options = {"example_loss": losses, "clipping": FlatClipping(C)}
    engine.clipped_sum(model, inputs, **options)
    inputs["scale"][2] = 1e6
    found = engine.clipped_sum(model, inputs, **options)
    assert_same_sum(found, naive(model, inputs, C, losses), 1e-6)


def hooked_by(hidden: Tensor, hook: Callable[[Tensor], Tensor]) -> Tensor:
    if hidden.requires_grad:
        hidden.register_hook(hook)
    return hidden


class MixesLater(Net):
    """A hook that hands every row's gradient to the next, once it is told to."""

    later = False

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        self.guard = lambda hidden: hooked_by(hidden, self.turn)
        return super().forward(x, scale)

    def turn(self, grads: Tensor) -> Tensor:
        return grads.roll(1, 0) if self.later else grads


@pytest.mark.parametrize("noted", [True, False])
def test_hooks_on_gradients_are_proved_every_time(
    noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not noted:  # planted
        monkeypatch.setattr("hf_dp.engines.recorder.hooks_on_gradients", contextlib.nullcontext)
    engine, model = BookKeepingEngine(), MixesLater(hooked)
    before = Tensor.register_hook
    options = {"example_loss": losses, "clipping": FlatClipping(C)}
    engine.clipped_sum(model, data(), **options)
    model.later = True
    seen = contextlib.nullcontext() if noted else pytest.raises(AssertionError)
    with seen:
        found = engine.clipped_sum(model, data(), **options)
        assert_same_sum(found, naive(model, data(), C, losses), 1e-9)
    assert Tensor.register_hook is before


def test_hooks_that_only_watch_are_not_noted() -> None:
    """As those of torch's own counters of work."""
    x = torch.ones(2, requires_grad=True)
    with hooks_on_gradients() as found:
        torch.autograd.graph.register_multi_grad_hook((x,), lambda grads: None)
        assert not found
        x.register_hook(lambda grad: grad)
        assert len(found) == 1
