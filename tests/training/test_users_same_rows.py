"""Data that changes after its users were told apart is refused before rows are clipped as another's."""

from __future__ import annotations

import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Subset
from transformers import Trainer
from user_runs import pad, rows, table, trainer

from hf_dp import DPArguments, DPTrainer, DPTrainerMixin
from hf_dp.errors import ConfigurationError, PrivacyError
from hf_dp.training.ownership import Ownership
from hf_dp.training.same_rows import SameOwners, refuse_other_rows

OWNERS = [row["user_id"] for row in rows()]


def without_ids() -> Dataset:
    return table().remove_columns("user_id")


def draws_everybody(made: DPTrainer) -> None:
    """Every row, through the loader."""
    for number, _ in enumerate(made.get_train_dataloader()):
        if number > 20:
            return


@pytest.mark.parametrize("other", [without_ids().shuffle(seed=1), without_ids()])
def test_ids_by_place_are_of_the_dataset_that_they_came_with(tmp_path: Path, other: Any) -> None:
    made = trainer(tmp_path, train_dataset=without_ids(), users=OWNERS)
    made.train_dataset = other
    with pytest.raises(ConfigurationError, match=r"^DPTrainer\.users='list'"):
        made.train()


def test_a_column_is_read_anew_with_another_dataset(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.train_dataset = table().shuffle(seed=1)
    draws_everybody(made)
    assert made._ownership.of(made.train_dataset).num_users == 8


@pytest.mark.parametrize("sampling", ["users", "examples"])
def test_a_list_that_is_shuffled_afterwards_is_refused(tmp_path: Path, sampling: str) -> None:
    data = rows()
    dp = {"user_sampling": sampling, "expected_batch_size": 8.0}
    made = trainer(tmp_path, train_dataset=data, data_collator=pad, dp=dp)
    assert made.plan.num_steps > 0
    random.Random(1).shuffle(data)
    with pytest.raises(PrivacyError, match=r"^train_dataset: .*'user_id'"):
        draws_everybody(made)


def test_a_subset_whose_indices_change_is_refused(tmp_path: Path) -> None:
    places = list(range(len(rows())))
    made = trainer(tmp_path, train_dataset=Subset(rows(), places), data_collator=pad)  # type: ignore[arg-type]
    assert made.plan.num_steps > 0
    random.Random(1).shuffle(places)
    with pytest.raises(PrivacyError, match=r"^train_dataset: "):
        draws_everybody(made)


class DrawsItself(torch.utils.data.Dataset[Any]):
    """Gives any row it likes."""

    def __init__(self) -> None:
        self.rows, self.coins, self.asked = rows(), random.Random(1), 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.asked += 1
        if self.asked <= len(self.rows):  # the first time in order
            return self.rows[index]
        return self.rows[self.coins.randrange(len(self.rows))]


def test_a_dataset_of_ones_own_is_read_once() -> None:
    asked = DPArguments(noise_multiplier=1.0, privacy_unit="user")
    data, made_by_the_host = DrawsItself(), DrawsItself()
    whose = Ownership(asked, None, data)
    assert whose.of(data) is whose.of(data)
    assert data.asked == len(data)
    whose = Ownership(asked, None, data)
    whose.of(made_by_the_host)
    assert made_by_the_host.asked == len(data)


def test_data_is_let_go_where_examples_are_protected() -> None:
    data = DrawsItself()
    given = weakref.ref(data)
    whose = Ownership(DPArguments(noise_multiplier=1.0), None, data)
    assert (whose.of(data), data.asked) == (None, 0)
    del data
    assert given() is None


def test_a_dataset_that_draws_rows_itself_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, train_dataset=DrawsItself(), data_collator=pad)
    with pytest.raises(PrivacyError, match=r"^train_dataset: "):
        draws_everybody(made)


@pytest.mark.parametrize("column", [True, False])
def test_a_host_that_reads_other_rows_is_refused(tmp_path: Path, column: bool) -> None:
    class Host(DPTrainer):
        def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader[Any]:
            other = dataset.shuffle(seed=1)
            loader: DataLoader[Any] = super()._get_dataloader(other, *args, **kwargs)
            return loader

    users = {} if column else {"users": OWNERS, "train_dataset": without_ids()}
    made = trainer(tmp_path, cls=Host, **users)
    with pytest.raises(PrivacyError, match=r"^train_dataset: "):
        draws_everybody(made)


def test_rows_are_compared_by_what_they_have_in_common() -> None:
    data = table()
    refuse_other_rows(data, data, "user_id")
    refuse_other_rows(data, data.remove_columns("user_id"), "user_id")
    same = data.shuffle(seed=1)
    refuse_other_rows(same, same.remove_columns("user_id"), "user_id")
    others = [data.select(range(5)), same, same.flatten_indices(), rows()]
    for other in others:
        with pytest.raises(PrivacyError):
            refuse_other_rows(data, other, "user_id")
    with pytest.raises(PrivacyError):
        refuse_other_rows(rows(), [row["labels"] for row in rows()], "user_id")


def test_planted_without_the_check_a_shuffled_list_goes_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SameOwners, "__call__", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        test_a_list_that_is_shuffled_afterwards_is_refused(tmp_path, "users")


class ShufflingHost(Trainer):
    """As one that groups by length, or tokenizes after shuffling."""

    def __init__(self, *args: Any, train_dataset: Any, **kwargs: Any) -> None:
        mixed = train_dataset.shuffle(seed=1).remove_columns(
            [name for name in ("user_id",) if name in train_dataset.column_names]
        )
        super().__init__(*args, train_dataset=mixed, **kwargs)


class Hosted(DPTrainerMixin, ShufflingHost):
    """Users read before the host's own order."""


@pytest.mark.parametrize("users", [{}, {"users": OWNERS, "train_dataset": without_ids()}])
def test_a_host_that_reorders_when_it_is_made_is_refused(tmp_path: Path, users: Any) -> None:
    with pytest.raises(PrivacyError, match=r"^train_dataset: "):
        trainer(tmp_path, cls=Hosted, **users)  # type: ignore[arg-type]


class Relisting(Trainer):
    """Hands on a list of its own, in another order."""

    def __init__(self, *args: Any, train_dataset: Any, **kwargs: Any) -> None:
        super().__init__(*args, train_dataset=train_dataset[::-1], **kwargs)


class Relisted(DPTrainerMixin, Relisting):
    """Users given by place, of rows that the host turned round."""


def test_rows_that_name_other_users_do_not_excuse_another_order(tmp_path: Path) -> None:
    """Where ids are given by place, the column is not what rows are checked by."""
    with pytest.raises(PrivacyError, match=r"^train_dataset: "):
        trainer(tmp_path, cls=Relisted, train_dataset=rows(), users=OWNERS, data_collator=pad)  # type: ignore[arg-type]


class Foreign:
    """A table of a version that keeps its order elsewhere."""

    def __init__(self, table: Dataset) -> None:
        self.table, self.data, self.column_names = table, table.data, table.column_names

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        return self.table[index]


def test_tables_whose_order_does_not_show_must_name_their_users() -> None:
    data = Foreign(table())
    refuse_other_rows(data, Foreign(table()), "user_id")
    for column, other in (("user_id", without_ids()), (None, table())):
        for one, two in ((data, Foreign(other)), (data, other), (data.table, Foreign(other))):
            with pytest.raises(PrivacyError, match=r"^train_dataset: "):
                refuse_other_rows(one, two, column)


def test_tables_with_nothing_in_common_may_be_in_any_order() -> None:
    data = without_ids()
    renamed = data.rename_columns({name: f"{name}_" for name in data.column_names})
    with pytest.raises(PrivacyError):
        refuse_other_rows(data, renamed, "user_id")
    floats = Dataset.from_dict({"x": [0.5, float("nan"), 2.0]})
    refuse_other_rows(floats, floats.add_column("y", [1, 2, 3]), "user_id")
    with pytest.raises(PrivacyError):
        refuse_other_rows(floats, floats.select([2, 0, 1]).flatten_indices(), "user_id")
