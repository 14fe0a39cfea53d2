from __future__ import annotations

import numpy as np
import pytest
from transformers import EvalPrediction

from hf_dp.demo.metric import Accuracy, accuracy


def prediction(answers: list[int], labels: list[int]) -> EvalPrediction:
    return EvalPrediction(predictions=np.eye(3)[answers], label_ids=np.array(labels))


@pytest.mark.parametrize(
    ("answers", "labels", "share"),
    [([0, 1, 2], [0, 1, 2], 1.0), ([0, 0, 0, 0], [0, 1, 2, 0], 0.5), ([1], [2], 0.0)],
)
def test_accuracy_is_the_share_of_right_answers(
    answers: list[int], labels: list[int], share: float
) -> None:
    assert accuracy(prediction(answers, labels)) == {"accuracy": share}


def test_it_is_an_ordinary_metric_that_takes_batches() -> None:
    metric = Accuracy(keep_in_memory=True)
    metric.add_batch(predictions=[1, 0], references=[1, 1])
    metric.add_batch(predictions=[1, 1], references=[1, 1])
    assert metric.compute() == {"accuracy": 0.75}
