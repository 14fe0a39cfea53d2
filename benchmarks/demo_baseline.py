"""What does the demo's model reach without privacy, on the demo's own data?

The same classifier, LoRA and split, an ordinary Trainer, several seeds. Prints one Markdown table and
appends one JSON line to ``results/demo_baseline.jsonl``.

    python benchmarks/demo_baseline.py            # about 2 minutes a seed on two cores
    python benchmarks/demo_baseline.py --check    # seconds; writes nothing
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import Trainer, TrainingArguments, set_seed

from hf_dp.demo.metric import accuracy
from hf_dp.demo.run import Material, bfloat16_is_faster, prepare

RESULTS = Path(__file__).parent / "results" / "demo_baseline.jsonl"
BATCH_SIZE, EPOCHS, LEARNING_RATE = 64, 2, 1e-3


def one_run(material: Material, seed: int, folder: str) -> float:
    """The accuracy on the test part after ordinary training."""
    trainer = Trainer(
        model=material.model,
        args=TrainingArguments(
            output_dir=folder,
            seed=seed,
            num_train_epochs=EPOCHS,
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=128,
            train_sampling_strategy="group_by_length",
            bf16=bfloat16_is_faster(),
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.accelerator.is_available(),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=material.train,
        eval_dataset=material.test,
        processing_class=material.tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    return float(trainer.evaluate()["eval_accuracy"])


def main() -> None:
    """Run all seeds, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="a few examples, one seed, no record")
    options = parser.parse_args()
    seeds, limit = (1, 64) if options.check else (options.seeds, None)
    reached, seconds, majority = [], [], 0.0
    for seed in range(seeds):
        set_seed(seed)
        material = prepare(limit)
        majority = material.majority_share
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            reached.append(one_run(material, seed, folder))
        seconds.append(time.perf_counter() - start)
    print("| without privacy | accuracy |\n|---|---|")
    print(f"| always the more frequent label | {majority:.1%} |")
    print(
        f"| {EPOCHS} epochs, batch {BATCH_SIZE}, {seeds} seeds | {statistics.mean(reached):.1%} |"
    )
    if not options.check:
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "epochs": EPOCHS,
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "majority_share": majority,
            "accuracy": reached,
            "seconds": [round(value) for value in seconds],
        }
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
