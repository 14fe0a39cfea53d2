"""Which rule answers for which architecture, and how far the clipped sum is from a loop over examples.

Run ``python -m benchmarks.architectures`` from the repository's root; it rewrites architectures.md.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine
from hf_dp.errors import UncoveredParameterError

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_suffix(".md")
FORMS = ("formula", "lookup", "experts", "vectorised", "one by one")

HEADER = """\
# Architectures

Written by `python -m benchmarks.architectures` with torch {torch} and transformers {transformers}, on
tiny configurations with random weights (`tests/engines/family_zoo.py`), {rows} examples of different
lengths, a clipping norm that half of the gradients exceed, the book-keeping engine.

* *Modules* is how many places of the model answer for the trained parameters, by rule: a formula of the
  layer; the lookup rule for tables with a changed forward; the rule for fused experts; the generic rule,
  all examples at once (`torch.func.vmap`) or one by one. A place that a pass did not use counts nowhere.
* *Error* is the L2 distance of the clipped sum from that of a plain loop over examples in float64 or
  float32, relative to its length. Gemma 2 and 3 compute in float32 inside whatever they are given.
* *Sequential* says that no rule covers the model, and that the engine takes one example at a time.

| family | model | trained | {forms} | error, float64 | error, float32 |
|---|---|---|{rules}---:|---:|
"""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    family: str
    model: str
    trained: str
    counts: Counter[str] | None
    errors: tuple[float, float]

    def __str__(self) -> str:
        """The line in Markdown."""
        counts = self.counts
        shown = (
            ["sequential"] + [""] * (len(FORMS) - 1)
            if counts is None
            else [str(counts[form] or "") for form in FORMS]
        )
        errors = [f"{error:.0e}" for error in self.errors]
        return "| " + " | ".join([self.family, self.model, self.trained, *shown, *errors]) + " |"


def rows() -> Iterator[Row]:
    """Every architecture in every form."""
    zoo, adapters = (importlib.import_module(name) for name in ("family_zoo", "adapter_zoo"))
    for family in zoo.FAMILIES:
        yield measured(family, "all", zoo.build)
        yield measured(family, "two thirds", lambda f, d: zoo.freeze_partly(zoo.build(f, d)))
        yield measured(family, "LoRA", adapters.adapted)
    for family in ("bert", "gpt2", "llama", "t5", "opt", "swin"):
        yield measured(family, "DoRA", lambda f, d: adapters.adapted(f, d, use_dora=True))


def measured(family: str, trained: str, make: Any) -> Row:
    """One architecture in one form, in both precisions."""
    wide, narrow = (_error(family, make, dtype) for dtype in (torch.float64, torch.float32))
    name = type(make(family, torch.float32)).__name__
    base = getattr(make(family, torch.float32), "get_base_model", None)
    name = name if base is None else type(base()).__name__
    return Row(family, name, trained, wide[1], (wide[0], narrow[0]))


def _error(family: str, make: Any, dtype: torch.dtype) -> tuple[float, Counter[str] | None]:
    tools, zoo = importlib.import_module("engine_zoo"), importlib.import_module("family_zoo")
    model, inputs = make(family, dtype), zoo.batch(family, dtype=dtype)
    clipping_norm = tools.half_clipped(tools.naive(model, inputs, 1.0).norms)
    expected = tools.naive(model, inputs, clipping_norm)
    engine = BookKeepingEngine()
    try:
        found = engine.clipped_sum(
            model, inputs, example_loss=tools.own_losses, clipping=FlatClipping(clipping_norm)
        )
    except UncoveredParameterError:
        return float("nan"), None
    gap = tools.length(tools.difference(found.grads, expected.grads))
    counts: Counter[str] = Counter()
    for point in engine.recorder.coverage(model).points:
        forms = ["formula"] if point.generic is None else sorted(point.generic.forms)
        counts.update(forms)
    return gap / tools.length(expected.grads), counts


def main() -> None:
    """Measure and write the table."""
    sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("engines", "training")]
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    zoo = importlib.import_module("family_zoo")
    header = HEADER.format(
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
        rows=zoo.ROWS,
        forms=" | ".join(FORMS),
        rules="---:|" * len(FORMS),
    )
    TABLE.write_text(header + "".join(f"{row}\n" for row in rows()), "utf-8")


if __name__ == "__main__":
    main()
