"""How an engine clips a model's gradients, parameter by parameter, and what that costs.

Found out by running it on made-up examples: which module answers for a parameter, by which rule, and in
which form its norm is taken at the given length. Costs are arithmetic: operations and bytes per example,
beside an ordinary backward pass of the same layer. Time depends on the machine as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_dp.clipping.flat import FlatClipping
from hf_dp.engines.base import ExampleLoss, GradientEngine, trainable_parameters
from hf_dp.engines.coverage import Coverage, TapPoint
from hf_dp.engines.flops import counted
from hf_dp.engines.given_losses import with_own_batches
from hf_dp.engines.rows import batch_size
from hf_dp.engines.undisturbed import undisturbed
from hf_dp.events import Norm
from hf_dp.layers.factors import Factor
from hf_dp.layers.routed import Routed

_SINGLE = 4  # bytes of a float32
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_BACKWARD = 1 / 3  # of a step: one more backward pass without weight gradients


@dataclass(frozen=True)
class EngineRow:
    """Parameters that are treated alike, those of repeated layers in one row.

    Attributes:
        parameters: Their name, with ``*`` for a layer's number.
        count: How many they are.
        shape: Of each.
        module: The class of the module that answers for them.
        rule: The formula; "generic" where the module is run again, "sequential" without a tap.
        form: How the norm is taken: "gram", "written out", "segmented" and sums of these.
        ordinary_flops: Of the layers' ordinary backward pass, per example; 0 where it is no product.
        extra_flops: What norm and clipped sum add, per example, or None where it is not known.
        extra_bytes: What is kept until the sum, per example.
    """

    parameters: str
    count: int
    shape: tuple[int, ...]
    module: str
    rule: str
    form: str
    ordinary_flops: float
    extra_flops: float | None
    extra_bytes: float

    @property
    def ratio(self) -> float | None:
        """Extra operations over those of the ordinary backward pass; None where it is no product."""
        if self.extra_flops is None or not self.ordinary_flops:
            return None
        return self.extra_flops / self.ordinary_flops


@dataclass(frozen=True)
class EngineReport:
    """The plan of an engine for one model at one length.

    Attributes:
        engine: The engine that was chosen.
        length: Positions of the made-up examples, or None where they have none.
        rows: Every trainable parameter, in the model's order.
        plain_flops: Of a step without privacy, forward and backward, per example.
        counted_flops: Of the engine's own step, per example, counted where some row's are not known.
        foreign: What of the model's code is not a known library's, so that every batch is proved.
    """

    engine: str
    length: int | None
    rows: tuple[EngineRow, ...]
    plain_flops: float
    counted_flops: float | None = None
    foreign: str = ""

    @property
    def overhead(self) -> float | None:
        """Operations over those of a plain step, predicted or counted; None where neither can be."""
        if not self.plain_flops:
            return None
        if any(row.extra_flops is None for row in self.rows):
            return None if self.counted_flops is None else self.counted_flops / self.plain_flops
        extra = sum(row.extra_flops or 0.0 for row in self.rows) / self.plain_flops
        return 1 + extra + _BACKWARD * ((self.engine == "two_pass") + bool(self.foreign))

    @property
    def extra_bytes(self) -> float:
        """What is kept until the sum, per example."""
        return sum(row.extra_bytes for row in self.rows)

    @property
    def summary(self) -> str:
        """A sentence or two."""
        if self.engine == "sequential":
            return "One example at a time: no more operations, but in batches of one."
        kept = f"{self.extra_bytes / 2**20:.3g} MiB per example are kept until the sum"
        if self.foreign:
            kept += f". Another backward pass proves every batch, because of {self.foreign}"
        if self.overhead is None:
            return f"Some rules run foreign code, whose operations are not known; {kept}."
        if self.counted_flops is not None:
            return f"Counted: {self.overhead:.3f} x the operations of a plain step; {kept}."
        return f"Predicted: {self.overhead:.3f} x the operations of a plain step; {kept}."

    def cells(self) -> list[tuple[str, ...]]:
        """The table as words, its head first."""
        head = ("parameters", "x", "shape", "module", "rule", "form", "cost", "kept")
        return [head, *(_words(row) for row in self.rows)]

    def to_json(self) -> dict[str, Any]:
        """Plain data; sizes per example."""
        return {
            "engine": self.engine,
            "length": self.length,
            "plain_flops": self.plain_flops,
            "counted_flops": self.counted_flops,
            "foreign": self.foreign,
            "overhead": self.overhead,
            "extra_bytes": self.extra_bytes,
            "rows": [{**asdict(row), "ratio": row.ratio} for row in self.rows],
        }

    def __str__(self) -> str:
        cells = self.cells()
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = [
            "  ".join(word.ljust(n) for word, n in zip(row, widths, strict=True)) for row in cells
        ]
        at = "" if self.length is None else f" at length {self.length}"
        return "\n".join([f"engine {self.engine}{at}", *map(str.rstrip, lines), self.summary])


def explain_engine(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    engine: GradientEngine,
    example_loss: ExampleLoss,
    length: int | None = None,
    norm: Norm = "l2",
) -> EngineReport:
    """Run `engine` on public examples and tell how it went about it.

    Args:
        model: Left as it was.
        inputs: Two made-up examples or more, as one batch without padding.
        engine: What it learns about the model stays with it.
        example_loss: One loss per example.
        length: Positions of the examples, for the report.
        norm: In which examples are clipped.

    Raises:
        UncoveredParameterError: The engine does not cover the model.
    """
    example_loss = with_own_batches(example_loss)
    with undisturbed(model):
        clipping = FlatClipping(1.0, norm)

        def summed_by(one: GradientEngine) -> None:
            one.clipped_sum(model, inputs, example_loss=example_loss, clipping=clipping)

        summed_by(engine)
        chosen: GradientEngine = getattr(engine, "chosen", None) or engine
        plain = _plain_flops(model, inputs, example_loss)
        recorder = getattr(chosen, "recorder", None)
        foreign = ""
        if recorder is None:
            rows = _sequential_rows(model)
        else:
            factors: dict[str, EngineRow] = {}
            coverage = recorder.coverage(model)
            foreign = coverage.foreign
            with recorder.forward(model, inputs, example_loss) as passed:
                passed.backward(
                    lambda name, factor: factors.update({name: _row(coverage, name, factor, norm)})
                )
            rows = [
                factors.get(name) or _unused(name, p) for name, p in coverage.parameters.items()
            ]
        own: float | None = None
        if recorder is not None and any(row.extra_flops is None for row in rows):
            # another engine: what a counted run learns (say that vmap fails) must not stay
            twin = type(chosen)(recorder.layer_rules)  # type: ignore[call-arg]
            summed_by(twin)
            total = counted(lambda: summed_by(twin))
            own = None if total is None else total / batch_size(inputs)
    return EngineReport(chosen.name, length, tuple(_grouped(rows)), plain, own, foreign)


def _plain_flops(model: nn.Module, inputs: Mapping[str, Any], example_loss: ExampleLoss) -> float:
    parameters = list(trainable_parameters(model).values())

    def forward_and_backward() -> None:
        loss = example_loss(model, inputs).sum()
        torch.autograd.grad(loss, parameters, allow_unused=True)

    flops = counted(forward_and_backward)
    if flops is None:
        with torch.no_grad():
            flops = 3 * (counted(lambda: example_loss(model, inputs)) or 0.0)
    return flops / batch_size(inputs)


# ---- one parameter -------------------------------------------------------------------------------


def _row(coverage: Coverage, name: str, factor: Factor, norm: Norm) -> EngineRow:
    parameter = coverage.parameters[name]
    points = [p for p in coverage.points if any(q is parameter for q in p.parameters)]
    form, ordinary, extra, kept = _cost(factor)
    if norm == "l1":
        numbers = parameter.numel()
        form, extra, kept = "written out", 4.0 * numbers, float(_SINGLE * numbers)
    return EngineRow(
        parameters=name,
        count=1,
        shape=tuple(parameter.shape),
        module=_joined(type(point.module).__qualname__ for point in points),
        rule=_joined(map(_rule, points)),
        form=form,
        ordinary_flops=ordinary,
        extra_flops=None if any(point.rule is None for point in points) else extra,
        extra_bytes=kept,
    )


def _rule(point: TapPoint) -> str:
    return "generic" if point.rule is None else getattr(point.rule, "__name__", str(point.rule))


def _joined(words: Iterable[str]) -> str:
    return " + ".join(dict.fromkeys(words))


def _cost(factor: Factor) -> tuple[str, float, float, float]:
    """Form, operations of the ordinary backward pass, what comes on top, bytes kept; per example."""
    parts = getattr(factor, "parts", None) or [getattr(factor, "inner", factor)]
    costs = [_cost_of_one(part) for part in parts]
    forms = _joined(cost[0] for cost in costs)
    ordinary, extra, kept = (sum(numbers) for numbers in zip(*(c[1:] for c in costs), strict=True))
    return forms, ordinary, extra, kept


def _cost_of_one(factor: Factor) -> tuple[str, float, float, float]:
    if hasattr(factor, "prefers_gram"):
        (_, positions, d), p = factor.left.shape, factor.right.shape[2]  # type: ignore[attr-defined]
        ordinary = 4.0 * positions * p * d
        if factor.prefers_gram:
            size = factor.left.element_size()  # type: ignore[attr-defined]
            triangle = positions * (positions + 1.0) * (p + d)
            return "gram", ordinary, triangle, size * positions * (p + d)
        return "written out", ordinary, 4.0 * p * d, _SINGLE * p * d
    rows = getattr(factor, "rows", None)
    if rows is not None:
        numbers = rows[0].numel()
        return "segmented", 0.0, 4.0 * numbers, _SINGLE * numbers
    values = getattr(factor, "values", None)
    if values is not None:
        numbers = values[0].numel()
        return "written out", 0.0, 4.0 * numbers, _SINGLE * numbers
    if isinstance(factor, Routed):
        kept = factor.left.element_size() * (factor.left.numel() + factor.right.numel())
        return "routed", 0.0, 0.0, kept / factor.num_units
    return type(factor).__name__.strip("_").lower(), 0.0, 0.0, 0.0


def _unused(name: str, parameter: nn.Parameter) -> EngineRow:
    return EngineRow(name, 1, tuple(parameter.shape), "-", "-", "not used", 0.0, 0.0, 0.0)


def _sequential_rows(model: nn.Module) -> list[EngineRow]:
    rows = []
    for name, p in trainable_parameters(model).items():
        owner = type(model.get_submodule(name.rpartition(".")[0])).__qualname__
        kept = _SINGLE * p.numel()
        rows.append(
            EngineRow(name, 1, tuple(p.shape), owner, "sequential", "written out", 0, 0, kept)
        )
    return rows


# ---- the table -----------------------------------------------------------------------------------


def _grouped(rows: Iterable[EngineRow]) -> list[EngineRow]:
    found: dict[Any, EngineRow] = {}
    for row in rows:
        named = replace(row, parameters=_NUMBER.sub("*", row.parameters))
        key = (named.parameters, named.shape, named.module, named.rule, named.form)
        same = found.get(key)
        if same is None:
            found[key] = named
        else:
            extras = (same.extra_flops, named.extra_flops)
            found[key] = replace(
                same,
                count=same.count + 1,
                ordinary_flops=same.ordinary_flops + named.ordinary_flops,
                extra_flops=None if None in extras else sum(e or 0.0 for e in extras),
                extra_bytes=same.extra_bytes + named.extra_bytes,
            )
    return list(found.values())


def _words(row: EngineRow) -> tuple[str, ...]:
    if row.extra_flops is None:
        cost = "unknown"
    elif row.ratio is None:
        cost = f"{_short(row.extra_flops)}FLOP"
    else:
        cost = f"+{row.ratio:.1%}"
    shape = " x ".join(map(str, row.shape)) or "()"
    kept = f"{_short(row.extra_bytes)}B"
    return (row.parameters, str(row.count), shape, row.module, row.rule, row.form, cost, kept)


def _short(number: float) -> str:
    power = 0 if number < 1000 else min(4, int(math.log10(number)) // 3)
    return f"{number / 1000**power:.3g} {['', 'k', 'M', 'G', 'T'][power]}"
