"""What does protecting whole users cost, by sampling examples (ELS) and by sampling users (ULS)?

Critics' snippets about films, each film a "user": all its snippets are protected together. The demo's
encoder with LoRA learns the critic's verdict from 400 films and is tested on films that it never saw.
Every run sees as many examples a step, on average, and as many steps; epsilon is per film, delta is
(number of films) ** -1.1. ELS keeps G snippets a film and clips each; ULS draws films, G fresh snippets
of each, and clips a film's mean gradient. The clipping norm is the demo's, times how much shorter a mean of
G gradients is on 30 further films, taken as public. Runs differ in their secret coins alone.

    python -m benchmarks.user_level            # keeps each run as it ends, and goes on where it was
    python -m benchmarks.user_level --check    # few films, few steps; keeps nothing

Source:
    Charles et al. (2024), arXiv:2407.07737, for the two ways of sampling and the question.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

from benchmarks.trainer_step import machine
from hf_dp import DPArguments, DPTrainer, clipped_sum
from hf_dp.demo.assets import encoder_folder, reviews_csv
from hf_dp.demo.data import LABELS, Snippet, tokenized
from hf_dp.demo.metric import accuracy
from hf_dp.demo.model import load_classifier, with_lora
from hf_dp.demo.run import bfloat16_is_faster

RESULTS = Path(__file__).parent / "results" / "user_level.json"
TRAIN_FILMS, PUBLIC_FILMS = 400, 30
CLIPPING_NORM = 3.0  # of one example's gradient, as in the demo
LEARNING_RATE = 1e-2
SEEDS = 3
EPSILONS = (2.0, 8.0)
GROUPS = (1, 4, 16)

Films = Mapping[str, Sequence[Snippet]]


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        sampling: "examples" (ELS), "users" (ULS), or "none": the stock Trainer, without privacy.
        epsilon: Per film; inf for "none".
        group: G, the most examples of one film in play; 0 for "none".
    """

    sampling: str
    epsilon: float
    group: int


@dataclass(frozen=True)
class Budget:
    """What every run may compute: examples a step, on average, and steps."""

    examples: int = 128
    steps: int = 40


def films() -> Films:
    """Film -> its distinct snippets, both in an order that depends on their text alone."""
    csv.field_size_limit(1_000_000)
    rows = csv.DictReader(io.StringIO(reviews_csv(None)))
    found: dict[str, dict[str, Snippet]] = defaultdict(dict)
    owners: dict[str, str] = {}
    for row in rows:
        if row["category"] in LABELS:
            film = owners.setdefault(
                row["text"], row["movie_name"]
            )  # one owner, also of repeated text
            found[film][row["text"]] = Snippet(row["text"], LABELS.index(row["category"]))
    ordered = {
        film: [texts[text] for text in sorted(texts, key=_hash)] for film, texts in found.items()
    }
    return {film: ordered[film] for film in sorted(ordered, key=_hash)}


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


@dataclass(frozen=True)
class Material:
    """Three sets of films that share none."""

    train: Dataset
    public: Dataset
    test: Dataset
    num_films: int
    tokenizer: Any

    @classmethod
    def of(cls, everything: Films, train: int, public: int) -> Material:
        """Cut from the order of `films`."""
        tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
        names = list(everything)

        def part(some: Sequence[str]) -> Dataset:
            rows = [snippet for film in some for snippet in everything[film]]
            owners = [film for film in some for _ in everything[film]]
            return tokenized(rows, tokenizer).add_column("film", owners)

        return cls(
            train=part(names[:train]),
            public=part(names[train : train + public]),
            test=part(names[train + public :]).remove_columns("film"),
            num_films=train,
            tokenizer=tokenizer,
        )


def new_model() -> PeftModel:
    """The encoder with a head of zeros and LoRA on its two last layers."""
    return with_lora(load_classifier(encoder_folder()))


def shrinkage(material: Material, group: int) -> float:
    """How much shorter a film's mean gradient over `group` examples is than one example's, in (0, 1].

    Medians at the initial weights, over the public films.
    """
    rows = material.public
    taken: dict[str, int] = defaultdict(int)
    kept = []
    for index, film in enumerate(rows["film"]):
        taken[film] += 1
        if taken[film] <= group:
            kept.append(index)
    some = rows.select(kept)
    owners = some["film"]
    batch = DataCollatorWithPadding(material.tokenizer)(
        [{name: row[name] for name in row if name != "film"} for row in some]
    )
    model = new_model()
    each = clipped_sum(model, batch, clipping_norm=1.0).norms
    means = clipped_sum(model, batch, clipping_norm=1.0, users=owners).norms
    return float(means.median() / each.median())


def host_arguments(folder: str, budget: Budget, examples: int) -> TrainingArguments:
    """As in the demo, without a word."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=budget.steps,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=examples,
        per_device_eval_batch_size=128,
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=bfloat16_is_faster(),
    )


def trainer_for(
    setting: Setting, material: Material, budget: Budget, clipping_norm: float, folder: str
) -> Trainer:
    """A trainer that sees `budget.examples` examples a step, on average."""
    parts: dict[str, Any] = {
        "model": new_model(),
        "train_dataset": material.train,
        "eval_dataset": material.test,
        "processing_class": material.tokenizer,
        "compute_metrics": accuracy,
    }
    if setting.sampling == "none":
        parts["train_dataset"] = material.train.remove_columns("film")
        return Trainer(args=host_arguments(folder, budget, budget.examples), **parts)
    by_user = setting.sampling == "users"
    return DPTrainer(
        args=host_arguments(folder, budget, 64),
        dp_args=DPArguments(
            target_epsilon=setting.epsilon,
            privacy_unit="user",
            user_column="film",
            user_sampling=setting.sampling,
            max_examples_per_user=setting.group,
            expected_batch_size=budget.examples / setting.group if by_user else budget.examples,
            clipping_norm=clipping_norm,
        ),
        **parts,
    )


def run(
    setting: Setting, material: Material, budget: Budget, clipping_norm: float
) -> dict[str, Any]:
    """Train once; what came out."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(setting, material, budget, clipping_norm, folder)
        trainer.train()
        reached = trainer.evaluate()["eval_accuracy"]
        private = isinstance(trainer, DPTrainer)
        return {
            **asdict(setting),
            "epsilon": setting.epsilon if private else None,
            "accuracy": reached,
            "epsilon_spent": trainer.epsilon if private else None,
            "noise_multiplier": trainer.plan.noise.noise_multiplier if private else None,
            "clipping_norm": clipping_norm if private else None,
            "seconds": time.perf_counter() - start,
        }


def settings() -> Iterator[Setting]:
    """All of them, in an order in which a run that is cut off still has every kind."""
    for epsilon in EPSILONS:
        for group in GROUPS:
            for sampling in ("examples", "users"):
                yield Setting(sampling, epsilon, group)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy, mean and range over the runs of each setting, as Markdown."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["sampling"], row["epsilon"], row["group"]].append(row)
    lines = [
        "| sampling | epsilon | G | noise multiplier | accuracy, % (least to most) |",
        "|---|---|---|---|---|",
    ]
    for (sampling, epsilon, group), runs in found.items():
        reached = [100 * row["accuracy"] for row in runs]
        noise = runs[0]["noise_multiplier"]
        lines.append(
            f"| {sampling} | {epsilon or ''} | {group or ''} | {'' if noise is None else f'{noise:.3g}'} | "
            f"{statistics.mean(reached):.1f} ({min(reached):.1f} to {max(reached):.1f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="few films and steps; keep nothing")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    budget = Budget(examples=32, steps=3) if check else Budget()
    everything = films()
    if check:
        everything = dict(list(everything.items())[:80])
    material = Material.of(everything, 60 if check else TRAIN_FILMS, 10 if check else PUBLIC_FILMS)
    rows: list[dict[str, Any]] = []
    if RESULTS.exists() and not check:
        rows = json.loads(RESULTS.read_text())["rows"]
    shrunk = {group: shrinkage(material, group) for group in GROUPS}
    wanted = [Setting("none", float("inf"), 0), *settings()]
    for turn in range(1 if check else SEEDS):
        for setting in wanted:
            key = setting.sampling, setting.group, None if setting.group == 0 else setting.epsilon
            done = sum((row["sampling"], row["group"], row["epsilon"]) == key for row in rows)
            if done > turn:
                continue
            norm = CLIPPING_NORM * (shrunk[setting.group] if setting.sampling == "users" else 1.0)
            rows.append(run(setting, material, budget, norm))
            print(rows[-1], flush=True)
            if not check:
                _keep(rows, material, budget, shrunk)
    print(table(rows))


def _keep(
    rows: Sequence[Mapping[str, Any]],
    material: Material,
    budget: Budget,
    shrunk: Mapping[int, float],
) -> None:
    kept = {
        "machine": machine(),
        "data": {
            "films": material.num_films,
            "train": len(material.train),
            "test": len(material.test),
            "public": len(material.public),
        },
        "budget": asdict(budget),
        "learning_rate": LEARNING_RATE,
        "shrinkage": shrunk,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
