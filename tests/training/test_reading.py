"""Datasets that draw from a generator of their own are refused; what draws from the global ones is not."""

from __future__ import annotations

import collections
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_runs import Sentences, trainer_for

from hf_dp.errors import ConfigurationError
from hf_dp.training import reading, settled
from hf_dp.training.reading import refuse_own_draws

WORD = 9
OWN: dict[str, Any] = {
    "numpy": lambda: np.random.default_rng(0).random,
    "random": lambda: random.Random(0).random,
    "torch": lambda: (lambda g: lambda: float(torch.rand((), generator=g)))(
        torch.Generator().manual_seed(0)
    ),
}
GLOBAL: dict[str, Any] = {
    "numpy": np.random.random,
    "random": random.random,
    "torch": lambda: float(torch.rand(())),
}


class Augmented(Sentences):
    """Some words are replaced on reading."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.draw = draw

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        ids = [WORD if self.draw() < 0.3 else word for word in row["input_ids"]]
        return {**row, "input_ids": ids}


def transformed(draw: Any) -> Any:
    dataset = Dataset.from_list(Sentences().rows)

    def change(rows: Any) -> Any:
        ids = [[WORD if draw() < 0.3 else word for word in ids] for ids in rows["input_ids"]]
        return {**rows, "input_ids": ids}

    dataset.set_transform(change)
    return dataset


@pytest.mark.parametrize("make", [Augmented, transformed])
@pytest.mark.parametrize("kind", OWN)
def test_a_generator_of_its_own_is_refused(tmp_path: Path, make: Any, kind: str) -> None:
    host = {"remove_unused_columns": False}
    trainer = trainer_for(tmp_path, train_dataset=make(OWN[kind]()), host=host)
    with pytest.raises(
        ConfigurationError, match=r"^train_dataset\[\.\.\.\]='a dict': expected the"
    ):
        trainer.train()


@pytest.mark.parametrize("make", [Augmented, transformed])
@pytest.mark.parametrize("kind", GLOBAL)
def test_global_generators_may_be_drawn_from(tmp_path: Path, make: Any, kind: str) -> None:
    host = {"remove_unused_columns": False, "max_steps": 1}
    trainer_for(tmp_path, train_dataset=make(GLOBAL[kind]), host=host).train()


def test_each_run_reads_its_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(settled, "refuse_own_draws", lambda data, size: read.append(size))
    trainer = trainer_for(tmp_path, host={"max_steps": 1})
    trainer.train()
    assert read == [40]
    trainer_for(tmp_path / "off", host={"max_steps": 1}, dp={"preflight": False}).train()
    assert read == [40]


def test_unequal_coins_would_refuse_what_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: generators are not put back between two readings."""
    refuse_own_draws(Augmented(random.random), 40)
    monkeypatch.setattr(reading.Randomness, "restore", lambda self: None)
    with pytest.raises(ConfigurationError, match="train_dataset"):
        refuse_own_draws(Augmented(random.random), 40)


class Remembering:
    """What each reading returns has something of the reading before."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.count = 0

    def __getitem__(self, index: int) -> Any:
        self.count += 1
        return self.kind(self.count)


class Held:
    def __init__(self, value: int) -> None:
        self.value = value


class Locked:
    def __init__(self, value: int) -> None:
        self.value = value

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copy")


KINDS: dict[str, Any] = {
    "tensor": lambda n: torch.full((2, 2), n),
    "sparse": lambda n: (torch.eye(2) * n).to_sparse(),
    "shape": lambda n: torch.zeros(n),
    "array": lambda n: np.full(3, n),
    "arrays": lambda n: np.array([None, n], dtype=object),
    "array shape": np.zeros,
    "number": float,
    "text": str,
    "pair": lambda n: (1, [n]),
    "lengths": lambda n: [0] * n,
    "object": Held,
    "locked": Locked,
    "names": lambda n: {str(n): 0},
    "mapping": lambda n: collections.OrderedDict(x=n),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_shows_in_items_of_every_kind(kind: str) -> None:
    with pytest.raises(ConfigurationError, match="train_dataset"):
        refuse_own_draws(Remembering(KINDS[kind]), 10)
    refuse_own_draws(Remembering(lambda n: KINDS[kind](3)), 10)


def test_the_same_object_that_is_changed_in_place_shows() -> None:
    kept = {"x": [0]}

    class Growing:
        def __getitem__(self, index: int) -> Any:
            kept["x"].append(1)
            return kept

    with pytest.raises(ConfigurationError, match="train_dataset"):
        refuse_own_draws(Growing(), 1)


def test_numbers_that_are_none_are_equal_to_themselves() -> None:
    item = {"a": float("nan"), "b": torch.tensor(float("nan")), "c": np.array(np.nan), "d": None}
    refuse_own_draws([item, item, object()], 3)


def test_the_generators_are_left_as_they_were() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    refuse_own_draws(Augmented(lambda: float(torch.rand(()))), 40)
    assert torch.equal(torch.rand(2), expected)
