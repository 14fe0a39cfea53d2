"""What does protecting whole users cost, by sampling examples (ELS) and by sampling users (ULS)?

Critics' snippets about films, each film a "user": all its snippets are protected together. From 400 films a
classifier learns the critic's verdict, and is tested on films that it never saw: a linear head on the demo's
frozen encoder, and, at a few points, the encoder with LoRA. Every run of a model sees as many
examples a step, on average, and as many steps; epsilon is per film, delta is (number of films) ** -1.1.
ELS keeps G snippets a film and clips each; ULS draws films, G fresh snippets of each, and clips a film's mean
gradient. Its clipping norm is that of single examples times how much shorter a mean of G gradients is on 30
further films, taken as public. Runs differ in their secret coins alone.

    python -m benchmarks.user_level            # keeps each run as it ends, and goes on where it was
    python -m benchmarks.user_level --check    # few films, few steps; keeps nothing

Source:
    Charles et al. (2024), arXiv:2407.07737, for the two ways of sampling and the question.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from benchmarks.trainer_step import machine
from benchmarks.user_films import (
    PUBLIC_FILMS,
    TRAIN_FILMS,
    Material,
    films,
    head_material,
    lora_material,
)
from hf_dp import DPArguments, DPTrainer, clipped_sum
from hf_dp.demo.metric import accuracy

RESULTS = Path(__file__).parent / "results" / "user_level.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how much every run of it may compute.

    Attributes:
        examples: A step's, on average.
        steps: Of every run.
        learning_rate: Of Adam, falling linearly to zero; from a few runs on the public films.
        clipping_norm: Of one example's gradient.
        epsilons: Targets, per film.
        groups: The most examples of one film in play, G.
        runs: Of each setting.
    """

    name: str
    examples: int
    steps: int
    learning_rate: float
    clipping_norm: float
    epsilons: tuple[float, ...]
    groups: tuple[int, ...]
    runs: int


HEAD = Recipe("head", 256, 60, 0.1, 0.5, (1.0, 3.0, 8.0), (1, 4, 16), 4)
LORA = Recipe("LoRA", 128, 30, 1e-2, 3.0, (8.0,), (8,), 2)


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        model: The recipe's name.
        sampling: "examples" (ELS), "users" (ULS), or "none": the stock Trainer, without privacy.
        epsilon: Per film; None without privacy.
        group: G; None without privacy.
    """

    model: str
    sampling: str
    epsilon: float | None = None
    group: int | None = None


def settings(recipe: Recipe) -> Iterator[Setting]:
    """All settings of a model, each as often as it is run, turn by turn."""
    for _ in range(recipe.runs):
        yield Setting(recipe.name, "none")
        for epsilon in recipe.epsilons:
            for group in recipe.groups:
                for sampling in ("examples", "users"):
                    yield Setting(recipe.name, sampling, epsilon, group)


def shrinkage(material: Material, group: int) -> float:
    """How much shorter a film's mean gradient over `group` examples is than one example's, in (0, 1].

    Medians at the initial weights, over the public films.
    """
    taken: Counter[str] = Counter()
    kept = []
    for index, film in enumerate(material.public["film"]):
        taken[film] += 1
        if taken[film] <= group:
            kept.append(index)
    some = material.public.select(kept)
    batch = material.collator([{n: row[n] for n in row if n != "film"} for row in some])
    model = material.new_model()
    each = clipped_sum(model, batch, clipping_norm=1.0).norms
    means = clipped_sum(model, batch, clipping_norm=1.0, users=some["film"]).norms
    return float(means.median() / each.median())


def host_arguments(folder: str, recipe: Recipe, examples: int) -> TrainingArguments:
    """As in the demo, without a word."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        per_device_train_batch_size=examples,
        per_device_eval_batch_size=128,
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def trainer_for(
    setting: Setting, recipe: Recipe, material: Material, clipping_norm: float, folder: str
) -> Trainer:
    """A trainer that sees `recipe.examples` examples a step, on average."""
    parts: dict[str, Any] = {
        "model": material.new_model(),
        "train_dataset": material.train,
        "eval_dataset": material.test.remove_columns("film"),
        "data_collator": material.collator,
        "compute_metrics": accuracy,
    }
    if setting.group is None:
        parts["train_dataset"] = material.train.remove_columns("film")
        return Trainer(args=host_arguments(folder, recipe, recipe.examples), **parts)
    per_draw = setting.group if setting.sampling == "users" else 1
    return DPTrainer(
        args=host_arguments(folder, recipe, 64),
        dp_args=DPArguments(
            target_epsilon=setting.epsilon,
            privacy_unit="user",
            user_column="film",
            user_sampling=setting.sampling,
            max_examples_per_user=setting.group,
            expected_batch_size=recipe.examples / per_draw,
            clipping_norm=clipping_norm,
        ),
        **parts,
    )


def run(setting: Setting, recipe: Recipe, material: Material, clipping_norm: float) -> Row:
    """Train once; what came out."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(setting, recipe, material, clipping_norm, folder)
        trainer.train()
        row = {**asdict(setting), "accuracy": trainer.evaluate()["eval_accuracy"]}
        if isinstance(trainer, DPTrainer):
            row["epsilon_spent"] = trainer.epsilon
            row["noise_multiplier"] = trainer.plan.noise.noise_multiplier
            row["clipping_norm"] = clipping_norm
    return {**row, "seconds": time.perf_counter() - start}


def measure(recipe: Recipe, material: Material, rows: list[Row]) -> Iterator[list[Row]]:
    """Add the runs that `rows` lacks, and hand all of them out after each."""
    shrunk = {group: shrinkage(material, group) for group in recipe.groups}
    done = Counter(_setting(row) for row in rows)
    wanted: Counter[Setting] = Counter()
    for setting in settings(recipe):
        wanted[setting] += 1
        if done[setting] >= wanted[setting]:
            continue
        by_user = setting.sampling == "users" and setting.group is not None
        norm = recipe.clipping_norm * (shrunk[setting.group] if by_user else 1.0)  # type: ignore[index]
        rows.append(run(setting, recipe, material, norm))
        yield rows


def _setting(row: Mapping[str, Any]) -> Setting:
    return Setting(row["model"], row["sampling"], row["epsilon"], row["group"])


def table(rows: Sequence[Row]) -> str:
    """Accuracy, mean and range over the runs of each setting, as Markdown."""
    found: dict[Setting, list[Row]] = defaultdict(list)
    for row in rows:
        found[_setting(row)].append(row)
    lines = [
        "| model | sampling | epsilon | G | noise multiplier | accuracy, %: mean (least to most) |",
        "|---|---|---|---|---|---|",
    ]
    for one, runs in found.items():
        reached = [100 * row["accuracy"] for row in runs]
        noise = runs[0].get("noise_multiplier")
        shown = ("" if part is None else f"{part:.3g}" for part in (one.epsilon, one.group, noise))
        lines.append(
            f"| {one.model} | {one.sampling} | {' | '.join(shown)} | "
            f"{statistics.mean(reached):.1f} ({min(reached):.1f} to {max(reached):.1f}) |"
        )
    return "\n".join(lines)


def _small(recipe: Recipe) -> Recipe:
    return replace(recipe, examples=32, steps=2, groups=(1, 4), epsilons=(8.0,), runs=1)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="few films and steps; keeps nothing")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    everything = films()
    cut = TRAIN_FILMS, PUBLIC_FILMS
    if check:
        everything, cut = dict(list(everything.items())[:80]), (60, 10)
    rows: list[Row] = []
    if RESULTS.exists() and not check:
        rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    for recipe, make in ((HEAD, head_material), (LORA, lora_material)):
        used, material = _small(recipe) if check else recipe, make(everything, *cut)
        for _ in measure(used, material, rows):
            print(rows[-1], flush=True)
            if not check:
                sizes = {name: len(getattr(material, name)) for name in ("train", "public", "test")}
                kept = {"machine": machine(), "films": TRAIN_FILMS, "snippets": sizes}
                recipes = [asdict(HEAD), asdict(LORA)]
                text = json.dumps({**kept, "recipes": recipes, "rows": rows}, indent=1)
                RESULTS.write_text(text + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
