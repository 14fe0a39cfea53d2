"""Models, collators and data that are refused, because examples would influence one another."""

from __future__ import annotations

import logging
from inspect import signature
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from transformers import PreTrainedConfig

from hf_dp.errors import ConfigurationError, explain
from hf_dp.training.tasks import unwrapped
from hf_dp.training.untracked import refuse_untracked

logger = logging.getLogger(__name__)

_RETURNING = frozenset({"patchtsmixer"})  # an ordinary loss, under the argument of contrastive ones
_FAMILIES = "transformers.models."
_SAMPLERS = ("torch.", "accelerate.")  # where those of the Trainer come from
_COMPETING = frozenset({"NllbMoeTop2Router"})

_PLAIN_STEPS = frozenset({"transformers.trainer", "trl.trainer.sft_trainer"})
_BETWEEN = ("_prepare_inputs", "_prepare_input", "get_batch_samples")  # collator and model
HOSTS = frozenset({"transformers", "trl", "hf_dp", "accelerate", "torch"})


def refuse_model(model: nn.Module) -> None:
    """Refuse models whose examples influence one another.

    Raises:
        ConfigurationError: The model has BatchNorm, tables that look-ups rescale, experts of limited
            capacity, rotary positions or blocks of attention that follow the batch, a router balancing
            loss or a contrastive loss.
    """
    refuse_untracked(model)
    for name, module in model.named_modules():
        _refuse_module(f"model.{name}" if name else "model", module)
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        raise _coupled(
            "model.config.output_router_logits",
            True,
            "False",
            "The router's balancing loss depends on all examples of a batch.",
            "Set model.config.output_router_logits = False.",
        )
    inner = unwrapped(model)
    if _is_contrastive(inner):
        raise _coupled(
            "model",
            type(inner).__name__,
            "a model whose loss is a mean over examples",
            "A contrastive loss compares every example with the others of its batch.",
            "Train a head with an ordinary loss on its features.",
        )


def _is_contrastive(model: nn.Module) -> bool:
    """Whether it compares pairs: models of transformers are asked for that loss by ``return_loss``."""
    of_library = any(base.__module__.startswith(_FAMILIES) for base in type(model).__mro__)
    family = getattr(getattr(model, "config", None), "model_type", None)
    if not of_library or family in _RETURNING:
        return False
    return "return_loss" in signature(model.forward).parameters


def _refuse_module(name: str, module: nn.Module) -> None:
    if isinstance(module, _BatchNorm):
        raise _coupled(
            name,
            type(module).__name__,
            "no BatchNorm",
            "Its statistics mix the examples of a batch.",
            "Replace it by GroupNorm or LayerNorm.",
        )
    if getattr(module, "max_norm", None) is not None:
        raise _coupled(
            f"{name}.max_norm",
            module.max_norm,
            "None",
            "It rescales the rows that a batch looks up, so the table shows which tokens the data holds.",
            "Set it to None.",
        )
    if getattr(module, "attention_type", None) == "block_sparse":
        raise _coupled(
            f"{name}.attention_type",
            module.attention_type,
            "'original_full'",
            "The last block of a batch is read by all, and a batch of few tokens switches every later "
            "example to full attention.",
            "Load the model with attention_type='original_full'.",
        )
    averaged = set(getattr(module, "lora_velora_init_type", {}).values()) - {"random"}
    if averaged:
        raise _coupled(
            f"{name}.velora_config.init_type",
            sorted(averaged),
            "'random'",
            "An average over the batch, kept with the model, would enter every example's gradient.",
            "Use VeloraConfig(init_type='random').",
        )
    if type(module).__name__ in _COMPETING:
        raise _coupled(
            name,
            type(module).__name__,
            "a router that sends every token to its experts",
            "With an expert capacity, the tokens of other examples take an example's place.",
            "Use a model without expert capacity, such as Mixtral.",
        )
    stretched = _rope_types(module) & {"dynamic", "longrope"}
    if stretched:
        raise _coupled(
            f"{name}.config.rope_parameters",
            sorted(stretched),
            "rotary positions that do not depend on the length of the batch",
            "These change with the longest example of a batch, so it would change every gradient.",
            "Use rope_type 'default', 'linear', 'yarn' or 'llama3'.",
        )


def refuse_collator(collator: object) -> None:
    """Refuse collators that join examples into one row, or draw from a generator of their own.

    Raises:
        ConfigurationError: The collator flattens, packs, or has a seed.
    """
    for part in _with_parts(collator):
        if "Flattening" in type(part).__name__ or getattr(part, "padding_free", False):
            raise _coupled(
                "data_collator",
                type(part).__name__,
                "one row per example",
                "A flattened batch is one row, so its examples cannot be told apart.",
                "Use DataCollatorWithPadding or DataCollatorForSeq2Seq.",
            )
        seed = getattr(part, "seed", None)
        if seed is not None and not callable(seed):
            raise _coupled(
                "data_collator.seed",
                seed,
                "None",
                "Masks from a known seed move from one example to the next when an example is missing.",
                "Leave the seed out: collators draw from secret coins.",
            )


def refuse_preparing(trainer: object) -> None:
    """Refuse methods that come between the collator and the model, if no library wrote them.

    Raises:
        ConfigurationError: A class of the trainer, or itself, has one.
    """
    holders = [vars(trainer), *map(vars, type(trainer).__mro__)]
    for name in _BETWEEN:
        foreign = [h[name] for h in holders if name in h and not _of_a_host(h[name])]
        if foreign:
            raise _coupled(
                f"{type(trainer).__name__}.{name}",
                getattr(foreign[0], "__qualname__", type(foreign[0]).__qualname__),
                "the method of transformers, trl or hf_dp",
                "It is given all rows of a micro-batch, and an example that gets into several of them, as by "
                "mixup, would count in each.",
                "Prepare each example by itself: in the dataset, in the data collator, or in compute_loss, "
                "which is then called for one example at a time.",
            )


def announce_unused_step(trainer: object, private: type) -> None:
    """Warn of a ``training_step`` below that of `private`, in whose place it would have been run.

    Those of TRL's SFT do no more than to call the next; what others add is left out.
    """
    kinds = type(trainer).__mro__
    below = kinds[kinds.index(private) + 1 :]
    unused = next((kind for kind in below if "training_step" in vars(kind)), None)
    if unused is not None and unused.__module__ not in _PLAIN_STEPS:
        logger.warning(
            "hf_dp: %s.training_step is not called: the private step takes its place, so what it does "
            "besides one ordinary step is left out.",
            unused.__qualname__,
        )


def _of_a_host(function: Any) -> bool:
    """Whether all functions that one is wrapped in come from libraries; names may be copied, globals not."""
    function = getattr(function, "__func__", function)
    while isinstance(function, FunctionType):
        if str(function.__globals__.get("__name__")).partition(".")[0] not in HOSTS:
            return False
        function = getattr(function, "__wrapped__", None)
    return function is None


def _with_parts(collator: object) -> list[object]:
    """The collator, and those that it was made of: wrapped, bound, partly applied."""
    found: list[object] = []
    todo = [collator]
    while todo:
        part = todo.pop()
        if (not found or callable(part)) and not any(part is known for known in found):
            found.append(part)
            todo += [getattr(part, name, None) for name in ("func", "__self__", "__wrapped__")]
            todo += [*getattr(part, "args", ()), *(getattr(part, "keywords", None) or {}).values()]
            if not isinstance(part, type | nn.Module) and hasattr(part, "__dict__"):
                todo += vars(part).values()
    return found


def refuse_dataset(dataset: Any) -> int:
    """Check the training data and return its number of examples.

    Raises:
        ConfigurationError: There is none, it has no length, or it is empty.
    """
    if dataset is None:
        raise _coupled(
            "train_dataset", None, "a dataset", "There is nothing to train on.", "Pass one."
        )
    try:
        if isinstance(dataset, IterableDataset):
            raise TypeError
        size = len(dataset)
    except TypeError:
        raise _coupled(
            "train_dataset",
            type(dataset).__name__,
            "a dataset with a length",
            "The sampling probability is the expected batch size divided by that length.",
            "Use a map-style dataset; a streamed one can be materialised with Dataset.from_generator.",
        ) from None
    if size == 0:
        raise _coupled(
            "train_dataset",
            "empty",
            "at least one example",
            "There is nothing to train on.",
            "Add data.",
        )
    return size


def refuse_sampler(loader: DataLoader[Any]) -> None:
    """Refuse a host's loader that draws in a way of its own, which nobody would follow.

    Raises:
        ConfigurationError: It has another sampler than the Trainer's.
    """
    batches = loader.batch_sampler
    sampler = getattr(batches, "sampler", loader.sampler)
    known = isinstance(sampler, RandomSampler | SequentialSampler)
    for part, plain in (
        (batches, batches is None or isinstance(batches, BatchSampler)),
        (sampler, known),
    ):
        if part is not None and not (plain and type(part).__module__.startswith(_SAMPLERS)):
            raise _coupled(
                "get_train_dataloader().sampler",
                type(part).__name__,
                "the Trainer's own",
                "Examples are drawn as DPArguments.sampling says, on which epsilon rests, so another "
                "sampler, or its weights, would not be heeded.",
                "Leave _get_train_sampler and get_train_dataloader as they are.",
            )


def refuse_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Refuse an optimizer with parameters that the model does not have.

    Raises:
        ConfigurationError: It would never move them: only the model's gradients are clipped and released.
    """
    known = {id(p) for p in model.parameters()}
    for group, options in enumerate(getattr(optimizer, "param_groups", ())):
        for place, parameter in enumerate(options["params"]):
            if id(parameter) not in known:
                raise _coupled(
                    f"optimizer.param_groups[{group}]['params'][{place}]",
                    f"{type(parameter).__name__} of shape {tuple(parameter.shape)}",
                    "a parameter of the model",
                    "Gradients are clipped and released for the model's parameters alone, so that this one "
                    "would never be trained.",
                    "Make it a parameter of the model, or leave it out of the optimizer.",
                )


def _rope_types(module: nn.Module) -> set[str]:
    """Every kind of rotary position that a module names or that its configuration sets."""
    found: set[str] = set()
    todo: list[Any] = [getattr(module, "rope_type", None), getattr(module, "config", None)]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            found.add(item)
        elif isinstance(item, dict):
            found |= {str(item[name]) for name in ("rope_type", "type") if name in item}
            todo.extend(value for value in item.values() if isinstance(value, dict))
        elif isinstance(item, PreTrainedConfig):
            todo.extend(getattr(item, name, None) for name in ("rope_parameters", "rope_scaling"))
            todo.extend(part for part in vars(item).values() if isinstance(part, PreTrainedConfig))
    return found


def _coupled(field: str, value: object, expected: str, why: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(explain(field, value, expected, why, remedy))
