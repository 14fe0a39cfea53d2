"""How a model would be clipped: from a trainer, or from nothing but a model's configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from hf_dp.engines import engine_named
from hf_dp.engines.base import ExampleLoss, GradientEngine
from hf_dp.engines.explain import EngineReport, explain_engine
from hf_dp.engines.rows import OneExample
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import Norm
from hf_dp.training.made_up import made_up_rows
from hf_dp.training.positions import reads_text, room_of, width_of
from hf_dp.training.tasks import Task, recognise_task, unwrapped
from hf_dp.training.vectorised import vectorised_loss, without_targets

_HEADS = (
    "AutoModelForSequenceClassification",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
    "AutoModel",
)
_SECOND = 16_000  # of sound, in samples


def explain_training(
    model: nn.Module,
    columns: Mapping[str, Any],
    *,
    engine: GradientEngine,
    example_loss: ExampleLoss,
    length: int = 128,
    norm: Norm = "l2",
) -> EngineReport:
    """Try `engine` on two made-up examples with the columns of a batch of one real one.

    Args:
        model: As it will be trained.
        columns: Of its values only shapes and types are used.
        engine: The one that will train.
        example_loss: One loss per example.
        length: In tokens; what the model's positions do not reach is cut. Sound is as long as the real.
        norm: In which examples are clipped.

    Raises:
        ConfigurationError: The model does not take the made-up examples.
    """
    if isinstance(columns, OneExample):
        raise ConfigurationError(
            explain(
                "explain_engine",
                type(unwrapped(model)).__name__,
                "examples whose tensors have one row each",
                "The patches of several pictures are in one tensor, so all parameters are clipped by plain "
                "autograd, one example at a time (engine='sequential'), and there is nothing to choose.",
                "Train as you are.",
            )
        )
    room = room_of(model)
    length = length if room is None else max(2, min(length, room))
    try:
        width = None if reads_text(columns) else width_of(columns)
        rows = made_up_rows(model, columns, (width or length,) * 2, (length,) * 2)
        with torch.no_grad():
            example_loss(model, rows)
    except Exception as error:  # a foreign model may want anything of its data
        raise ConfigurationError(
            explain(
                "explain_engine",
                type(unwrapped(model)).__name__,
                "a model that runs on made-up examples",
                f"It was refused with {type(error).__name__}, so its engine cannot be tried out.",
                "Call hf_dp.engines.explain.explain_engine with examples of your own making.",
            )
        ) from None
    return explain_engine(
        model,
        rows,
        engine=engine,
        example_loss=example_loss,
        length=length if reads_text(rows) else None,
        norm=norm,
    )


def explain_configuration(
    name: str, *, engine: str = "auto", length: int = 128, head: str | None = None
) -> EngineReport:
    """The same for a model with random weights, made from a configuration alone.

    Args:
        name: A folder with ``config.json``, or a name on the Hub.
        engine: Name of an engine.
        length: In tokens.
        head: A class of transformers, or None for the one that the configuration names.

    Raises:
        ConfigurationError: There is no such configuration, or it fits no class.
    """
    model = _model_of(name, head)
    task = _task_of(model)
    loss: ExampleLoss = _outputs_squared if task is None else vectorised_loss(task)
    columns = _columns(model, task)
    return explain_training(
        model, columns, engine=engine_named(engine), example_loss=loss, length=length
    )


def _model_of(name: str, head: str | None) -> nn.Module:
    try:
        config: Any = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            explain(
                "explain.model",
                name,
                "a folder with config.json, or a name on the Hub",
                f"It could not be read ({type(error).__name__}).",
                "Pass the folder of save_pretrained(), or check the connection.",
            )
        ) from error
    for wanted in ("pad_token_id", "decoder_start_token_id"):  # heads ask for them, files may not
        if getattr(config, wanted, None) is None:
            setattr(config, wanted, 0)
    with torch.random.fork_rng(devices=[]):
        for cls in _classes(config, head):
            try:
                made = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
            except (ValueError, TypeError):  # another head's configuration
                continue
            model: nn.Module = made.train()
            return model
    raise ConfigurationError(
        explain(
            "explain.head",
            head,
            "a class of transformers that takes this configuration",
            "Without a model there is nothing to explain.",
            "Pass for instance --head AutoModelForSequenceClassification.",
        )
    )


def _classes(config: Any, head: str | None) -> Iterator[Any]:
    named = [head] if head is not None else [*(config.architectures or []), *_HEADS]
    for name in named:
        found = getattr(transformers, name, None)
        if found is not None:
            yield found


def _task_of(model: nn.Module) -> Task | None:
    name = type(unwrapped(model)).__name__
    if name.endswith("ForQuestionAnswering"):
        return Task.QUESTION_ANSWERING
    return recognise_task(model, {"labels": None})


def _columns(model: nn.Module, task: Task | None) -> dict[str, Any]:
    """One example with the columns that such a model takes; only shapes and types matter."""
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", "input_ids")
    columns: dict[str, Any] = {}
    if main == "input_ids":
        columns = {
            name: torch.ones(1, 1, dtype=torch.long) for name in ("input_ids", "attention_mask")
        }
    elif main == "pixel_values":
        columns = {main: torch.zeros(1, getattr(config, "num_channels", 3), *_image_size(config))}
    elif main == "input_features":
        columns = {main: torch.zeros(1, getattr(config, "num_mel_bins", 80), 3000)}
    else:
        columns = {main: torch.zeros(1, _SECOND)}
    if task is Task.QUESTION_ANSWERING:
        return columns | dict.fromkeys(("start_positions", "end_positions"), torch.zeros(1).long())
    if task is Task.SEQUENCE_CLASSIFICATION:
        return columns | {"labels": torch.zeros(1, dtype=torch.long)}
    return columns if task is None else columns | {"labels": torch.zeros(1, 1, dtype=torch.long)}


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", 224)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _outputs_squared(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """A loss for models without a head: any will do to see which rules answer."""
    outputs: Any = model(**without_targets(model, inputs))
    first: Tensor = outputs[0]
    return first.square().flatten(1).mean(1)
