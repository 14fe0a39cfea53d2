"""Examples are batched with padding only where no example's loss can depend on it, now or later."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from loss_zoo import batch, build
from torch import Tensor, nn
from torch.nn import functional as F

from hf_dp.layers.randomness import Randomness
from hf_dp.training.made_up import made_up_rows
from hf_dp.training.padding import padding_matters

VOCAB, PAD = 23, 3


class Pooled(nn.Module):
    """A classifier of the mean of its tokens, which may forget that some are padding."""

    def __init__(self, *, forgets: bool, head: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, 3)
        self.forgets = forgets
        with torch.no_grad():
            self.head.weight.mul_(head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        mask = torch.ones_like(attention_mask) if self.forgets else attention_mask
        return self.head((hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None])


class Neighbours(nn.Module):
    """Reads each token with the next one, as MobileBERT does: padding too, whose row is zero at first."""

    def __init__(self, padding_idx: int | None = PAD) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 8, padding_idx=padding_idx)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        after = F.pad(hidden[:, 1:], (0, 0, 0, 1))
        both = torch.cat([hidden, after], 2) * attention_mask[..., None]
        return self.head(both.sum(1) / attention_mask.sum(1)[:, None])


class InTraining(Pooled):
    """Forgets the mask in training mode only."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.forgets = self.training
        return super().forward(input_ids, attention_mask)


def class_losses(model: nn.Module, inputs: Any) -> Tensor:
    logits = model(inputs["input_ids"], inputs["attention_mask"])
    return F.cross_entropy(logits.float(), inputs["labels"], reduction="none")


def matters(model: nn.Module, padding_id: int | None = PAD) -> bool:
    columns = {
        "input_ids": torch.zeros(1, 4, dtype=torch.long),
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
        "labels": torch.zeros(1, dtype=torch.long),
    }
    rows = made_up_rows(model, columns)
    rows["labels"] = torch.tensor([0, 1, 2, 1])
    return padding_matters(class_losses, model, rows, padding_id)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Pooled(forgets=False), False),
        (lambda: Pooled(forgets=True), True),
        (lambda: Pooled(forgets=True, head=0.0), True),  # no loss shows it yet
        (lambda: Pooled(forgets=True).bfloat16(), True),
        (
            lambda: Pooled(forgets=True, head=1e-3).bfloat16(),
            True,
        ),  # within half precision's rounding
        (lambda: Pooled(forgets=False).bfloat16(), False),
        (Neighbours, True),  # the padding's row is zero until noise moves it
        (lambda: InTraining(forgets=False).eval(), True),
    ],
)
def test_padding_that_is_read_is_found_whatever_hides_it(
    make: Callable[[], nn.Module], expected: bool
) -> None:
    assert matters(make()) is expected


def test_the_model_is_left_as_it_was() -> None:
    model = Neighbours().train()
    model.head.eval()
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    assert matters(model)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert model.training
    assert not model.head.training


def of_gpt2(model: nn.Module, inputs: Any) -> Tensor:
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return F.cross_entropy(model(**given).logits, inputs["labels"], reduction="none")


def test_a_model_that_looks_for_another_padding_token_is_found() -> None:
    """GPT-2's classifier reads the last token that is not padding, by the id in its configuration."""
    model = build("gpt2-cls")
    rows = made_up_rows(model, {name: value[:1] for name, value in batch("gpt2-cls").items()})
    own = model.config.pad_token_id
    assert not padding_matters(of_gpt2, model, rows, own)
    assert padding_matters(of_gpt2, model, rows, own + 4)
    assert padding_matters(of_gpt2, model, rows, None), "not known which, so it must not matter"


def test_what_cannot_be_tried_matters() -> None:
    assert padding_matters(class_losses, Pooled(forgets=False), None)
    assert padding_matters(class_losses, Pooled(forgets=False), {"other": torch.zeros(4)})


class Tokenizer:
    """What `DataCollatorWithPadding` asks of one."""

    def pad(self, features: list[dict[str, Any]], **_: Any) -> dict[str, Tensor]:
        longest = max(len(f["input_ids"]) for f in features)
        return {
            "input_ids": torch.tensor(
                [f["input_ids"] + [PAD] * (longest - len(f["input_ids"])) for f in features]
            ),
            "labels": torch.tensor([f["label"] for f in features]),
        }


class DropsPaths(Pooled):
    """Draws in training mode by itself; with `coupled` it also takes the batch's mean off."""

    def __init__(self, *, coupled: bool) -> None:
        super().__init__(forgets=False)
        self.coupled = coupled

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = super().forward(input_ids, attention_mask)
        if self.training:
            logits = logits * (torch.rand(len(logits), 1) > 0.1)
            logits = logits - logits.mean(0) if self.coupled else logits
        return logits


@pytest.mark.parametrize("coupled", [False, True])
def test_neighbours_that_matter_in_training_only_are_found_under_equal_draws(coupled: bool) -> None:
    assert matters(DropsPaths(coupled=coupled)) is coupled


@pytest.mark.parametrize("coupled", [False, True])
def test_no_generator_is_left_where_the_trial_put_it(coupled: bool) -> None:
    """Seeds of the trial are public; what is drawn afterwards must not follow from them."""
    device = torch.device("cpu")
    random.seed(12)
    np.random.seed(34)  # noqa: NPY002
    before = Randomness.now(device)
    matters(DropsPaths(coupled=coupled))
    assert Randomness.now(device).python == before.python
    assert np.array_equal(Randomness.now(device).numpy[1], before.numpy[1])
    assert Randomness.now(device).numpy[2:] == before.numpy[2:]


def advantages(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean()) / (rewards.std(unbiased=False) + 1e-4)


def of_rewards(weigh: Callable[[Tensor], Tensor], *, most: int | None = None) -> bool:
    """Whether neighbours matter to a loss that weighs examples by whole numbers in a column of its own."""

    def losses(model: nn.Module, inputs: Any) -> Tensor:
        rewards = inputs["rewards"]
        if most is not None and bool((rewards > most).any()):
            raise ValueError("unknown reward")
        return class_losses(model, inputs) * weigh(rewards.double())

    model = Pooled(forgets=False)
    columns = {
        "input_ids": torch.zeros(1, 4, dtype=torch.long),
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
        "labels": torch.zeros(1, dtype=torch.long),
        "rewards": torch.tensor([most == 1]) if most == 1 else torch.tensor([3]),
    }
    rows = made_up_rows(model, columns)
    rows["labels"] = torch.tensor([0, 1, 2, 1])
    return padding_matters(losses, model, rows, PAD)


@pytest.mark.parametrize("most", [None, 1, 5])
def test_examples_that_meet_in_whole_numbers_of_the_user_s_are_found(most: int | None) -> None:
    """Made-up rewards are all zero, and so would be every loss."""
    assert of_rewards(advantages, most=most)
    assert not of_rewards(lambda rewards: rewards + 1, most=most)
    assert not of_rewards(lambda rewards: rewards, most=most)


def test_losses_that_are_all_alike_show_nothing() -> None:
    assert of_rewards(lambda rewards: rewards, most=0)


def test_without_other_numbers_it_would_not_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_dp.training.padding._numbered", lambda rows: [])  # planted
    monkeypatch.setattr("hf_dp.training.padding._tells", lambda *_: True)
    assert not of_rewards(advantages)
