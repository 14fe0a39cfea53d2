"""Nothing but its own content drops an example: not the padding that a longer one brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Sentences, collate, tiny_bert, trainer_for
from torch import Tensor, nn
from user_runs import Recorded, clipped, close

from hf_dp.training import step

C = 0.5
FAR = 6  # more padding than made-up examples get
SHORT = [{**row, "labels": 0} for row in Sentences(12).rows]


class NotANumber(nn.Module):
    """Embeddings whose gradient is nan where there is much padding; no loss shows it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, **options: Any) -> Tensor:
        out: Tensor = self.inner(input_ids=input_ids, **options)
        far = ((input_ids == 0).cumsum(1) > FAR)[..., None]
        steep = torch.where(far, out * 0, 1.0).sqrt()
        return torch.where(far, steep, out)


def model() -> nn.Module:
    made = tiny_bert()
    made.bert.embeddings = NotANumber(made.bert.embeddings)
    return made


def long(label: int = 0, length: int = 15) -> dict[str, Any]:
    return {"input_ids": list(range(8, 8 + length)), "labels": label}


def run(folder: Path, rows: list[dict[str, Any]], **dp: Any) -> None:
    """One step on all rows."""
    asked = {"clipping_norm": C, "expected_batch_size": len(rows), "private_loss": False, **dp}
    host = {"max_steps": 1, "per_device_train_batch_size": 16, "remove_unused_columns": False}
    trainer = trainer_for(folder, model=model(), train_dataset=rows, host=host, dp=asked)
    trainer.train()


def loop(rows: list[dict[str, Any]], together: int = 1) -> Tensor:
    """The clipped sum by plain autograd, so many rows, one user's, at a time."""
    made, total = model().train(), torch.zeros(())
    for start in range(0, len(rows), together):
        losses = [made(**collate([row])).loss for row in rows[start : start + together]]
        grads = torch.autograd.grad(torch.stack(losses).mean(), list(made.parameters()))
        total = total + clipped(torch.cat([grad.flatten() for grad in grads]), C)
    return total


@pytest.mark.parametrize("engine", ["auto", "book_keeping", "two_pass", "sequential"])
def test_a_long_example_drops_no_short_one(tmp_path: Path, recorded: Recorded, engine: str) -> None:
    run(tmp_path / "without", SHORT, engine=engine)
    run(tmp_path / "with", [*SHORT, long()], engine=engine)
    assert (recorded.sums[1] - recorded.sums[0]).norm() <= C * (1 + 1e-5)
    assert close(recorded.sums[1], loop([*SHORT, long()]))
    assert recorded.norms[1].isfinite().all()


def test_where_dropped_ones_are_not_tried_again_it_does(
    tmp_path: Path, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault."""
    monkeypatch.setattr(step.Units, "with_dropped_again", lambda _, summed: summed)
    run(tmp_path / "without", SHORT)
    run(tmp_path / "with", [*SHORT, long()])
    assert (recorded.sums[1] - recorded.sums[0]).norm() > 3 * C


def test_a_long_text_drops_no_user(tmp_path: Path, recorded: Recorded) -> None:
    rows = [{**row, "user_id": place // 3} for place, row in enumerate([*SHORT, *[long()] * 3])]
    dp = {"privacy_unit": "user", "max_examples_per_user": 3, "expected_batch_size": 5}
    run(tmp_path, rows, **dp)
    assert close(recorded.sums[0], loop([*SHORT, *[long()] * 3], 3))


def test_what_drops_by_itself_stays_out(tmp_path: Path, recorded: Recorded) -> None:
    """An example that is no number even alone: its own padding reaches too far."""
    padded = {"input_ids": [9, 10, *[0] * 12], "labels": 1}
    run(tmp_path, [*SHORT, padded, long()])
    assert close(recorded.sums[0], loop([*SHORT, long()]))
    assert (~recorded.norms[0].isfinite()).sum() == 1


def test_a_micro_batch_in_parts(tmp_path: Path, recorded: Recorded, monkeypatch: Any) -> None:
    """Memory runs out at more than five examples: each part's dropped examples are found again."""
    inner = step.MemoryLimit._cut

    def in_fives(self: Any, inputs: Any) -> Any:
        self.cells = 5 * inputs["input_ids"].shape[1]
        return inner(self, inputs)

    monkeypatch.setattr(step.MemoryLimit, "_cut", in_fives)
    run(tmp_path, [*SHORT, long()])
    assert close(recorded.sums[0], loop([*SHORT, long()]))
    assert len(recorded.norms[0]) == len(SHORT) + 1
