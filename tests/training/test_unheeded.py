"""What a host draws or trains in a way of its own would not be heeded, so it is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import NUM_EXAMPLES, Sentences, collate, tiny_bert, trainer_for
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, WeightedRandomSampler
from transformers import Trainer

from hf_dp import DPTrainer, DPTrainerMixin
from hf_dp.errors import ConfigurationError
from hf_dp.training import mixin


class Weighted(DPTrainer):
    """Draws some examples more often."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return WeightedRandomSampler([1.0] * NUM_EXAMPLES, NUM_EXAMPLES)


class OwnLoader(Trainer):
    """A loader that cuts batches in a way of its own."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        batches = BucketSampler(RandomSampler(Sentences()), 8, False)
        return DataLoader(Sentences(), batch_sampler=batches, collate_fn=collate)


class BucketSampler(BatchSampler):
    """Somebody's own."""


class OverOwnLoader(DPTrainerMixin, OwnLoader):
    """The mixin before it."""


OWN = {Weighted: "WeightedRandomSampler", OverOwnLoader: "BucketSampler"}


@pytest.mark.parametrize("cls", OWN)
def test_a_sampler_of_ones_own_is_refused_by_name(tmp_path: Path, cls: type[DPTrainer]) -> None:
    with pytest.raises(ConfigurationError, match=rf"sampler='{OWN[cls]}': expected the Trainer's"):
        trainer_for(tmp_path, cls=cls).train()


def test_planted_without_the_look_a_sampler_goes_unheeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixin, "refuse_sampler", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        test_a_sampler_of_ones_own_is_refused_by_name(tmp_path, Weighted)


@pytest.mark.parametrize(
    "options",
    [
        {"train_sampling_strategy": "random"},
        {"accelerator_config": {"use_seedable_sampler": False}},
        {"accelerator_config": {"split_batches": True}},
        {"data_seed": 3},
    ],
)
def test_the_trainers_own_samplers_are_its_own(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer_for(tmp_path, host={"max_steps": 1, **options}).train()


class Tempered(DPTrainer):
    """Trains a number that is no part of the model."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        self.temperature = nn.Parameter(torch.ones(3))
        groups = [{"params": [*self.model.parameters()]}, {"params": [self.temperature]}]
        self.optimizer = torch.optim.SGD(groups, lr=0.1)
        return self.optimizer


def test_a_parameter_outside_the_model_is_refused_by_name(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, cls=Tempered)
    named = r"optimizer\.param_groups\[1\]\['params'\]\[0\]='Parameter of shape \(3,\)'"
    with pytest.raises(ConfigurationError, match=named):
        trainer.train()
    assert trainer.epsilon == 0


def test_planted_without_the_look_it_is_never_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixin, "refuse_optimizer", lambda *_: None)
    trainer: Any = trainer_for(tmp_path, cls=Tempered)
    trainer.train()
    assert torch.equal(trainer.temperature, torch.ones(3))


def test_frozen_parameters_may_be_in_the_optimizer(tmp_path: Path) -> None:
    model: Any = tiny_bert()
    model.bert.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer_for(tmp_path, model=model, optimizers=(optimizer, None), host={"max_steps": 1}).train()
