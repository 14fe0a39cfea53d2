"""The engine that chooses: book-keeping as long as it covers the model, and a word when it does not."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import pytest
import torch
from engine_zoo import Batch, assert_same_sum, batch, build, naive, own_losses
from torch import Tensor, nn
from torch.nn import functional as F
from toy_nets import C, Net, data, squares

from hf_dp.clipping import FlatClipping
from hf_dp.engines import (
    ENGINES,
    AutomaticEngine,
    BookKeepingEngine,
    GradientEngine,
    SequentialEngine,
    TwoPassEngine,
    engine_named,
)
from hf_dp.engines.base import ExampleLoss
from hf_dp.errors import ConfigurationError, HfDpError, UncoveredParameterError
from hf_dp.layers import DEFAULT_LAYER_RULES
from hf_dp.sums import ClippedSum


def outside(model: nn.Module, inputs: Batch) -> Tensor:
    """Uses a weight where no module can answer for it."""
    return squares(model, inputs) + model.get_parameter("first.weight").sum()


class Sometimes(Net):
    """Uses the second layer, and the first layer's weight alone, only for long inputs."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if x.shape[1] > 3:
            hidden = self.second(hidden) + F.linear(x, self.first.weight)
        return hidden


def chosen_sum(
    engine: AutomaticEngine, model: nn.Module, inputs: Batch, loss: ExampleLoss = squares
) -> ClippedSum:
    return engine.clipped_sum(model, inputs, example_loss=loss, clipping=FlatClipping(C))


def test_a_covered_model_is_book_kept_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    engine = AutomaticEngine()
    found = chosen_sum(engine, Net(), data())
    assert_same_sum(found, naive(Net(), data(), C, squares), 1e-12)
    assert isinstance(engine.chosen, BookKeepingEngine)
    assert caplog.messages == []


def test_an_uncovered_model_is_taken_one_by_one_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, model = AutomaticEngine(), Net()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = chosen_sum(engine, model, data(), outside)
            assert_same_sum(found, naive(model, data(), C, outside), 1e-12)
    assert isinstance(engine.chosen, SequentialEngine)
    [said] = caplog.messages
    assert "engine='sequential'" in said
    assert "as slow as training with batches of one" in said
    assert "first.weight" in said


def test_an_empty_batch_decides_nothing() -> None:
    engine, model = AutomaticEngine(), Net()
    chosen_sum(engine, model, {"x": torch.zeros(0, 3, 6, dtype=torch.float64)})
    assert engine.chosen is None


@pytest.mark.parametrize(
    ("trained", "checkpoints", "expected"),
    [
        ("", False, BookKeepingEngine),
        ("", True, TwoPassEngine),
        ("classifier", True, BookKeepingEngine),
    ],
)
def test_checkpointing_of_a_model_that_is_mostly_trained_takes_two_passes(
    trained: str, checkpoints: bool, expected: type
) -> None:
    engine, model = AutomaticEngine(), build("bert-cls")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    if checkpoints:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    engine.clipped_sum(model, batch("bert-cls"), example_loss=own_losses, clipping=FlatClipping(C))
    assert type(engine.chosen) is expected


def test_what_turns_up_uncovered_later_is_still_exact() -> None:
    engine, model = AutomaticEngine(), Sometimes()
    for positions in (3, 4, 3, 4):
        inputs = data(positions=positions)
        found = chosen_sum(engine, model, inputs)
        assert_same_sum(found, naive(model, inputs, C, squares), 1e-12)


def test_what_a_later_example_brings_up_is_exact_and_not_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line in the log at the step that drew it would tell that it was drawn."""
    engine, model = AutomaticEngine(), Net()
    chosen_sum(engine, model, data())
    covered = BookKeepingEngine.clipped_sum

    def at_its_limits(*args: Any, **kwargs: Any) -> ClippedSum:
        raise UncoveredParameterError("this example went another way")

    monkeypatch.setattr(BookKeepingEngine, "clipped_sum", at_its_limits)
    found = chosen_sum(engine, model, data())
    assert_same_sum(found, naive(model, data(), C, squares), 1e-12)
    monkeypatch.setattr(BookKeepingEngine, "clipped_sum", covered)
    chosen_sum(engine, model, data())
    assert isinstance(engine.chosen, BookKeepingEngine)
    assert caplog.messages == []


class Whole(Net):
    """Uses a weight outside its module, and looks at its numbers, which cannot be vectorised."""

    def forward(self, x: Tensor) -> Tensor:
        scale = 2.0 if bool((x > 1e9).any()) else 1.0
        return self.second(self.first(x)) + scale * F.linear(x, self.first.weight)


def test_where_only_the_whole_model_answers_one_by_one_no_detour_is_made(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, model = AutomaticEngine(), Whole()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = chosen_sum(engine, model, data())
            assert_same_sum(found, naive(model, data(), C, squares), 1e-12)
    assert isinstance(engine.chosen, SequentialEngine)
    assert "parameters ['first.weight'], which only the whole model answers" in caplog.messages[0]
    assert "a small module of their own" in caplog.messages[0]
    assert len(caplog.messages) == 1


def test_the_first_batch_may_hold_one_example() -> None:
    engine, model = AutomaticEngine(), Net()
    for rows in (1, 4, 1):
        found = chosen_sum(engine, model, data(rows=rows))
        assert_same_sum(found, naive(model, data(rows=rows), C, squares), 1e-12)
    assert isinstance(engine.chosen, BookKeepingEngine)


def test_other_errors_are_not_swallowed() -> None:
    engine = AutomaticEngine()
    with pytest.raises(ConfigurationError, match="one loss per example"):
        engine.clipped_sum(
            Net(),
            data(),
            example_loss=lambda model, inputs: squares(model, inputs).mean(),
            clipping=FlatClipping(C),
        )
    assert isinstance(engine.chosen, BookKeepingEngine)


def test_rules_are_passed_on() -> None:
    asked: list[nn.Module] = []

    def mine(module: nn.Module, *given: Any) -> Any:
        asked.append(module)
        return DEFAULT_LAYER_RULES[nn.Linear](module, *given)

    for name in ("auto", "book_keeping"):
        asked.clear()
        engine = engine_named(name, {**DEFAULT_LAYER_RULES, nn.Linear: mine})
        engine.clipped_sum(Net(), data(), example_loss=squares, clipping=FlatClipping(C))
        assert asked


@pytest.mark.parametrize("name", ENGINES)
def test_engines_are_found_by_their_own_name(name: str) -> None:
    engine = engine_named(name)
    assert isinstance(engine, GradientEngine)
    assert engine.name == name


def test_an_unknown_engine_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigurationError, match=r"engine='bookkeeping'.*'book_keeping'\?"):
        engine_named("bookkeeping")
    with pytest.raises(HfDpError, match="Choose one of auto, book_keeping, sequential"):
        engine_named("ghost")


@pytest.mark.parametrize("kind", [RuntimeError, IndexError, AssertionError])
def test_foreign_code_that_fails_under_taps_is_taken_one_by_one(
    kind: type[Exception], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> ClippedSum:
        raise kind(reason)

    monkeypatch.setattr(BookKeepingEngine, "clipped_sum", fails)
    engine, model, reason = AutomaticEngine(), Net(), "what an example holds"
    with caplog.at_level(logging.WARNING):
        found = chosen_sum(engine, model, data())
    assert_same_sum(found, naive(model, data(), C, squares), 1e-12)
    assert f"raised a {kind.__name__} under taps" in caplog.text
    assert reason not in caplog.text
    monkeypatch.undo()
    proved = AutomaticEngine()
    chosen_sum(proved, model, data())
    monkeypatch.setattr(BookKeepingEngine, "clipped_sum", fails)
    caplog.clear()
    later = chosen_sum(proved, model, data())  # of one batch nothing is said
    assert_same_sum(later, naive(model, data(), C, squares), 1e-12)
    assert isinstance(proved.chosen, BookKeepingEngine)
    assert not caplog.text
    monkeypatch.setattr(SequentialEngine, "clipped_sum", fails)
    with pytest.raises(kind, match=reason):
        chosen_sum(proved, model, data())


def test_memory_that_runs_out_under_taps_is_the_hosts_affair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*args: Any, **kwargs: Any) -> ClippedSum:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(BookKeepingEngine, "clipped_sum", fails)
    with pytest.raises(RuntimeError, match="not enough memory"):
        chosen_sum(AutomaticEngine(), Net(), data())


def test_what_fails_one_by_one_too_says_nothing_of_the_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A mistake in somebody's loss, mended, is no reason to be slow from then on."""
    engine, model = AutomaticEngine(), Net()
    with pytest.raises(KeyError, match="label"):
        engine.clipped_sum(
            model,
            data(),
            example_loss=lambda model, inputs: inputs["label"],
            clipping=FlatClipping(C),
        )
    assert caplog.messages == []
    chosen_sum(engine, model, data())
    assert isinstance(engine.chosen, BookKeepingEngine)


class _Marker:
    """Something in a frame of the failed pass."""


def test_the_failed_pass_is_gone_before_examples_are_taken_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[weakref.ref[_Marker]] = []

    def fails(*_: Any, **__: Any) -> ClippedSum:
        held = _Marker()
        seen.append(weakref.ref(held))
        raise UncoveredParameterError("expected something else")

    sequential = SequentialEngine.clipped_sum

    def checked(*args: Any, **kwargs: Any) -> ClippedSum:
        assert seen.pop()() is None
        return sequential(*args, **kwargs)

    monkeypatch.setattr(BookKeepingEngine, "clipped_sum", fails)
    monkeypatch.setattr(SequentialEngine, "clipped_sum", checked)
    model = Net()
    found = engine_named("auto").clipped_sum(
        model, data(), example_loss=squares, clipping=FlatClipping(C)
    )
    assert_same_sum(found, naive(model, data(), C, squares), 1e-12)


def adversarial(model: nn.Module, inputs: Batch, *, enabled: bool = True) -> Tensor:
    """At the place near each example where its loss is larger (Goodfellow et al., 2014)."""
    with torch.set_grad_enabled(enabled or torch.is_grad_enabled()):
        x = inputs["x"].clone().requires_grad_()
        steps = torch.autograd.grad(squares(model, {"x": x}).sum(), x)[0].sign()
    return squares(model, {"x": x.detach() + 0.1 * steps})


def for_the_gradient(model: nn.Module, inputs: Batch) -> Tensor:
    return adversarial(model, inputs, enabled=False)


@pytest.mark.parametrize("loss", [adversarial, for_the_gradient])
def test_a_loss_with_a_backward_pass_of_its_own_is_taken_one_by_one(loss: ExampleLoss) -> None:
    expected = naive(Net(), data(), C, loss)
    found = engine_named("auto").clipped_sum(
        Net(), data(), example_loss=loss, clipping=FlatClipping(C)
    )
    assert_same_sum(found, expected, 1e-12)
    for name in ("book_keeping", "two_pass"):
        with pytest.raises(
            UncoveredParameterError, match=r"a backward pass of its own.*Use engine="
        ):
            engine_named(name).clipped_sum(
                Net(), data(), example_loss=loss, clipping=FlatClipping(C)
            )
