"""How long does a whole step of DPTrainer take per example, next to the stock Trainer's?

The demo's sentences and its encoder, each trainer with its defaults: the stock one shuffles, DPTrainer draws
by Poisson sampling and orders each draw by length. Both train the same number of examples a step on
average, turn by turn in one process with one thread; loading, optimizer, ledger and noise are part of a
step, the first step of each turn (preflight, warming up) is not. Medians of the turns are reported.

    python -m benchmarks.trainer_step            # about 10 minutes; keeps the result
    python -m benchmarks.trainer_step --check    # under a minute, a tiny encoder; keeps nothing
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks import step_time
from hf_dp import DPArguments, DPTrainer
from hf_dp.demo.model import load_classifier, with_lora
from hf_dp.engines.rows import batch_size
from hf_dp.noise import GaussianNoise
from hf_dp.training import mixin
from hf_dp.training.batches import LogicalBatchCollator
from hf_dp.training.spending import Spending

RESULTS = Path(__file__).parent / "results" / "trainer_step.json"
MICRO_BATCH, ACCUMULATION = 32, 4
Row = dict[str, Any]


class Clock(TrainerCallback):  # type: ignore[misc]
    """When each step ended, by the wall and by the processor, and how many examples it had."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.ends: list[tuple[float, float]] = []
        self.examples: list[int] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        """Note the time, once the device has finished."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), time.process_time()))

    def per_example(self) -> tuple[float, float]:
        """Wall and processor seconds per example after the first step; then forget."""
        count = sum(self.examples[1:])
        first, last = self.ends[0], self.ends[-1]
        self.ends, self.examples = [], []
        return (last[0] - first[0]) / count, (last[1] - first[1]) / count


class Private(DPTrainer):
    """DPTrainer that tells its clock how many were drawn."""

    clock: Clock

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Count, then step."""
        self.clock.examples.append(sum(batch_size(one) for one in inputs.micro_batches))
        return super().training_step(model, inputs, num_items_in_batch)


@contextmanager
def parts_of_a_step(spent: Counter[str]) -> Iterator[None]:
    """Add up the wall seconds of what a private step consists of, less what torch does elsewhere."""
    places: list[tuple[Any, str, str]] = [
        (mixin, "clipped_sum_of", "clipped sum"),
        (Spending, "record", "ledger"),
        (GaussianNoise, "release", "noise"),
        (mixin, "set_gradients", "average"),
        (LogicalBatchCollator, "__call__", "collator"),
        (torch.optim.AdamW, "step", "optimizer"),
    ]
    before = [(place, name, getattr(place, name)) for place, name, _ in places]

    def timed(real: Callable[..., Any], what: str) -> Callable[..., Any]:
        def run(*args: Any, **parts: Any) -> Any:
            start = time.perf_counter()
            try:
                return real(*args, **parts)
            finally:
                spent[what] += time.perf_counter() - start  # type: ignore[assignment]

        return run

    for place, name, what in places:
        setattr(place, name, timed(getattr(place, name), what))
    try:
        yield
    finally:
        for place, name, real in before:
            setattr(place, name, real)


def host_arguments(folder: str, steps: int) -> TrainingArguments:
    """What both trainers share."""
    return TrainingArguments(
        folder,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=steps,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
    )


def trainers(
    make: Callable[[], nn.Module], data: Dataset, collator: Any, folder: Path, steps: int
) -> dict[str, tuple[Trainer, Clock]]:
    """The stock trainer, DPTrainer, and DPTrainer with as many tokens as the longest batch."""
    found: dict[str, tuple[Trainer, Clock]] = {}
    longest = max(len(ids) for ids in data["input_ids"])
    wanted: dict[str, DPArguments | None] = {
        "Trainer": None,
        "DPTrainer": DPArguments(noise_multiplier=1.0),
        "DPTrainer, token budget": DPArguments(
            noise_multiplier=1.0, max_tokens_per_micro_batch=MICRO_BATCH * longest // 2
        ),
    }
    for name, dp_args in wanted.items():
        clock = Clock()
        common: dict[str, Any] = {
            "model": make(),
            "args": host_arguments(str(folder / name), steps),
            "train_dataset": data,
            "data_collator": collator,
            "callbacks": [clock],
        }
        if dp_args is None:
            found[name] = Trainer(**common), clock
        else:
            private = Private(dp_args=dp_args, **common)
            private.clock = clock
            found[name] = private, clock
    return found


def measure(
    case: str,
    make: Callable[[], nn.Module],
    data: Dataset,
    collator: Any,
    *,
    rounds: int,
    steps: int,
) -> list[Row]:
    """A row for each trainer; ratios are taken turn by turn."""
    times: dict[str, list[tuple[float, float]]] = {}
    spent: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        all_trainers = trainers(make, data, collator, Path(folder), steps)
        for turn in range(rounds + 1):  # the first warms up
            for name, (trainer, clock) in all_trainers.items():
                parts = spent if turn and name == "DPTrainer" else Counter[str]()
                with parts_of_a_step(parts):
                    trainer.train()
                if not isinstance(trainer, DPTrainer):
                    clock.examples = [MICRO_BATCH * ACCUMULATION] * len(clock.ends)
                seconds = clock.per_example()
                if turn:
                    times.setdefault(name, []).append(seconds)
    rows: list[Row] = []
    for name, taken in times.items():
        pairs = list(zip(taken, times["Trainer"], strict=True))
        wall, cpu = ([mine[i] / stock[i] for mine, stock in pairs] for i in (0, 1))
        rows.append(
            {
                "case": case,
                "trainer": name,
                "wall_ms_per_example": 1e3 * statistics.median(each[0] for each in taken),
                "cpu_ms_per_example": 1e3 * statistics.median(each[1] for each in taken),
                "wall": statistics.median(wall),
                "wall_low": min(wall),
                "wall_high": max(wall),
                "cpu": statistics.median(cpu),
            }
        )
    total = sum(spent.values())
    rows.append(
        {"case": case, "share_of_a_private_step": {k: v / total for k, v in spent.most_common()}}
    )
    return rows


def demo_cases() -> tuple[dict[str, Callable[[], nn.Module]], Dataset, Any]:
    """The demo's encoder, all of it and by LoRA, on the demo's sentences."""
    from hf_dp.demo.assets import encoder_folder
    from hf_dp.demo.run import prepare

    material = prepare()
    encoder = encoder_folder()
    return (
        {
            "LoRA r=8, two layers": lambda: with_lora(load_classifier(encoder)),
            "full": lambda: load_classifier(encoder),
        },
        material.train,
        DataCollatorWithPadding(material.tokenizer),
    )


def tiny_cases() -> tuple[dict[str, Callable[[], nn.Module]], Dataset, Any]:
    """A tiny encoder on made-up sentences."""
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    lengths = [5 + (7 * i) % 30 for i in range(400)]
    data = Dataset.from_dict(
        {
            "input_ids": [[1 + (i + j) % 99 for j in range(n)] for i, n in enumerate(lengths)],
            "attention_mask": [[1] * n for n in lengths],
            "labels": [i % 2 for i in range(400)],
        }
    )

    def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        padded = {
            name: torch.tensor([row[name] + [0] * (width - len(row[name])) for row in rows])
            for name in ("input_ids", "attention_mask")
        }
        return padded | {"labels": torch.tensor([row["labels"] for row in rows])}

    return {"tiny": lambda: BertForSequenceClassification(config)}, data, collate


def machine() -> Row:
    """What the figures were taken on, accelerator included."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**step_time.machine(), "device": device}


def main() -> None:
    """Run, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="in a turn; the first is not counted")
    parser.add_argument("--only", default="", help="cases whose name contains this; keeps nothing")
    parser.add_argument("--check", action="store_true", help="a tiny encoder; keeps nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    cases, data, collator = tiny_cases() if options.check else demo_cases()
    rows: list[Row] = []
    for case, make in cases.items():
        if options.only in case:
            rows += measure(case, make, data, collator, rounds=options.rounds, steps=options.steps)
    for row in rows:
        if "trainer" in row:
            print(
                f"{row['case']:24} {row['trainer']:24} {row['wall_ms_per_example']:8.3f} ms wall  "
                f"{row['wall']:.2f} ({row['wall_low']:.2f} to {row['wall_high']:.2f})  cpu {row['cpu']:.2f}"
            )
        else:
            shares = ", ".join(f"{k} {v:.1%}" for k, v in row["share_of_a_private_step"].items())
            print(f"{row['case']:24} {shares}")
    if not (options.check or options.only):
        RESULTS.parent.mkdir(exist_ok=True)
        found = {
            "machine": machine(),
            "examples_per_step": MICRO_BATCH * ACCUMULATION,
            "rounds": options.rounds,
            "rows": rows,
        }
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
