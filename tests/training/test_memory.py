"""Running out of memory halves the micro-batch and changes no sum; a token budget cuts micro-batches."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Sentences, collate, fixed, tiny_bert, trainer_for, weights
from torch import Tensor

from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine
from hf_dp.engines.rows import batch_size
from hf_dp.errors import ConfigurationError
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.sums import ClippedSum
from hf_dp.training import memory
from hf_dp.training.batches import LogicalBatchCollator
from hf_dp.training.memory import MemoryLimit, is_out_of_memory
from hf_dp.training.tasks import Task
from hf_dp.training.vectorised import vectorised_loss

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Small(BookKeepingEngine):
    """Fits so many rows; fails in the middle of its work above that."""

    def __init__(self, rows: int, error: Exception = OUT_OF_MEMORY) -> None:
        super().__init__()
        self.rows, self.error = rows, error
        self.tried: list[int] = []

    def clipped_sum(self, model: Any, inputs: Any, **parts: Any) -> ClippedSum:
        self.tried.append(batch_size(inputs))
        summed = super().clipped_sum(model, inputs, **parts)
        if batch_size(inputs) > self.rows:
            raise self.error
        return summed


def parts_of(limit: MemoryLimit, engine: Small, rows: int = 12, seed: int = 0) -> ClippedSum:
    data = Sentences(rows, seed)
    inputs = collate([data[i] for i in range(rows)])
    model = tiny_bert()
    loss = vectorised_loss(Task.SEQUENCE_CLASSIFICATION)

    def sum_over(part: Any) -> ClippedSum:
        return engine.clipped_sum(model, part, example_loss=loss, clipping=FlatClipping(0.1))

    total: ClippedSum | None = None
    for part in limit.each_part(inputs, sum_over):
        total = part if total is None else total + part
    assert total is not None
    return total


def close(one: ClippedSum, other: ClippedSum) -> bool:
    pairs = [(one.grads[name], other.grads[name]) for name in one.grads]
    pairs += [(one.norms, other.norms), (one.losses, other.losses)]
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("fits", [1, 2, 3, 5, 11, 12, 100])
def test_the_sum_does_not_change(fits: int) -> None:
    expected = parts_of(MemoryLimit(), Small(100))
    found = parts_of(MemoryLimit(), Small(fits))
    assert close(found, expected)


def test_a_failed_attempt_that_left_something_behind_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = parts_of(MemoryLimit(), Small(100))
    monkeypatch.setattr(MemoryLimit, "each_part", twice)
    assert not close(parts_of(MemoryLimit(), Small(100)), expected)
    monkeypatch.setattr(MemoryLimit, "each_part", forgetful)
    assert not close(parts_of(MemoryLimit(), Small(3)), expected)


def twice(self: MemoryLimit, inputs: Any, sum_over: Any) -> Iterator[ClippedSum]:
    """Counts the first half, then does all of it again."""
    yield sum_over({name: value[: len(value) // 2] for name, value in inputs.items()})
    yield sum_over(inputs)


def forgetful(self: MemoryLimit, inputs: Any, sum_over: Any) -> Iterator[ClippedSum]:
    """Goes on with the first half only."""
    while (summed := memory._attempt(partial(sum_over, inputs), 2)) is None:
        inputs = {name: value[: len(value) // 2] for name, value in inputs.items()}
    yield summed


def test_later_micro_batches_start_at_the_halved_size() -> None:
    limit, engine = MemoryLimit(), Small(5)
    parts_of(limit, engine)
    assert engine.tried == [12, 6, 3, 3, 3, 3]
    engine.tried.clear()
    parts_of(limit, engine)
    assert engine.tried == [3, 3, 3, 3]
    engine.tried.clear()
    parts_of(limit, engine, rows=2)
    assert engine.tried == [2]


def test_shorter_examples_may_be_more() -> None:
    limit, tried = MemoryLimit(), []

    def sum_over(inputs: Any) -> ClippedSum:
        tried.append(tuple(inputs["x"].shape))
        if inputs["x"].numel() > 40:
            raise OUT_OF_MEMORY
        return ClippedSum({}, torch.zeros(0), torch.zeros(0))

    for width in (10, 5, 1):
        list(limit.each_part({"x": torch.zeros(8, width)}, sum_over))
    assert tried == [(8, 10), (4, 10), (4, 10), (8, 5), (8, 1)]


def test_one_example_that_does_not_fit_is_a_clear_error(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, coins=fixed(), dp={"preflight": False})
    trainer.engine = Small(0)
    before = weights(trainer.model)
    with pytest.raises(ConfigurationError, match="one example: expected it to fit in memory"):
        trainer.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 0
    assert torch.equal(weights(trainer.model), before)


@pytest.mark.parametrize(
    "error",
    [
        OUT_OF_MEMORY,
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=str,
)
def test_every_way_of_running_out_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert close(parts_of(MemoryLimit(), Small(6, error)), parts_of(MemoryLimit(), Small(100)))


def test_torch_itself_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


def test_other_errors_are_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        parts_of(MemoryLimit(), Small(3, RuntimeError("shapes do not fit")))


def test_a_failed_attempt_keeps_no_tensor_alive() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def sum_over(inputs: Any) -> ClippedSum:
        assert all(earlier() is None for earlier in kept)
        large = torch.zeros(10)
        kept.append(weakref.ref(large))
        if batch_size(inputs) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ClippedSum({}, torch.zeros(0), torch.zeros(0))

    list(MemoryLimit().each_part({"x": torch.zeros(4, 2)}, sum_over))
    assert len(kept) == 3


def test_a_whole_run_is_the_same_and_the_log_tells_no_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = []
    for fits in (100, 2):
        trainer = trainer_for(tmp_path / str(fits), coins=fixed(), dp={"preflight": False})
        trainer.engine = Small(fits)
        with caplog.at_level(logging.INFO):
            trainer.train()
        results.append(weights(trainer.model))
    torch.testing.assert_close(*results)
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert said
    assert not any(character.isdigit() for line in said for character in line)


# ---- the token budget --------------------------------------------------------------------------------


def pieces(budget: int | None, size: int = 4, rows: int = 40) -> list[dict[str, Tensor]]:
    data = Sentences(rows)
    collator = LogicalBatchCollator(collate, size, "input_ids", budget)
    found: list[dict[str, Tensor]] = collator([data[i] for i in range(rows)]).micro_batches
    return found


@pytest.mark.parametrize("budget", [1, 8, 9, 30, 64, 10_000])
def test_a_budget_bounds_rows_times_longest_and_loses_no_example(budget: int) -> None:
    batches = pieces(budget)
    for batch in batches:
        rows, longest = batch["input_ids"].shape
        assert rows * longest <= budget or rows == 1
    texts = sorted(
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )
    assert texts == sorted(tuple(row["input_ids"]) for row in Sentences(40).rows)


def test_no_micro_batch_could_take_the_next_example_too() -> None:
    batches = pieces(30)
    for batch in batches[:-1]:
        rows, longest = batch["input_ids"].shape
        assert (rows + 1) * longest > 30


def test_without_a_budget_the_number_of_rows_counts() -> None:
    assert {len(batch["labels"]) for batch in pieces(None)} == {4}
    assert {len(batch["labels"]) for batch in pieces(10_000)} == {40}


def test_examples_of_unknown_length_are_cut_by_their_number() -> None:
    collator = LogicalBatchCollator(
        lambda rows: {"x": torch.zeros(len(rows), 2)},
        3,
        "text",
        100,
    )
    assert [len(b["x"]) for b in collator([object()] * 7).micro_batches] == [3, 3, 1]


def test_a_run_with_a_budget_releases_the_same(tmp_path: Path) -> None:
    results = []
    for budget in (None, 1, 20, 500):
        trainer = trainer_for(
            tmp_path / str(budget), coins=fixed(), dp={"max_tokens_per_micro_batch": budget}
        )
        trainer.train()
        results.append(weights(trainer.model))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


@pytest.mark.parametrize("value", [0, -5])
def test_a_budget_of_nothing_is_refused(tmp_path: Path, value: int) -> None:
    with pytest.raises(ConfigurationError, match="max_tokens_per_micro_batch"):
        trainer_for(tmp_path, dp={"max_tokens_per_micro_batch": value})


# ---- failing in the middle of a pass -----------------------------------------------------------------


class Cramped(torch.nn.Module):
    """Runs out above some rows, in the forward pass or in the backward pass."""

    def __init__(self, rows: int, where: str) -> None:
        super().__init__()
        self.rows, self.where, self.failed = rows, where, 0

    def forward(self, states: Tensor) -> Tensor:
        if len(states) > self.rows:
            if self.where == "forward":
                self.fail()
            elif states.requires_grad:
                states.register_hook(self.fail)
        return states

    def fail(self, *_: object) -> None:
        self.failed += 1
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("engine", ["book_keeping", "two_pass", "sequential"])
def test_a_pass_that_breaks_off_leaves_the_model_whole(
    tmp_path: Path, engine: str, where: str
) -> None:
    results = []
    for rows in (100, 4):  # the made-up examples fit
        model: Any = tiny_bert()
        cramped = model.bert.encoder.layer[1].output.dropout = Cramped(rows, where)
        trainer = trainer_for(
            tmp_path / str(rows),
            model=model,
            coins=fixed(),
            host={"max_steps": 2, "per_device_train_batch_size": 20},
            dp={"engine": engine, "preflight": False, "expected_batch_size": 20},
        )
        trainer.train()
        results.append(weights(model))
        assert all(p.requires_grad for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(*results)
    assert bool(cramped.failed) is (engine != "sequential")
