"""Users that are not known, or not single, and options that do not go together: refused, nothing written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import refused, trainer_for
from transformers import HfArgumentParser, TrainingArguments
from user_runs import NUM_USERS, bert, rows, table, trainer

from hf_dp import DPArguments, PrivacyPlan
from hf_dp.clipping import FlatClipping
from hf_dp.errors import ConfigurationError
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.noise import GaussianNoise
from hf_dp.sampling import BatchSampler, ContributionSampling, PoissonSampling, UserSampling

SECRET = "somebody@example.org"


def with_ids(ids: Any) -> list[dict[str, Any]]:
    return [{**row, "user_id": user} for row, user in zip(rows(), ids, strict=True)]


def replaced(value: Any) -> list[Any]:
    """The authors, of whom one is replaced."""
    ids: list[Any] = [row["user_id"] for row in rows()]
    return [*ids[:5], value, *ids[6:]]


@pytest.mark.parametrize("how", ["column", "users"])
@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (replaced(None), "an id for every example"),
        (replaced(math.nan), "an id for every example"),
        (replaced([SECRET, "b"]), "one user for each example"),
        (replaced((SECRET,)), "one user for each example"),
        (replaced({SECRET}), "one user for each example"),
        (replaced(np.array([1, 2])), "one user for each example"),
        (replaced(torch.zeros(2)), "one user for each example"),
        (replaced({"name": SECRET}), "hashed and compared by value"),
        (replaced(object()), "hashed and compared by value"),
        ([SECRET] * len(rows()), "at least two users"),
    ],
)
def test_ids_that_name_no_single_user(tmp_path: Path, how: str, ids: Any, match: str) -> None:
    if how == "column":
        message = refused(tmp_path, match, lambda: trainer(tmp_path, train_dataset=with_ids(ids)))
        assert message.startswith("DPArguments.user_column='user_id'")
    else:
        message = refused(tmp_path, match, lambda: trainer(tmp_path, users=ids))
        assert message.startswith("DPTrainer.users='list'")
    assert SECRET not in message


@pytest.mark.parametrize("value", [None, ["a", "b"]])
def test_a_table_of_datasets_is_read_as_strictly(tmp_path: Path, value: Any) -> None:
    from datasets import Dataset

    ids = [value if index == 3 else ["a"] if value else "a" for index in range(len(rows()))]
    refused(
        tmp_path,
        "user_column",
        lambda: trainer(tmp_path, train_dataset=Dataset.from_list(with_ids(ids))),
    )


@pytest.mark.parametrize("column", ["author", "User_id"])
@pytest.mark.parametrize("make", [rows, table])
def test_a_column_that_is_not_there(tmp_path: Path, make: Any, column: str) -> None:
    message = refused(
        tmp_path,
        "expected a column of train_dataset",
        lambda: trainer(tmp_path, train_dataset=make(), dp={"user_column": column}),
    )
    assert "users=" in message


def test_a_column_that_some_rows_lack(tmp_path: Path) -> None:
    data = rows()
    del data[7]["user_id"]
    refused(tmp_path, "an id for every example", lambda: trainer(tmp_path, train_dataset=data))


@pytest.mark.parametrize("count", [0, 21, 23])
def test_more_or_fewer_ids_than_examples(tmp_path: Path, count: int) -> None:
    ids = [index % 5 for index in range(count)]
    refused(tmp_path, "one id for each example", lambda: trainer(tmp_path, users=ids))


def test_a_dataset_of_another_length_put_there_later(tmp_path: Path) -> None:
    made = trainer(tmp_path, users=[row["user_id"] for row in rows()])
    given, made.train_dataset = made.train_dataset, rows()[:10]
    with pytest.raises(ConfigurationError, match="one id for each example"):
        made.train()
    made.train_dataset = given
    assert made.plan.sampler.unit == "user"


def test_a_dataset_without_users_put_there_later(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.train_dataset = table().remove_columns("user_id")
    with pytest.raises(ConfigurationError, match="a column of train_dataset"):
        made.train()


@pytest.mark.parametrize(
    ("dp", "match"),
    [
        ({"expected_batch_size": NUM_USERS + 1}, r"at most the number of users \(8\)"),
        (
            {"user_sampling": "examples", "expected_batch_size": 15},
            r"at most the number of examples that users keep \(14\)",
        ),
        ({"max_examples_per_user": None}, "a number of users, where max_examples_per_user"),
        ({"expected_batch_size": 2.5, "sampling": "fixed_size"}, "a whole number with sampling"),
        ({"max_examples_per_user": 3, "sampling": "fixed_size"}, "a whole number with sampling"),
        ({"target_delta": 0.2}, "less than 1 / the number of units = 0.125"),
    ],
)
def test_more_users_than_there_are_or_sizes_that_are_not_known(
    tmp_path: Path, dp: dict[str, Any], match: str
) -> None:
    refused(tmp_path, match, lambda: trainer(tmp_path, dp=dp))


def test_the_longest_of_what_has_no_length(tmp_path: Path) -> None:
    data = [{"x": torch.zeros(2), "labels": 0, "user_id": str(index % 3)} for index in range(9)]
    dp = {"user_sampling": "examples", "user_selection": "longest", "expected_batch_size": 2}
    made = trainer(
        tmp_path,
        train_dataset=data,
        dp=dp,
        host={"remove_unused_columns": False},
        data_collator=lambda given: {
            "input_ids": torch.ones(len(given), 3, dtype=torch.long),
            "attention_mask": torch.ones(len(given), 3, dtype=torch.long),
            "labels": torch.tensor([row["labels"] for row in given]),
        },
    )
    with pytest.raises(ConfigurationError, match="a field 'input_ids' that has a length"):
        made.get_train_dataloader()


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"user_column": "author"},
            "user_column='author': expected 'user_id' with privacy_unit='example'",
        ),
        ({"user_sampling": "examples"}, "user_sampling='examples': expected 'users' with"),
        ({"max_examples_per_user": 3}, "max_examples_per_user=3: expected None with"),
        ({"user_reduction": "sum"}, "user_reduction='sum': expected 'mean' with"),
        ({"user_selection": "first"}, "user_selection='first': expected 'random' with"),
        (
            {"privacy_unit": "user", "user_sampling": "examples"},
            "max_examples_per_user=None: expected a whole",
        ),
        (
            {"privacy_unit": "user", "user_selection": "first"},
            "user_selection='first': expected 'random'",
        ),
        (
            {
                "privacy_unit": "user",
                "user_sampling": "examples",
                "max_examples_per_user": 2,
                "user_reduction": "sum",
            },
            "user_reduction='sum': expected 'mean' with user_sampling='examples'",
        ),
        (
            {
                "privacy_unit": "user",
                "user_sampling": "examples",
                "max_examples_per_user": 2,
                "sampling": "shuffled",
            },
            "sampling='shuffled': expected 'poisson' with user_sampling='examples'",
        ),
        (
            {"privacy_unit": "user", "max_examples_per_user": 0},
            "max_examples_per_user=0: expected a whole",
        ),
        (
            {"privacy_unit": "user", "max_examples_per_user": 1.5},
            "max_examples_per_user=1.5: expected a whole",
        ),
        ({"privacy_unit": "user", "user_column": ""}, "user_column='': expected the name"),
        ({"privacy_unit": "user", "user_column": 3}, "user_column=3: expected the name"),
        ({"privacy_unit": "users"}, "privacy_unit='users'.*Did you mean 'user'"),
        (
            {"privacy_unit": "user", "user_sampling": "user"},
            "user_sampling='user'.*Did you mean 'users'",
        ),
        (
            {"privacy_unit": "user", "user_reduction": "average"},
            "user_reduction='average': expected one of",
        ),
        ({"privacy_unit": "user", "user_selection": "Longest"}, "Did you mean 'longest'"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^DPArguments\..*{match}"):
        DPArguments(noise_multiplier=1.0, **options)


def test_the_command_line_takes_all_of_them(tmp_path: Path) -> None:
    words = (
        f"--output_dir {tmp_path} --noise_multiplier 1 --privacy_unit user --user_column author "
        "--user_sampling examples --max_examples_per_user 4 --user_selection longest"
    )
    parser = HfArgumentParser((TrainingArguments, DPArguments))
    _, asked = parser.parse_args_into_dataclasses(words.split())
    assert asked == DPArguments(
        noise_multiplier=1.0,
        privacy_unit="user",
        user_column="author",
        user_sampling="examples",
        max_examples_per_user=4,
        user_selection="longest",
    )
    assert asked.draws_contributions
    assert asked.reduction is None
    (other,) = HfArgumentParser(DPArguments).parse_args_into_dataclasses(
        "--noise_multiplier 1 --privacy_unit user --user_reduction sum".split()
    )
    assert other.draws_users
    assert (other.reduction, other.max_examples_per_user) == ("sum", None)


def test_users_where_examples_are_protected(tmp_path: Path) -> None:
    refused(
        tmp_path,
        r"DPTrainer\.users='list': expected None with privacy_unit='example'",
        lambda: trainer_for(tmp_path, users=[1] * 40),
    )


def plan(sampler: BatchSampler) -> PrivacyPlan:
    return PrivacyPlan(sampler, FlatClipping(1.0), GaussianNoise(1.0), 2, 3.0)


CONTRIBUTIONS = {"user_sampling": "examples", "max_examples_per_user": 2}


@pytest.mark.parametrize(
    ("dp", "sampler", "match"),
    [
        ({}, PoissonSampling(0.3), r"PrivacyPlan\.unit='example': expected 'user'"),
        (
            {"privacy_unit": "example", "max_examples_per_user": None},
            UserSampling(PoissonSampling(0.3)),
            r"PrivacyPlan\.unit='user': expected 'example'",
        ),
        (
            {},
            ContributionSampling(0.3, 2),
            r"PrivacyPlan\.sampler='ContributionSampling': expected .*users",
        ),
        (
            CONTRIBUTIONS,
            UserSampling(PoissonSampling(0.3)),
            r"PrivacyPlan\.sampler='UserSampling': expected .*examples",
        ),
        (CONTRIBUTIONS, ContributionSampling(0.3, 3), r"max_examples_per_user='3': expected 2"),
    ],
)
def test_a_plan_for_another_unit(
    tmp_path: Path, dp: dict[str, Any], sampler: BatchSampler, match: str
) -> None:
    refused(tmp_path, match, lambda: trainer(tmp_path, dp=dp, plan=plan(sampler)))


@pytest.mark.parametrize(
    ("dp", "sampler"),
    [
        ({"max_examples_per_user": None}, UserSampling(PoissonSampling(0.3))),
        (CONTRIBUTIONS, ContributionSampling(0.3, 2)),
    ],
)
def test_a_plan_for_users_is_taken(
    tmp_path: Path, dp: dict[str, Any], sampler: BatchSampler
) -> None:
    made = trainer(tmp_path, dp=dp, plan=plan(sampler))
    made.train()
    assert made.plan.sampler == sampler
    assert made.privacy_report().guarantee.unit == "user"


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Has a length, and nothing at a place."""

    def __iter__(self) -> Any:
        return iter(rows())

    def __len__(self) -> int:
        return len(rows())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (Stream, "a dataset with a length"),
        (lambda: table().to_iterable_dataset(), "a dataset with a length"),
        (list, "at least one example"),
    ],
)
def test_data_that_cannot_be_drawn_from_is_refused_as_always(
    tmp_path: Path, make: Any, match: str
) -> None:
    refused(tmp_path, match, lambda: trainer(tmp_path, train_dataset=make()))


def test_a_single_example_that_does_not_fit_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = type(bert().bert)
    forward = inner.forward

    def nothing_fits(self: Any, *args: Any, **inputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, *args, **inputs)

    made = trainer(tmp_path, dp={"expected_batch_size": NUM_USERS})
    monkeypatch.setattr(inner, "forward", nothing_fits)
    with pytest.raises(ConfigurationError, match="micro-batch of one example: expected it to fit"):
        made.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 0
