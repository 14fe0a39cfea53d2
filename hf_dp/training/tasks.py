"""Which task a model is trained for, guessed from names and shapes, and the scale of its loss.

A guess decides nothing by itself: `hf_dp.training.losses` believes it only after a comparison.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

UNKNOWN_CEILING = 10.0


class Task(StrEnum):
    """The tasks whose loss is computed for a whole micro-batch at once."""

    CAUSAL_LM = "causal_lm"
    MASKED_LM = "masked_lm"
    SEQ2SEQ_LM = "seq2seq_lm"
    SEQUENCE_CLASSIFICATION = "sequence_classification"
    TOKEN_CLASSIFICATION = "token_classification"
    QUESTION_ANSWERING = "question_answering"


class ProblemType(StrEnum):
    """What a sequence classification head predicts; the values of ``config.problem_type``."""

    REGRESSION = "regression"
    SINGLE_LABEL = "single_label_classification"
    MULTI_LABEL = "multi_label_classification"


_LANGUAGE_MODELS = frozenset({Task.CAUSAL_LM, Task.MASKED_LM, Task.SEQ2SEQ_LM})
_CAUSAL_CLASSES = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_TRANSLATORS = frozenset(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values())  # Marian's, too
_HEADS: tuple[tuple[str, Task], ...] = (
    (r"For(Sequence|Image|Audio|Video)Classification", Task.SEQUENCE_CLASSIFICATION),
    (r"ForTokenClassification", Task.TOKEN_CLASSIFICATION),
    (r"ForMaskedLM", Task.MASKED_LM),
    (r"ForCausalLM|LMHeadModel", Task.CAUSAL_LM),
    (r"ForConditionalGeneration|EncoderDecoderModel$", Task.SEQ2SEQ_LM),
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model under PEFT, DistributedDataParallel and torch.compile."""
    inner = _inner(model)
    return model if inner is None else unwrapped(inner)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the configuration says so; False without a configuration."""
    return bool(getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False))


def recognise_task(model: nn.Module, inputs: Mapping[str, Any]) -> Task | None:
    """Guess the task from the label keys and the names of the model's class and its parents.

    Args:
        model: Any module; PEFT and data-parallel wrappers are looked through.
        inputs: A batch with its labels.

    Returns:
        The task, or None where there are no labels or the names say nothing.
    """
    if "start_positions" in inputs and "end_positions" in inputs:
        return Task.QUESTION_ANSWERING
    if "labels" not in inputs:
        return None
    return next(_tasks_by_name(model), None)


def closing_token(model: nn.Module) -> int | None:
    """The token from which a classifier with a decoder reads the class; None for other models.

    BART's and T5's take examples together only where each has as many of it as the others.
    """
    token = getattr(getattr(unwrapped(model), "config", None), "eos_token_id", None)
    reads = next(_tasks_by_name(model), None) is Task.SEQUENCE_CLASSIFICATION
    return token if reads and is_encoder_decoder(model) and isinstance(token, int) else None


def propose_tasks(logits: Tensor, labels: Tensor) -> Iterator[tuple[Task, ProblemType | None]]:
    """The losses that fit the shapes of a model's output and labels.

    Args:
        logits: ``(B, K)``, ``(B,)`` or ``(B, T, V)``.
        labels: ``(B,)``, ``(B, 1)``, ``(B, K)`` or ``(B, T)``.

    Yields:
        Task and, for sequence classification, the problem type.
    """
    whole_numbers = not labels.is_floating_point()
    if logits.dim() == 3 and whole_numbers and labels.shape == logits.shape[:2]:
        yield Task.TOKEN_CLASSIFICATION, None
        yield Task.CAUSAL_LM, None
    elif logits.dim() == 2 and whole_numbers and labels.numel() == len(logits):
        yield Task.SEQUENCE_CLASSIFICATION, ProblemType.SINGLE_LABEL
    elif logits.dim() <= 2 and logits.numel() == labels.numel():
        yield Task.SEQUENCE_CLASSIFICATION, ProblemType.REGRESSION
        yield Task.SEQUENCE_CLASSIFICATION, ProblemType.MULTI_LABEL


def default_loss_ceiling(model: nn.Module, task: Task | None) -> float:
    """The public constant above which the released training loss is cut off.

    Args:
        model: Read for its configuration only, so that the constant depends on no data.
        task: What it is trained for; None where unknown.

    Returns:
        Twice the loss of a uniform guess for classification, one and a half times for language
        models and question answering, in nats; 10.0 for regression and where the configuration is
        silent.
    """
    config: Any = getattr(unwrapped(model), "config", None)
    if task in _LANGUAGE_MODELS:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return _nats(1.5, getattr(text, "vocab_size", None))
    if task is Task.QUESTION_ANSWERING:
        return _nats(1.5, getattr(config, "max_position_embeddings", None))
    if task is Task.TOKEN_CLASSIFICATION:
        return _nats(2.0, getattr(config, "num_labels", None))
    if task is Task.SEQUENCE_CLASSIFICATION:
        return _classification_ceiling(config)
    return UNKNOWN_CEILING


def problem_type(model: nn.Module, logits: Tensor, labels: Tensor) -> ProblemType:
    """What a sequence classification head predicts, by the rule of transformers.

    Args:
        model: Its ``config.problem_type`` decides; it is read, never written.
        logits: ``(B, K)``.
        labels: Their type decides where the configuration is silent.
    """
    configured = getattr(getattr(unwrapped(model), "config", None), "problem_type", None)
    if configured is not None:
        return ProblemType(configured)
    if logits.dim() < 2 or logits.shape[-1] == 1:
        return ProblemType.REGRESSION
    return ProblemType.MULTI_LABEL if labels.is_floating_point() else ProblemType.SINGLE_LABEL


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        wrapped: nn.Module = model.module
        return wrapped
    base: Any = getattr(model, "get_base_model", None)
    inner = base() if callable(base) else dict(model.named_children()).get("_orig_mod")
    return inner if isinstance(inner, nn.Module) and inner is not model else None


def _tasks_by_name(model: nn.Module) -> Iterator[Task]:
    for cls in type(unwrapped(model)).__mro__:
        for pattern, task in _HEADS:
            if re.search(pattern, cls.__name__):
                decoder_only = task is Task.SEQ2SEQ_LM and not is_encoder_decoder(model)
                yield Task.CAUSAL_LM if decoder_only else task
        if cls.__name__ in _CAUSAL_CLASSES:
            yield Task.CAUSAL_LM
        if cls.__name__ in _TRANSLATORS:
            yield Task.SEQ2SEQ_LM


def _nats(factor: float, choices: object) -> float:
    if isinstance(choices, int) and choices > 1:
        return factor * math.log(choices)
    return UNKNOWN_CEILING


def _classification_ceiling(config: object) -> float:
    kind = getattr(config, "problem_type", None)
    if kind == ProblemType.REGRESSION:
        return UNKNOWN_CEILING
    # Each label of a multi-label head is a yes or no, and the loss is their mean.
    choices = 2 if kind == ProblemType.MULTI_LABEL else getattr(config, "num_labels", None)
    return _nats(2.0, choices)
