"""What is refused before training, by name and with the remedy, and what is switched off on a copy.

An option is refused when the guarantee would not hold with it, or is not proven here; it is switched
off when it changes nothing a person asked for. The user's own arguments are never edited.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

from accelerate.utils import DistributedType, DynamoBackend
from transformers import TrainingArguments

from hf_dp.errors import ConfigurationError, explain

logger = logging.getLogger(__name__)

_DEFAULT_MAX_GRAD_NORM = 1.0

Check = tuple[str, Callable[[Any], bool], str, str, str]  # field, is it bad, expected, why, remedy


def _on(value: object) -> bool:
    return bool(value)


_REFUSED: tuple[Check, ...] = (
    (
        "world_size",
        lambda value: value > 1,
        "one process",
        "Noise and sampling across processes are not built yet.",
        "Start a single process, for instance without torchrun.",
    ),
    (
        "n_gpu",
        lambda value: value > 1,
        "at most one GPU",
        "DataParallel would split a batch behind the clipping's back.",
        "Set CUDA_VISIBLE_DEVICES=0.",
    ),
    (
        "device",
        lambda value: value.type not in ("cpu", "cuda"),
        "a processor or a CUDA GPU",
        "Checks and noise compute in float64, which Apple's mps lacks; no other device was ever tried.",
        "Pass use_cpu=True.",
    ),
    (
        "deepspeed",
        _on,
        "None",
        "DeepSpeed owns the backward pass and the optimizer, so gradients cannot be clipped per example.",
        "Train without DeepSpeed.",
    ),
    (
        "fsdp",
        _on,
        "None",
        "Sharded gradients are not clipped per example yet.",
        "Train without FSDP.",
    ),
    (
        "parallelism_config",
        _on,
        "None",
        "Tensor, context and sequence parallelism spread one example over processes.",
        "Train in one process.",
    ),
    (
        "fp16",
        _on,
        "False",
        "Loss scaling skips steps whose release was already made and recorded.",
        "Use bf16=True or full precision.",
    ),
    (
        "tf32",
        _on,
        "None or False",
        "Norms computed in TF32 are off by up to 1e-3, so the clipping bound would not hold.",
        "Leave tf32 off, or use bf16=True, where norms are still computed in float32.",
    ),
    (
        "torch_compile",
        _on,
        "False",
        "A compiled model runs without the hooks that see per-example gradients.",
        "Leave torch_compile off.",
    ),
    (
        "use_liger_kernel",
        _on,
        "False",
        "Its fused layers compute gradients that no layer rule sees.",
        "Leave use_liger_kernel off.",
    ),
    (
        "auto_find_batch_size",
        _on,
        "False",
        "It restarts the loop after releases were made, and the step count would forget them.",
        "Leave it off: micro-batches that do not fit in memory are halved, and no step is lost.",
    ),
    (
        "train_sampling_strategy",
        lambda value: value not in (None, "random"),
        "'random'",
        "Logical batches are drawn by Poisson sampling, which the accounting relies on.",
        "Leave it at 'random'; draws are ordered by length inside anyway.",
    ),
    (
        "neftune_noise_alpha",
        _on,
        "None",
        "Its scale depends on the padded length, so on the other examples of the batch.",
        "Leave it out.",
    ),
    (
        "optim",
        lambda value: any(word in str(value).lower() for word in ("lomo", "layerwise")),
        "an optimizer with an ordinary step",
        "Layer-wise optimizers use gradients inside the backward pass, before clipping and noise.",
        "Use optim='adamw_torch'.",
    ),
    (
        "packing",
        _on,
        "False",
        "Packing puts several examples into one row, so the unit of the guarantee would be wrong.",
        "Set packing=False.",
    ),
    (
        "debug",
        _on,
        "[]",
        "Its tracing prints activations of private examples, and stops where one of them overflows.",
        "Leave it out.",
    ),
    (
        "skip_memory_metrics",
        lambda value: not value,
        "True",
        "How much memory a run took tells of the length of the longest example drawn.",
        "Leave it at True.",
    ),
    (
        "padding_free",
        _on,
        "False",
        "Without padding the examples of a batch are one row and cannot be told apart.",
        "Set padding_free=False.",
    ),
)


def refuse_options(args: TrainingArguments) -> None:
    """Refuse training arguments with which the guarantee would not hold.

    Raises:
        ConfigurationError: For the first such option.
    """
    for field, is_bad, expected, why, remedy in _REFUSED:
        value = getattr(args, field, None)
        if value is not None and is_bad(value):
            raise ConfigurationError(
                explain(f"TrainingArguments.{field}", value, expected, why, remedy)
            )
    accumulation = getattr(args.accelerator_config, "gradient_accumulation_kwargs", None) or {}
    if accumulation.get("num_steps", 1) != 1:
        raise ConfigurationError(
            explain(
                "TrainingArguments.accelerator_config.gradient_accumulation_kwargs",
                accumulation,
                "no num_steps",
                "The size of a logical batch must be known before it is drawn.",
                "Set gradient_accumulation_steps instead.",
            )
        )
    for field in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if (getattr(args, field, None) or {}).get("use_reentrant"):
            raise ConfigurationError(
                explain(
                    f"TrainingArguments.{field}",
                    getattr(args, field),
                    "use_reentrant=False",
                    "Reentrant checkpointing hides gradients from the per-example clipping.",
                    "Set {'use_reentrant': False}.",
                )
            )


def refuse_launcher(accelerator: Any) -> None:
    """Refuse what ``accelerate launch`` switches on behind the training arguments.

    Raises:
        ConfigurationError: More than plain training in one process.
    """
    scaled = "a gradient scaler" if accelerator.scaler is not None else None
    plugin = getattr(accelerator.state, "dynamo_plugin", None)
    backend = getattr(plugin, "backend", DynamoBackend.NO)
    compiled = None if backend == DynamoBackend.NO else f"torch.compile ({backend})"
    spread = accelerator.distributed_type
    distributed = None if spread == DistributedType.NO else str(spread)
    for found in (distributed, compiled, scaled):
        if found is not None:
            raise ConfigurationError(
                explain(
                    "accelerator",
                    found,
                    "plain training in one process",
                    "Gradients must be seen, clipped and noised as a whole, in one place.",
                    "Start with python instead of accelerate launch, or clear the ACCELERATE_ variables.",
                )
            )


def private_copy(args: TrainingArguments) -> TrainingArguments:
    """A copy of the training arguments for the host, with what privacy replaces switched off."""
    mine = copy.copy(args)
    mine.accelerator_config = copy.deepcopy(args.accelerator_config)  # the host writes into it
    mine.gradient_accumulation_steps = 1  # one item of the loader is one logical batch
    if mine.max_grad_norm > 0:
        logger.log(
            logging.INFO if mine.max_grad_norm == _DEFAULT_MAX_GRAD_NORM else logging.WARNING,
            "hf_dp: max_grad_norm=%s is switched off: it would clip the noisy gradient once more. "
            "DPArguments.clipping_norm bounds each example's gradient.",
            mine.max_grad_norm,
        )
        mine.max_grad_norm = 0.0
    if mine.dataloader_drop_last:
        logger.warning(
            "hf_dp: dataloader_drop_last=True changes nothing in training: a batch that is drawn is never "
            "incomplete. Evaluation heeds it as ever."
        )
    if getattr(mine, "include_num_input_tokens_seen", "no") not in ("no", False):
        logger.warning(
            "hf_dp: include_num_input_tokens_seen is switched off: exact token counts are private data."
        )
        mine.include_num_input_tokens_seen = "no"
    return mine
