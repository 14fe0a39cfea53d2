"""The two-pass engine: one graph, the same masks, and nothing kept between layers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from engine_zoo import assert_same_sum, batch, build, build_lora, own_losses
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from hf_dp.clipping import FlatClipping
from hf_dp.engines import engine_named, two_pass
from hf_dp.errors import UncoveredParameterError
from hf_dp.sums import ClippedSum

C = 0.5


def clipped(engine: str, model: nn.Module, inputs: dict[str, Any]) -> ClippedSum:
    return engine_named(engine).clipped_sum(
        model, inputs, example_loss=own_losses, clipping=FlatClipping(C)
    )


def with_checkpoints(model: nn.Module) -> nn.Module:
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("make", [build, build_lora])
@pytest.mark.parametrize("name", ["bert-cls", "gpt2-lm", "t5-seq2seq"])
def test_both_passes_see_the_same_dropout_masks(name: str, make: Any, checkpoints: bool) -> None:
    sums = []
    for engine in ("book_keeping", "two_pass"):
        model = make(name, torch.float64).train()
        assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        if checkpoints:
            with_checkpoints(model)
        clipped(engine, model, batch(name))  # whatever is found out at first is known by now
        torch.manual_seed(3)
        sums.append(clipped(engine, model, batch(name)))
    assert_same_sum(sums[1], sums[0], 1e-12)


class _Live(TorchDispatchMode):
    """Bytes of the storages made under it that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


@contextmanager
def live_bytes() -> Iterator[_Live]:
    with _Live() as mode:
        yield mode


def deep() -> nn.Module:
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=11, n_embd=32, n_layer=12, n_head=2, n_positions=64, use_cache=False
    )
    return with_checkpoints(tf.GPT2LMHeadModel(config)).train()


def test_with_checkpoints_it_keeps_less_than_book_keeping() -> None:
    ids = torch.randint(11, (16, 64), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    peaks = {}
    for engine in ("book_keeping", "two_pass"):
        model, known = deep(), engine_named(engine)
        for _ in range(2):
            with live_bytes() as live:
                known.clipped_sum(model, inputs, example_loss=own_losses, clipping=FlatClipping(C))
        peaks[engine] = live.peak
    assert peaks["two_pass"] < 0.6 * peaks["book_keeping"]


def test_a_use_in_the_backward_pass_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm taken before all parts have come would be too small."""
    model, inputs = build("bert-cls"), batch("bert-cls")
    known = engine_named("two_pass")

    def run() -> ClippedSum:
        return known.clipped_sum(model, inputs, example_loss=own_losses, clipping=FlatClipping(C))

    run()
    from hf_dp.engines import recorder

    forward = recorder.recording

    @contextmanager
    def forgetful(*args: Any) -> Iterator[Any]:
        with forward(*args) as record:
            backward = record.backward

            def fewer(*args: Any, **kwargs: Any) -> None:
                record.uses.subtract(record.uses.keys())
                backward(*args, **kwargs)

            record.backward = fewer
            yield record

    monkeypatch.setattr(recorder, "recording", forgetful)
    with pytest.raises(UncoveredParameterError, match="One came up in the backward pass only"):
        run()


class Counting(nn.Module):
    """A layer that is another one at every call: its gradient grows with each run."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.gain.cos() * self.calls


def from_the_first_call(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    model.calls = 0
    return model(inputs["x"]).sum(1)


@pytest.mark.parametrize("bounded", [True, False])
def test_a_module_that_does_not_repeat_itself_adds_no_more_than_its_norm(
    bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not bounded:
        monkeypatch.setattr(two_pass._Norms, "no_longer", lambda _self, _name, *given: given)
    monkeypatch.setattr("hf_dp.engines.vectorised.refuse_lost", lambda *_: None)
    monkeypatch.setattr("hf_dp.layers.repeats.Marks.check", lambda *_, **__: None)
    inputs = {"x": torch.randn(1, 4, generator=torch.Generator().manual_seed(0))}
    found = engine_named("two_pass").clipped_sum(
        Counting(), inputs, example_loss=from_the_first_call, clipping=FlatClipping(0.01)
    )
    moved = float(found.grads["gain"].norm())
    assert (moved <= 0.01 * (1 + 1e-6)) is bounded


class Drifts(nn.Module):
    """Behind a checkpoint: every time that it runs, it multiplies by ten more."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(4, 6), nn.Linear(6, 6)
        self.times, self.drifting = 0, False

    def inner(self, hidden: Tensor) -> Tensor:
        self.times += self.drifting
        hidden = self.above(hidden * 10.0**self.times)
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self.inner, self.below(x).tanh(), use_reentrant=False)
        return hidden.flatten(1).sum(1)


@pytest.mark.parametrize("planted", [False, True])
def test_a_checkpoint_that_does_not_repeat_itself_adds_no_more_than_the_norm(
    planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if planted:
        monkeypatch.setattr(two_pass._Norms, "_repeated", lambda *_: True)
    model, engine = Drifts(), engine_named("two_pass")

    def summed(x: Tensor) -> Tensor:
        found = engine.clipped_sum(
            model, {"x": x}, example_loss=lambda m, b: m(**b), clipping=FlatClipping(C)
        )
        return torch.cat([grad.flatten() for grad in found.grads.values()])

    summed(torch.randn(3, 5, 4))
    model.drifting = True
    assert (summed(torch.randn(1, 5, 4).expand(2, -1, -1)).norm() > 2 * C * (1 + 1e-5)) == planted


def test_a_checkpoint_that_repeats_itself_is_not_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = with_checkpoints(build("gpt2-lm", torch.float32).train())
    seen, repeated = [], two_pass._Norms._repeated

    def noted(self: Any, name: str, factor: Any) -> bool:
        seen.append((self._passed.recomputed, repeated(self, name, factor)))
        return seen[-1][1]

    monkeypatch.setattr(two_pass._Norms, "_repeated", noted)
    clipped("two_pass", model, batch("gpt2-lm"))
    assert set(seen) == {(True, True)}
