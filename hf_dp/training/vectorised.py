"""The losses of a whole micro-batch from one forward pass without labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hf_dp.errors import ConfigurationError, explain
from hf_dp.training.positions import width_of
from hf_dp.training.reductions import (
    IGNORED,
    binary_losses,
    class_losses,
    own_labels,
    span_losses,
    squared_losses,
    token_losses,
)
from hf_dp.training.tasks import ProblemType, Task, problem_type, unwrapped

_ENDS = ("start_positions", "end_positions")


@dataclass(frozen=True)
class VectorisedLoss:
    """Runs the model once and reduces its logits row by row.

    Attributes:
        task: Which reduction.
        label_smoothing: In [0, 1]; as transformers' label smoother, so without effect on question
            answering, regression and multi-label classification.
        problem_type: For sequence classification; None to decide as transformers does.
    """

    task: Task
    label_smoothing: float = 0.0
    problem_type: ProblemType | None = None

    def __post_init__(self) -> None:
        """Refuse a smoothing that is not a share."""
        if not 0 <= self.label_smoothing <= 1:
            raise ConfigurationError(
                explain(
                    "TrainingArguments.label_smoothing_factor",
                    self.label_smoothing,
                    "a number in [0, 1]",
                    "It is the share of the target that is spread over all classes.",
                    "Use 0 for none.",
                )
            )

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The losses, ``(B,)``, float32 or wider.

        Args:
            model: Called once.
            inputs: A micro-batch with labels.

        Raises:
            ConfigurationError: If labels are missing, or the shapes do not fit the task.
        """
        is_span = self.task is Task.QUESTION_ANSWERING
        targets = [_target(name, inputs) for name in (_ENDS if is_span else ("labels",))]
        outputs = model(**_call_arguments(self.task, model, inputs))
        if is_span:
            return span_losses(
                logits_of(outputs, "start_logits", 0),
                logits_of(outputs, "end_logits", 1),
                targets[0],
                targets[1],
                inputs.get("attention_mask"),
            )
        labels, logits = targets[0], logits_of(outputs)
        if self.task not in (Task.SEQ2SEQ_LM, Task.SEQUENCE_CLASSIFICATION):
            shifted = self.task is Task.CAUSAL_LM
            prompt = _prompt(logits, labels, inputs) if shifted else 0
            labels = own_labels(
                labels, inputs.get("attention_mask"), shifted=shifted, prompt=prompt
            )
        return self._reduce(model, logits, labels)

    def describe(self) -> str:
        """One line for the log."""
        words = [self.task.replace("_", " ")]
        if self.problem_type is not None:
            words.append(self.problem_type.replace("_", " "))
        if self.label_smoothing:
            words.append(f"label smoothing {self.label_smoothing:g}")
        return ", ".join(words)

    def _reduce(self, model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
        if self.task is not Task.SEQUENCE_CLASSIFICATION:
            return token_losses(logits, labels, label_smoothing=self.label_smoothing)
        kind = self.problem_type or problem_type(model, logits, labels)
        if kind is ProblemType.REGRESSION:
            return squared_losses(logits, labels)
        if kind is ProblemType.MULTI_LABEL:
            return binary_losses(logits, labels)
        return class_losses(logits, labels, label_smoothing=self.label_smoothing)


def vectorised_loss(task: Task, *, label_smoothing: float = 0.0) -> VectorisedLoss:
    """The fast loss of a task.

    Args:
        task: What the model is trained for.
        label_smoothing: ``TrainingArguments.label_smoothing_factor``.
    """
    return VectorisedLoss(task, label_smoothing)


def logits_of(outputs: Any, name: str = "logits", position: int = 0) -> Tensor:
    """The logits in whatever a model returned without labels.

    Args:
        outputs: A mapping, an object with attributes, a tuple or a tensor.
        name: Key or attribute.
        position: Place in a tuple.
    """
    if isinstance(outputs, Mapping):
        found = outputs.get(name)
    elif isinstance(outputs, tuple | list):
        found = outputs[position] if position < len(outputs) else None
    else:
        found = outputs if isinstance(outputs, Tensor) else getattr(outputs, name, None)
    if not isinstance(found, Tensor):
        raise ConfigurationError(
            explain(
                "model",
                type(outputs).__name__,
                f"an output with {name}, given no labels",
                "The losses of a micro-batch are read off them.",
                "Return them from the model's forward, or pass example_loss.",
            )
        )
    return found


def without_targets(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a forward pass that computes no loss and fills no cache."""
    dropped = {"labels", *_ENDS, "num_items_in_batch"}
    arguments = {name: value for name, value in inputs.items() if name not in dropped}
    # The class's forward: accelerate and others replace the instance's by one that takes anything.
    if "use_cache" in inspect.signature(type(unwrapped(model)).forward).parameters:
        arguments["use_cache"] = False
    return arguments


def _call_arguments(task: Task, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    arguments = without_targets(model, inputs)
    given = ("decoder_input_ids", "decoder_inputs_embeds")
    if task is Task.SEQ2SEQ_LM and all(arguments.get(name) is None for name in given):
        arguments["decoder_input_ids"] = decoder_inputs(unwrapped(model), inputs["labels"])
    return arguments


def _prompt(logits: Tensor, labels: Tensor, inputs: Mapping[str, Any]) -> int:
    """How many positions of its own a model puts before each example's.

    Raises:
        ConfigurationError: Labels have a width of their own, by which nobody knows whose are which.
    """
    width = width_of(inputs)
    if labels.dim() != 2 or logits.dim() != 3 or width is None:
        return 0
    more = logits.shape[1] - width
    if more > 0 and labels.shape[1] != width:
        raise ConfigurationError(
            explain(
                "batch.labels",
                f"{labels.shape[1]} wide",
                f"as wide as the tokens, {width}",
                f"The model puts {more} positions before them, and labels are filled up accordingly.",
                "Pad labels to the width of input_ids.",
            )
        )
    return more if labels.shape[1] == width else 0


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What a decoder reads to predict these labels: the labels, moved by one."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        prepared: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return prepared
    shifted = F.pad(labels[:, :-1], (1, 0), value=model.config.decoder_start_token_id)
    return shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id)


def _target(name: str, inputs: Mapping[str, Any]) -> Tensor:
    found = inputs.get(name)
    if isinstance(found, Tensor):
        return found
    raise ConfigurationError(
        explain(
            "batch",
            sorted(inputs),
            f"a tensor called {name}",
            "Without a target there is no loss.",
            "Let the data collator return it, or pass example_loss.",
        )
    )
