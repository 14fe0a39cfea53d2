"""What a forward pass changes in parameters and buffers is refused, however it is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import fixed, tiny_bert, trainer_for
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_dp.errors import PrivacyError
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.training import held
from hf_dp.training.held import Held

Change = Callable[["Book", Tensor], object]


class Book(nn.Module):
    """Counts what comes by, as code books with exponential averages do."""

    def __init__(self, change: Change | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("table", torch.zeros(2, 3), persistent=False)
        self.counts = nn.Parameter(torch.zeros(16), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.change = change

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training and self.change is not None:
            self.change(self, hidden.detach().flatten(0, -2).mean(0))
        return hidden * self.scale


def assigned(book: Book, new: Tensor) -> None:
    book.mean.data = book.mean.data * 0.9 + new * 0.1


CHANGES: dict[str, Change] = {
    "data in place": lambda book, new: book.mean.data.mul_(0.9).add_(new, alpha=0.1),
    "data assigned": assigned,
    "detached": lambda book, new: book.mean.detach().add_(new),
    "numpy": lambda book, new: book.mean.numpy().__setitem__(slice(None), new.numpy()),
    "frozen": lambda book, new: book.counts.data.add_(new),
    "trained": lambda book, new: book.scale.data.add_(new.mean()),
    "registered anew": lambda book, new: book.register_buffer("mean", new),
    "new": lambda book, new: book.register_buffer("last", new),
    "grown": lambda book, new: book.register_buffer("mean", torch.cat([book.mean, new])),
    "unsaved": lambda book, new: book.table.data.fill_(float(new[0])),
}


@pytest.mark.parametrize("how", CHANGES)
def test_what_the_forward_pass_changes_is_refused(tmp_path: Path, how: str) -> None:
    model = tiny_bert()
    model.dropout = Book(CHANGES[how])
    dp = {"engine": "sequential", "preflight": False}
    trainer = trainer_for(tmp_path, model=model, coins=fixed(), dp=dp)
    with pytest.raises(PrivacyError, match=r"model\.dropout\.\w+: expected a tensor that the"):
        trainer.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 0


@pytest.mark.parametrize("how", ["data in place", "frozen", "unsaved"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_model_that_kept_something_is_of_no_use_any_more(
    tmp_path: Path, how: str, fails: bool
) -> None:
    """Even if it keeps nothing from then on: what it has enters later steps, and what is saved."""

    def once(book: Book, new: Tensor) -> None:
        book.change = None
        CHANGES[how](book, new)
        if fails:
            raise ValueError("whatever")

    class FromTheFirstStep(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            model.dropout.change = once

    model = tiny_bert()
    model.dropout = Book()
    options = {"dp": {"engine": "sequential", "preflight": False}, "model": model}
    trainer = trainer_for(tmp_path, **options, coins=fixed(), callbacks=[FromTheFirstStep()])
    with pytest.raises(PrivacyError, match=r"expected a tensor that the .* Load the model anew"):
        trainer.train()
    trainer.remove_callback(FromTheFirstStep)
    for other in (trainer, trainer_for(tmp_path / "other", **options)):
        with pytest.raises(PrivacyError, match=r"^model\.dropout: .* Load the model anew"):
            other.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 0
    model.dropout = Book()
    trainer_for(tmp_path / "mended", **options).train()


def test_counts_of_changes_alone_would_miss_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: numbers are not compared."""
    monkeypatch.setattr(held._Numbers, "other_than", lambda *_: [])
    model = tiny_bert()
    model.dropout = Book(CHANGES["data in place"])
    trainer_for(tmp_path, model=model, dp={"engine": "sequential", "preflight": False}).train()
    assert not torch.equal(model.dropout.mean, torch.zeros(16))


def grown(book: Book, new: Tensor) -> None:
    book.register_buffer("table", torch.zeros(3, 3), persistent=False)
    book.register_buffer("other", torch.zeros(3, 3), persistent=False)


def test_tables_that_are_not_saved_may_grow(tmp_path: Path) -> None:
    for change in (None, grown):
        model = tiny_bert()
        model.dropout = Book(change)
        trainer_for(tmp_path / str(change), model=model).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
@pytest.mark.parametrize("size", [1, 7, 4099, 400_001])
def test_any_one_number_shows(dtype: torch.dtype, size: int) -> None:
    model = nn.Module()
    whole = torch.zeros(size + 1, dtype=dtype)
    model.register_buffer("part", whole[1:])  # begins in the middle of a word
    model.register_buffer("turned", torch.zeros(size, 2, dtype=dtype).T)
    before = Held(model)
    before.refuse_changes(model)
    for name in ("part", "turned"):
        values = model.get_buffer(name)
        for index in (0, size // 2, size - 1):
            values.data[..., index] = 1
            with pytest.raises(PrivacyError, match=rf"^model\.{name}: "):
                before.refuse_changes(model)
            values.data[..., index] = 0
    before.refuse_changes(model)


def test_an_exchange_of_far_numbers_shows() -> None:
    model = nn.Linear(1000, 1000)
    before = Held(model)
    model.weight.data = model.weight.data.roll(100, 0)
    with pytest.raises(PrivacyError, match="weight"):
        before.refuse_changes(model)


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:.*nested tensors:UserWarning")
def test_tensors_of_every_kind_are_held() -> None:
    model = nn.Module()
    kinds: dict[str, Any] = {
        "empty": torch.zeros(0, 3),
        "sparse": torch.eye(3).to_sparse(),
        "rows": torch.eye(3).to_sparse_csr(),
        "numbers": torch.ones(2, dtype=torch.float8_e4m3fn),
        "nan": torch.full((2,), torch.nan),
        "complex": torch.ones(3, dtype=torch.complex128),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "nowhere": torch.zeros(2, device="meta"),
        "expanded": torch.zeros(1).expand(5),
    }
    with torch.inference_mode():
        kinds["inferred"] = torch.ones(3)
    for name, value in kinds.items():
        model.register_buffer(name, value)
    before = Held(model)
    before.refuse_changes(model)
    model.get_buffer("sparse")._values()[0] = 2
    with pytest.raises(PrivacyError, match="sparse"):
        before.refuse_changes(model)
