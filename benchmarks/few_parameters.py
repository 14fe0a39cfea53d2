"""Where Laplace noise is less than Gaussian noise: few numbers, few releases, strong privacy.

Two things that are done with critics' snippets about films, with either noise at the same epsilon and
delta = 1e-10. Counts of them are published once. And four numbers on top of a frozen encoder are trained by
`DPTrainer`, in one step, in three, and in fifty, where the Gaussian is better. Every kind of noise gets as
clipping norm the median norm of public gradients, each in the norm that it is clipped in. Runs differ in
their secret coins alone.

    OMP_NUM_THREADS=1 python -m benchmarks.few_parameters    # some minutes on one core; keeps the result
    python -m benchmarks.few_parameters --check              # few runs; keeps nothing
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Trainer, TrainingArguments, default_data_collator

from benchmarks.trainer_step import machine
from benchmarks.word_pairs import Gates, Material, material, right_without_training
from hf_dp import DPArguments, DPTrainer, clipped_sum
from hf_dp.accounting import accountant_named
from hf_dp.coins import SecretCoins
from hf_dp.demo.data import snippets
from hf_dp.demo.metric import accuracy
from hf_dp.events import Norm
from hf_dp.noise import NoiseMechanism, search_noise
from hf_dp.noise.candidates import Family
from hf_dp.sums import ClippedSum

RESULTS = Path(__file__).parent / "results" / "few_parameters.json"
EPSILONS = (0.1, 0.3, 1.0)
DELTA = 1e-10
TRAIN_SNIPPETS, REPETITIONS = 200, 400
Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How long is trained.

    Attributes:
        sampling_probability: Of each snippet in each step.
        steps: Of every run.
        learning_rate: Of plain gradient descent, constant; about the best for the Gaussian at epsilon 0.3,
            in runs on 200 of the public snippets.
        runs: Of each setting.
    """

    name: str
    sampling_probability: float
    steps: int
    learning_rate: float
    runs: int


RECIPES = (
    Recipe("one step", 1.0, 1, 2.0, 40),
    Recipe("three steps", 1.0, 3, 1.0, 24),
    Recipe("fifty steps", 0.2, 50, 0.05, 12),
)
NORMS: Mapping[str, Norm] = {"gaussian": "l2", "laplace": "l1", "lmo": "l1", "auto": "l2"}
"""DPArguments.noise -> DPArguments.clipping_norm_type; "auto" is tried as it comes."""


@dataclass(frozen=True)
class Setting:
    """One way to train; noise "none" is the stock Trainer, without privacy."""

    recipe: str
    epsilon: float | None
    noise: str


def settings(recipe: Recipe, epsilons: Sequence[float]) -> Iterator[Setting]:
    """All settings of a recipe, each as often as it is run, turn by turn."""
    yield Setting(recipe.name, None, "none")
    for _ in range(recipe.runs):
        for epsilon in epsilons:
            for noise in NORMS:
                yield Setting(recipe.name, epsilon, noise)


def counts(test: Any) -> dict[str, Tensor]:
    """Histograms: a snippet adds 1 to one bin, so it moves them by 1 in either norm."""
    everything = snippets()
    words = torch.tensor([min(len(one.text.split()) // 4, 15) for one in everything])
    verdicts = torch.tensor([one.label for one in everything])
    return {
        "right answers on 2,000 snippets": right_without_training(test).sum().float()[None],
        "snippets by verdict": verdicts.bincount(minlength=2).float(),
        "snippets by length": words.bincount(minlength=16).float(),
    }


def sized(noise: Family, epsilon: float, dimension: int) -> NoiseMechanism:
    """Noise for one release of counts."""
    return search_noise(
        target_epsilon=epsilon,
        target_delta=DELTA,
        step=lambda event: event,
        num_steps=1,
        norm="l1",
        dimension=dimension,
        accountant=accountant_named("pld"),
        families=(noise,),
    ).mechanism


def published(noise: NoiseMechanism, histogram: Tensor) -> Tensor:
    """The counts as they are released."""
    nobody = torch.empty(0)
    summed = ClippedSum({"counts": histogram.clone()}, norms=nobody, losses=nobody)
    return noise.release(summed, sensitivity=1.0, coins=SecretCoins()).grads["counts"]


def releases(
    histograms: Mapping[str, Tensor], repetitions: int, epsilons: Sequence[float] = EPSILONS
) -> Iterator[Row]:
    """By how much a published count is off, over many repetitions that a real run would pay for."""
    families: tuple[Family, ...] = ("gaussian", "laplace")
    for name, histogram in histograms.items():
        for epsilon in epsilons:
            for family in families:
                noise = sized(family, epsilon, len(histogram))
                errors = torch.stack(
                    [published(noise, histogram) - histogram for _ in range(repetitions)]
                ).abs()
                yield {
                    "counts": name,
                    "bins": len(histogram),
                    "total": int(histogram.sum()),
                    "epsilon": epsilon,
                    "noise": family,
                    "noise_multiplier": noise.noise_multiplier,
                    "repetitions": repetitions,
                    "mean_error": float(errors.mean()),
                    "mean_error_standard_error": float(errors.mean(1).std() / repetitions**0.5),
                    "mean_largest_error": float(errors.amax(1).mean()),
                }


def median_norm(public: Any, norm: Norm) -> float:
    """Of a public snippet's gradient, at the initial weights."""
    batch = default_data_collator(list(public))
    norms = clipped_sum(Gates(), batch, clipping_norm=1.0, clipping_norm_type=norm).norms
    return float(norms.median())


def trainer_for(
    setting: Setting, recipe: Recipe, parts: Material, clipping_norm: float, folder: str
) -> Trainer:
    """A trainer of four numbers."""
    batch = recipe.sampling_probability * len(parts.train)
    args = TrainingArguments(
        output_dir=folder,
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        per_device_train_batch_size=int(batch),
        per_device_eval_batch_size=2000,
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    given: dict[str, Any] = {
        "model": Gates(),
        "args": args,
        "train_dataset": parts.train,
        "eval_dataset": parts.test,
        "data_collator": default_data_collator,
        "compute_metrics": accuracy,
    }
    if setting.noise == "none":
        return Trainer(**given)
    private = DPArguments(
        target_epsilon=setting.epsilon,
        target_delta=DELTA,
        noise=setting.noise,
        clipping_norm=clipping_norm,
        clipping_norm_type=NORMS[setting.noise],
        expected_batch_size=batch,
        private_loss=False,  # it would be a fifth number to noise
    )
    return DPTrainer(dp_args=private, **given)


def run(setting: Setting, recipe: Recipe, parts: Material, clipping_norm: float) -> Row:
    """Train once; what came out."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(setting, recipe, parts, clipping_norm, folder)
        trainer.train()
        found = trainer.evaluate()
        row = {**asdict(setting), "accuracy": found["eval_accuracy"], "loss": found["eval_loss"]}
        if isinstance(trainer, DPTrainer):
            noise = trainer.plan.noise
            row["epsilon_spent"] = trainer.epsilon
            row["kind"] = type(noise).__name__
            row["noise_multiplier"] = noise.noise_multiplier
            row["clipping_norm"] = clipping_norm
    return {**row, "seconds": time.perf_counter() - start}


def measure(
    parts: Material, recipes: Sequence[Recipe] = RECIPES, epsilons: Sequence[float] = EPSILONS
) -> Iterator[Row]:
    """Every run of every setting."""
    clip = {norm: median_norm(parts.public, norm) for norm in set(NORMS.values())}
    for recipe in recipes:
        for setting in settings(recipe, epsilons):
            yield run(setting, recipe, parts, clip[NORMS.get(setting.noise, "l2")])


@dataclass(frozen=True)
class Summary:
    """The runs of one setting.

    Attributes:
        mean: Accuracy in percent.
        deviation: Of single runs, in points.
        gain: Over the Gaussian's mean, in points; 0 for the Gaussian itself.
        twice_standard_error: Of the gain: what chance alone would hardly exceed.
        loss: Mean, on the test snippets.
        noise: On the mean gradient, relative to the Gaussian's.
    """

    mean: float
    deviation: float
    gain: float
    twice_standard_error: float
    loss: float
    noise: float
    kind: str


def summaries(rows: Sequence[Row]) -> dict[Setting, Summary]:
    """Every private setting beside the Gaussian at the same guarantee."""
    found: dict[Setting, list[Row]] = defaultdict(list)
    for row in rows:
        found[Setting(row["recipe"], row["epsilon"], row["noise"])].append(row)
    return {
        setting: _summary(runs, found[Setting(setting.recipe, setting.epsilon, "gaussian")])
        for setting, runs in found.items()
        if setting.noise != "none"
    }


def _summary(runs: Sequence[Row], gaussian: Sequence[Row]) -> Summary:
    reached, beside = ([100 * row["accuracy"] for row in some] for some in (runs, gaussian))
    variance = sum(statistics.variance(some) / len(some) for some in (reached, beside))
    noise, least = (
        some[0]["noise_multiplier"] * some[0]["clipping_norm"] for some in (runs, gaussian)
    )
    return Summary(
        mean=statistics.mean(reached),
        deviation=statistics.stdev(reached),
        gain=statistics.mean(reached) - statistics.mean(beside),
        twice_standard_error=2 * variance**0.5,
        loss=statistics.mean(row["loss"] for row in runs),
        noise=noise / least,
        kind=runs[0]["kind"].removesuffix("Noise"),
    )


def training_table(rows: Sequence[Row]) -> str:
    """Accuracy, spread of the runs, and the difference to the Gaussian, as Markdown."""
    lines = [
        "| steps | epsilon | noise | standard deviation, of the Gaussian's | accuracy, % (spread of runs) | "
        "difference (2 standard errors) | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for one, found in summaries(rows).items():
        lines.append(
            f"| {one.recipe} | {one.epsilon:g} | {one.noise} ({found.kind}) | {found.noise:.2f} | "
            f"{found.mean:.1f} ({found.deviation:.1f}) | "
            f"{found.gain:+.1f} ({found.twice_standard_error:.1f}) | {found.loss:.3f} |"
        )
    return "\n".join(lines)


def release_table(rows: Sequence[Row]) -> str:
    """The mean error of a count, either noise, as Markdown."""
    found = {(row["counts"], row["bins"], row["epsilon"], row["noise"]): row for row in rows}
    lines = ["| counts | bins | epsilon | Gaussian | Laplace |", "|---|---|---|---|---|"]
    for name, bins, epsilon, noise in found:
        if noise == "gaussian":
            errors = [
                found[name, bins, epsilon, kind]["mean_error"] for kind in ("gaussian", "laplace")
            ]
            lines.append(f"| {name} | {bins} | {epsilon:g} | {errors[0]:.1f} | {errors[1]:.1f} |")
    return "\n".join(lines)


def one_row_a_line(report: Mapping[str, Any]) -> str:
    """JSON that is short, and in which a changed run shows as a changed line."""
    parts = []
    for name, value in report.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in value) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Release, train, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="few runs; keeps nothing")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    start = time.monotonic()
    parts = material(TRAIN_SNIPPETS)
    once = list(releases(counts(parts.test), 20 if check else REPETITIONS))
    print(release_table(once))
    rows = []
    short = [replace(recipe, runs=2) for recipe in RECIPES]
    for row in measure(parts, *((short, (0.1,)) if check else (RECIPES, EPSILONS))):
        rows.append(row)
        print(row, flush=True)
    print(training_table(rows))
    if not check:
        report = {
            "machine": machine(),
            "seconds": time.monotonic() - start,
            "delta": DELTA,
            "snippets": {name: len(getattr(parts, name)) for name in ("train", "public", "test")},
            "recipes": [asdict(recipe) for recipe in RECIPES],
            "releases": once,
            "rows": rows,
        }
        RESULTS.write_text(one_row_a_line(report), encoding="utf-8")


if __name__ == "__main__":
    main()
