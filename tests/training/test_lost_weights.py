"""Class weights that would do nothing, since a loss is called for one example at a time, are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import tiny_bert, trainer_for
from torch import Tensor, nn
from torch.nn import functional as F

from hf_dp import DPTrainer
from hf_dp.errors import ConfigurationError
from hf_dp.training import settled

WEIGHT = torch.tensor([1.0, 50.0])

Criterion = Callable[[Tensor, Tensor], Tensor]


def weighted_mean(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, WEIGHT)


def module(logits: Tensor, labels: Tensor) -> Tensor:
    found: Tensor = nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1)(logits, labels)
    return found


def of_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(logits.log_softmax(-1), labels, weight=WEIGHT)


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, WEIGHT, reduction="sum")


def unweighted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def equally(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, torch.ones(2))


def of_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, F.one_hot(labels, 2).float(), WEIGHT)


def of_many_targets(logits: Tensor, labels: Tensor) -> Tensor:
    """Of one example's tokens some count more than others."""
    several = torch.cat([labels, 1 - labels])
    return F.cross_entropy(logits.expand(len(several), 2), several, WEIGHT)


def trainer_with(criterion: Criterion, folder: Path, how: str) -> DPTrainer:
    class Own(DPTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
        ) -> Any:
            outputs = model(**{name: v for name, v in inputs.items() if name != "labels"})
            loss = criterion(outputs.logits, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    def func(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return criterion(outputs.logits, labels)

    host = {"max_steps": 1}
    if how == "compute_loss":
        return trainer_for(folder, cls=Own, host=host)
    return trainer_for(folder, compute_loss_func=func, host=host)


@pytest.mark.parametrize("how", ["compute_loss", "compute_loss_func"])
@pytest.mark.parametrize("criterion", [weighted_mean, module, of_log_probabilities])
def test_weights_without_effect_are_refused(criterion: Criterion, how: str, tmp_path: Path) -> None:
    trainer = trainer_with(criterion, tmp_path, how)
    with pytest.raises(ConfigurationError, match=r"the weights would do nothing.*example_loss"):
        trainer.train()
    assert trainer.epsilon == 0


@pytest.mark.parametrize(
    "criterion", [summed, unweighted, equally, of_probabilities, of_many_targets]
)
def test_other_losses_are_not(criterion: Criterion, tmp_path: Path) -> None:
    trainer_with(criterion, tmp_path, "compute_loss").train()


def test_the_weights_would_truly_do_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the refusal guards, with it planted away."""
    logits = tiny_bert()(input_ids=torch.tensor([[8, 9, 10]])).logits
    for label in torch.tensor([[0], [1]]):
        assert torch.allclose(weighted_mean(logits, label), unweighted(logits, label))
    monkeypatch.setattr(settled, "refuse_lost_weights", lambda *_: None)
    trainer_with(weighted_mean, tmp_path, "compute_loss").train()
