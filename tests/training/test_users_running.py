"""Runs that protect users: every sampler, resumed, with workers, adapters, and what a collator sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sampler_runs import SAVING, Crash
from tiny_runs import train_lines
from torch import Tensor, nn
from user_runs import (
    EVERYBODY,
    NUM_USERS,
    Recorded,
    bert,
    brute_force,
    close,
    drawn,
    pad,
    rows,
    table,
    trainer,
)

from hf_dp import DPTrainer
from hf_dp.engines import BookKeepingEngine, SequentialEngine
from hf_dp.errors import LedgerMismatchError
from hf_dp.events import (
    BallsInBins,
    Continued,
    Gaussian,
    PoissonSampled,
    SampledWithoutReplacement,
    Shuffled,
    TruncatedPoissonSampled,
)
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.sampling import UserSampling
from hf_dp.training.mixin import DPTrainerMixin

EVENTS = {
    "poisson": PoissonSampled(0.5, Gaussian(2.0)),
    "truncated_poisson": TruncatedPoissonSampled(NUM_USERS, 0.5, 6, Gaussian(2.0)),
    "balls_in_bins": BallsInBins(2, Gaussian(2.0)),
    "shuffled": Shuffled(2, Gaussian(2.0)),
    "fixed_size": SampledWithoutReplacement(NUM_USERS, 4, Gaussian(2.0)),
}


# ---- samplers, and runs that are taken up again -------------------------------------------------


@pytest.mark.parametrize("sampling", EVENTS)
def test_every_sampler_draws_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: str
) -> None:
    recorded = Recorded(monkeypatch)
    cap = {"max_batch_size": 6} if sampling == "truncated_poisson" else {}
    dp = {"sampling": sampling, "noise_multiplier": 2.0, **cap}
    made = trainer(tmp_path, host={"max_steps": 4}, dp=dp)
    made.train()
    assert isinstance(made.plan.sampler, UserSampling)
    whole = EVENTS[sampling]
    later = Continued(whole) if made.plan.pass_length == 2 else whole
    written = [
        r.event for r in read_ledger(tmp_path / LEDGER_NAME).releases for _ in range(r.count)
    ]
    assert written == [whole, later, whole, later]
    users = [drawn(recorded, number).keys() for number in range(4)]
    if sampling == "fixed_size":
        assert [len(found) for found in users] == [4] * 4
    if made.plan.pass_length == 2:  # everybody once in each pass
        for first, second in (users[:2], users[2:]):
            assert not first & second
            assert len(first | second) == NUM_USERS
    assert f"over {NUM_USERS} users" in str(made.privacy_report())


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["users", "examples"])
def test_a_resumed_run_goes_on_with_what_was_spent(tmp_path: Path, sampling: str) -> None:
    options = {
        "dp": {"noise_multiplier": 2.0, "user_sampling": sampling, "expected_batch_size": 3},
        "host": {**SAVING, "max_steps": 6},
    }
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[Crash(3)], **options).train()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    record = read_ledger(tmp_path / LEDGER_NAME)
    assert record.num_releases == 7  # the third step was made twice
    whole = trainer(tmp_path / "whole", **{**options, "host": {"max_steps": 7}})
    whole.train()
    assert resumed.epsilon == pytest.approx(whole.epsilon)
    assert resumed.privacy_report().guarantee.epsilon == pytest.approx(whole.epsilon)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"max_examples_per_user": 3}, "users"),
        ({"user_reduction": "sum"}, "users"),
        ({"user_sampling": "examples"}, "users|step_event|sampler|expected"),
        ({"privacy_unit": "example", "max_examples_per_user": None}, "unit"),
        ({"expected_batch_size": 4}, "plan"),
    ],
)
def test_a_run_is_not_resumed_under_other_options(
    tmp_path: Path, changed: dict[str, Any], match: str
) -> None:
    host = {**SAVING, "max_steps": 2}
    trainer(tmp_path, host=host, dp={"expected_batch_size": 3}).train()
    other = trainer(
        tmp_path, host={**host, "max_steps": 4}, dp={"expected_batch_size": 3, **changed}
    )
    with pytest.raises(LedgerMismatchError, match=match):
        other.train(resume_from_checkpoint=True)
    assert read_ledger(tmp_path / LEDGER_NAME).num_releases == 2


def test_a_run_is_not_resumed_with_another_number_of_users(tmp_path: Path) -> None:
    host = {**SAVING, "max_steps": 2}
    dp = {"expected_batch_size": 3, "target_delta": 0.01}
    trainer(tmp_path, host=host, dp=dp).train()
    fewer = [row for row in rows() if row["user_id"] != "Poe"]
    other = trainer(tmp_path, host={**host, "max_steps": 4}, dp=dp, train_dataset=fewer)
    with pytest.raises(LedgerMismatchError, match="population_size"):
        other.train(resume_from_checkpoint=True)


def test_contributions_of_another_number_of_kept_examples_are_not_resumed(tmp_path: Path) -> None:
    host = {**SAVING, "max_steps": 2}
    dp = {"user_sampling": "examples", "expected_batch_size": 3}
    trainer(tmp_path, host=host, dp=dp).train()
    given = rows()
    given[-1]["user_id"] = "Poe"  # who had a single line
    other = trainer(tmp_path, host={**host, "max_steps": 4}, dp=dp, train_dataset=given)
    with pytest.raises(LedgerMismatchError, match="users"):
        other.train(resume_from_checkpoint=True)


# ---- loading ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["users", "examples"])
def test_owners_come_through_the_workers_of_the_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: str
) -> None:
    recorded = Recorded(monkeypatch)
    dp = {**EVERYBODY, "user_sampling": sampling, "max_examples_per_user": 4}
    if sampling == "examples":
        dp["expected_batch_size"] = 4
    trainer(tmp_path, host={"dataloader_num_workers": 2, "max_steps": 3}, dp=dp).train()
    if sampling == "users":
        found = [drawn(recorded, number) for number in range(3)]
        assert [len(by_user) for by_user in found] == [NUM_USERS] * 3
        assert [sum(map(len, sizes)) for sizes in recorded.sizes] == [NUM_USERS] * 3
    else:
        found = [
            {str(text): [text] for texts in drawn(recorded, number).values() for text in texts}
            for number in range(3)
        ]
    assert close(recorded.sums[0], brute_force(bert(), found[0], norm=1.0)) or not found[0]


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """A dataset that reads its rows one at a time."""

    def __init__(self) -> None:
        self.rows = rows("author")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])


class Watching:
    """A collator that remembers the names of what it sees."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, given: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        self.seen |= {name for row in given for name in row}
        return pad(given)


@pytest.mark.parametrize("sampling", ["users", "examples"])
@pytest.mark.parametrize("removing", [True, False])
@pytest.mark.parametrize("make", [lambda: table("author"), lambda: rows("author"), Texts])
def test_neither_collator_nor_model_sees_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, removing: bool, sampling: str
) -> None:
    inner = type(bert())
    forward, passed = inner.forward, set()

    def watched(
        self: nn.Module,
        input_ids: Any = None,
        attention_mask: Any = None,
        labels: Any = None,
        **more: Any,
    ) -> Any:
        passed.update(more)
        return forward(
            self, input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more
        )

    monkeypatch.setattr(inner, "forward", watched)
    collator = Watching()
    made = trainer(
        tmp_path,
        train_dataset=make(),
        data_collator=collator,
        host={"remove_unused_columns": removing, "max_steps": 1},
        dp={"user_column": "author", "user_sampling": sampling, "expected_batch_size": 6},
    )
    made.explain_engine(length=8)
    made.train()
    assert made.plan.sampler.unit == "user"
    assert collator.seen == {"input_ids", "attention_mask", "labels"}
    assert not {name for name in passed if "author" in name}


def test_a_collator_that_is_shown_the_users_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_dp.training import batches

    monkeypatch.setattr(batches, "without_column", lambda row, _: row)
    with pytest.raises(AssertionError):
        test_neither_collator_nor_model_sees_the_users(tmp_path, monkeypatch, Texts, False, "users")


@pytest.mark.slow
def test_users_may_be_given_beside_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(monkeypatch)
    ids = [row["user_id"] for row in rows()]
    for place, users in enumerate(
        (ids, tuple(ids), torch.tensor([hash(i) % 1000003 for i in ids]))
    ):
        made = trainer(
            tmp_path / str(place),
            train_dataset=table().remove_columns("user_id"),
            users=users,
            host={"max_steps": 1},
            dp={**EVERYBODY, "max_examples_per_user": 7},
        )
        made.train()
        assert close(recorded.sums[-1], brute_force(bert(), drawn(recorded, place), norm=1.0))


@pytest.mark.parametrize("by_place", [False, True])
def test_users_are_read_before_the_host_drops_their_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_place: bool
) -> None:
    """Hosts that tokenize keep only what their models take."""

    class Host(tf.Trainer):
        def __init__(
            self, model: Any = None, args: Any = None, train_dataset: Any = None, **kw: Any
        ):
            kept = train_dataset.select_columns(["input_ids", "attention_mask", "labels"])
            super().__init__(model, args, train_dataset=kept, **kw)

    class Made(DPTrainerMixin, Host):
        pass

    recorded = Recorded(monkeypatch)
    base = trainer(tmp_path / "base", host={"max_steps": 1}, dp=EVERYBODY)
    options = {"processing_class": base.processing_class, "dp_args": base.dp_args}
    given = (bert(), base.args, table())
    made = (
        Made(*given, **options)
        if by_place
        else Made(**dict(zip(("model", "args", "train_dataset"), given, strict=True)), **options)
    )
    assert "user_id" not in made.train_dataset.column_names
    made.train()
    assert close(recorded.sums[0], brute_force(bert(), drawn(recorded, 0), norm=1.0))


@pytest.mark.slow
def test_views_and_transforms_of_a_table_keep_their_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shuffled, in part, in another format, transformed on reading."""
    recorded = Recorded(monkeypatch)
    whole: Dataset = table().shuffle(seed=3)
    views = [
        whole.select(range(1, 21)),
        whole.with_format("torch", columns=["input_ids", "attention_mask", "labels"]),
        whole.with_transform(lambda rows: {k: v for k, v in rows.items() if k != "user_id"}),
        torch.utils.data.Subset(whole, list(range(20, 0, -1))),
    ]
    for place, view in enumerate(views):
        made = trainer(
            tmp_path / str(place),
            train_dataset=view,
            host={"max_steps": 1, "remove_unused_columns": False},
            dp={"expected_batch_size": 4, "private_loss": False, "max_examples_per_user": 7},
            data_collator=lambda given: pad(
                [
                    {n: v.tolist() if isinstance(v, Tensor) else v for n, v in row.items()}
                    for row in given
                ]
            ),
        )
        made.train()
        assert close(recorded.sums[-1], brute_force(bert(), drawn(recorded, place), norm=1.0))


CHECKPOINTING = next(  # the older name warns where there is the newer one
    field.name
    for field in dataclasses.fields(tf.TrainingArguments)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)


# ---- losses and models --------------------------------------------------------------------------


class Own(DPTrainer):
    """Its loss has no vectorised form, so that it is called for one example at a time."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if options.get("return_outputs") else outputs.loss


@pytest.mark.parametrize("size", [1, 8])
def test_a_loss_that_is_called_for_one_example_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    recorded = Recorded(monkeypatch)
    made = trainer(
        tmp_path,
        cls=Own,
        host={"max_steps": 1, "per_device_train_batch_size": size},
        dp={**EVERYBODY, "max_examples_per_user": 4},
    )
    made.train()
    assert isinstance(made.engine, SequentialEngine)
    assert close(recorded.sums[0], brute_force(bert(), drawn(recorded, 0), norm=1.0))


@pytest.mark.parametrize("masked", [True, False])
def test_examples_whose_padding_matters_are_collated_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    """A loss that reads its padding, and a collator that may mark none."""

    def collate(given: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: v for name, v in pad(given).items() if masked or name != "attention_mask"}

    def reads_padding(model: nn.Module, inputs: Any) -> Tensor:
        ids = inputs["input_ids"]
        outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return nn.functional.cross_entropy(outputs.logits, inputs["labels"], reduction="none")

    monkeypatch.setattr("hf_dp.training.choice.padding_matters", lambda *_: True)
    recorded = Recorded(monkeypatch)
    monkeypatch.setattr(
        Recorded,
        "texts",
        lambda self, step: [
            [
                tuple(ids.tolist())
                for piece in batch.get("collated apart", [batch])
                for ids in piece["input_ids"]
            ]
            for batch in self.batches[step]
        ],
    )
    made = trainer(
        tmp_path,
        example_loss=reads_padding,
        data_collator=collate,
        host={"max_steps": 1, "per_device_train_batch_size": 8},
        dp={**EVERYBODY, "max_examples_per_user": 4},
    )
    made.train()
    assert close(recorded.sums[0], brute_force(bert(), drawn(recorded, 0), norm=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_adapters_with_checkpointed_gradients_in_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    def adapted() -> nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
        return get_peft_model(bert(), config)

    recorded = Recorded(monkeypatch)
    made = trainer(
        tmp_path,
        model=adapted(),
        host={
            "max_steps": 2,
            CHECKPOINTING: True,
            "bf16": bf16,
            "per_device_train_batch_size": 8,
        },
        dp={**EVERYBODY, "max_examples_per_user": 4, "clipping_norm": 0.2, "preflight": True},
    )
    made.train()
    found = drawn(recorded, 0)
    assert sum(map(len, recorded.sizes[0])) == NUM_USERS
    assert max(map(max, recorded.sizes[0])) == 4
    model = adapted()
    for name, module in model.named_modules():
        if "lora_dropout" in name and isinstance(module, nn.Dropout):
            module.p = 0.0
    assert close(recorded.sums[0], brute_force(model, found, norm=0.2), 5e-2 if bf16 else 1e-4)
    assert all(torch.isfinite(total).all() for total in recorded.sums)


def test_the_engine_that_clips_users_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    made = trainer(tmp_path, dp={"engine": "book_keeping"}, host={"per_device_train_batch_size": 8})
    made.train()
    assert isinstance(made.engine, BookKeepingEngine)
    assert len(train_lines(made)) == 2
