"""Accuracy as an `evaluate.Metric` of our own: ``evaluate.load`` would ask a hub for its code."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
from transformers import EvalPrediction


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their reference."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of predictions that equal their reference, in [0, 1].",
            citation="",
            inputs_description="predictions and references: class numbers, equally many.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        right = sum(int(p == r) for p, r in zip(predictions, references, strict=True))
        return {"accuracy": right / len(references)}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """What `Trainer` takes as ``compute_metrics``: logits ``(N, classes)`` against labels ``(N,)``."""
    metric = Accuracy(keep_in_memory=True)
    answers = prediction.predictions.argmax(axis=-1)
    result: dict[str, float] = metric.compute(predictions=answers, references=prediction.label_ids)
    return result
