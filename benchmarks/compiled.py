"""What would a compiled step be worth? The whole clipped sum as one graph, against the eager engine.

The engine's own step (forward, backward, norms, weights, sums) is traced at fixed shapes and compiled by
inductor, and so is plain training's. The graph cannot branch on numbers: it returns whether some example
needs what only the eager engine does (not finite, or positions that cancel), and leaves in the padded
positions that the eager engine drops. Dropout is off: inductor draws other masks unless told not to.
Decoders are left out: transformers looks for packed sequences by value, which no such trace can follow.

    python -m benchmarks.compiled    # about three minutes, most of it compiling; keeps the result
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.cases import Case, example_losses, library_losses
from benchmarks.step_time import RESULTS, Row, interleaved, machine
from benchmarks.variants import CLIPPING_NORM, Grads, Variant, distance
from hf_dp.clipping import FlatClipping
from hf_dp.engines import BookKeepingEngine
from hf_dp.engines.books import Books
from hf_dp.engines.precision import full_precision
from hf_dp.engines.shares import cancelling
from hf_dp.layers.factors import Mat

CASES = (
    (Case("bert", 64, 16, 2, layers=12), 15),
    (Case("bert", 512, 128, 8), 7),
)
Inputs = Mapping[str, Tensor]
Traceable = Callable[[Inputs], Any]


class Steps:
    """Plain training's step and ours on one model and batch, each eager and traceable."""

    def __init__(self, case: Case) -> None:
        """Make the model, and let the engine look it over."""
        self.model = case.model()
        self.inputs = case.batch()
        self.losses = library_losses(self.inputs)
        self.parameters = dict(self.model.named_parameters())
        self.engine = BookKeepingEngine()
        self.clipping = FlatClipping(CLIPPING_NORM)
        self.eager()

    def plain(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Gradients of the summed loss."""
        losses = example_losses(self.model, inputs)
        return torch.autograd.grad(losses.sum(), list(self.parameters.values()))

    def eager(self) -> Grads:
        """The engine as it is offered."""
        summed = self.engine.clipped_sum(
            self.model, self.inputs, example_loss=self.losses, clipping=self.clipping
        )
        return dict(summed.grads)

    def clipped(self, inputs: Inputs) -> tuple[dict[str, Tensor], Tensor]:
        """The engine's step without a branch: the sums, and whether they must be taken eagerly."""
        books = Books()
        with (
            patch.object(Mat, "trimmed", lambda self: False),
            self.engine.recorder.forward(self.model, inputs, self.losses) as passed,
        ):
            passed.backward(books.add, on_group=books.add_group)
            with full_precision(passed.losses.device):
                norms = books.norms(passed.losses)
                total = norms.total()
                apart = cancelling(total, norms.uncancelled, self.clipping.sensitivity)
                branch = (apart | ~torch.isfinite(total)).any()
                shapes = {name: p.shape for name, p in passed.parameters.items()}
                sums = books.sums(self.clipping.weights(norms.squared), shapes, None)
        return {name: sums[name] for name in self.parameters}, branch


def compiled(step: Traceable, inputs: Inputs) -> tuple[Callable[[], Any], Row]:
    """`step` at the shapes of `inputs`, and what compiling it took."""
    begun = time.process_time()
    wall = time.perf_counter()
    traced = make_fx(lambda batch: step(batch))(inputs)  # it counts a method's arguments wrongly
    with torch.no_grad():
        inductor: Any = torch._inductor
        run = inductor.compile(traced, [inputs])
        run(inputs)

    def again() -> Any:
        with torch.no_grad():
            return run(inputs)

    spent = {
        "cpu_seconds": time.process_time() - begun,
        "wall_seconds": time.perf_counter() - wall,
        "nodes": len(traced.graph.nodes),
    }
    return again, spent


def measure(case: Case, rounds: int) -> Row:
    """Milliseconds of the four steps, how far the compiled sum is from the eager one, and the payback."""
    steps = Steps(case)
    plain_run, plain_spent = compiled(steps.plain, steps.inputs)
    our_run, our_spent = compiled(steps.clipped, steps.inputs)
    with torch.no_grad():  # the graph must read the model's parameters, not a copy
        for parameter in steps.parameters.values():
            parameter.mul_(1.01)
    found, branch = our_run()
    variants = [
        Variant("ours", steps.eager),
        Variant("plain compiled", plain_run),
        Variant("ours compiled", our_run),
    ]
    base_times, times = interleaved(
        Variant("plain", lambda: steps.plain(steps.inputs)), variants, rounds
    )
    names = ["plain", *(variant.name for variant in variants)]
    milliseconds = {
        name: 1e3 * statistics.median(taken)
        for name, taken in zip(names, [base_times, *times], strict=True)
    }
    gain = milliseconds["ours"] - milliseconds["ours compiled"]
    return {
        "case": f"{case.name}, {case.layers} layers",
        "milliseconds": milliseconds,
        "faster_than_eager": milliseconds["ours"] / milliseconds["ours compiled"],
        "over_plain_compiled": milliseconds["ours compiled"] / milliseconds["plain compiled"],
        "compiling_plain": plain_spent,
        "compiling_ours": our_spent,
        "steps_to_pay_back": 1e3 * our_spent["cpu_seconds"] / gain if gain > 0 else None,
        "distance": distance(found, steps.eager()),
        "needs_the_eager_engine": bool(branch),
    }


def main() -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    rows = []
    for case, rounds in CASES:
        rows.append(measure(case, rounds))
        print(json.dumps(rows[-1], indent=1), flush=True)
        text = json.dumps({"machine": machine(), "rows": rows}, indent=1)
        (RESULTS / "compiled.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
