"""Gradient engines: from a micro-batch to its clipped sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hf_dp._validate import one_of
from hf_dp.engines.automatic import AutomaticEngine
from hf_dp.engines.base import ExampleLoss, GradientEngine
from hf_dp.engines.book_keeping import BookKeepingEngine
from hf_dp.engines.rows import OneExample
from hf_dp.engines.sequential import SequentialEngine
from hf_dp.engines.two_pass import TwoPassEngine
from hf_dp.layers.base import LayerRules
from hf_dp.layers.recognise import DEFAULT_LAYER_RULES

ENGINES: Mapping[str, Callable[[LayerRules], GradientEngine]] = {
    "auto": AutomaticEngine,
    "book_keeping": BookKeepingEngine,
    "two_pass": TwoPassEngine,
    "sequential": lambda _: SequentialEngine(),
}


def engine_named(name: str, layer_rules: LayerRules = DEFAULT_LAYER_RULES) -> GradientEngine:
    """The engine of that name; the sequential one needs no rules."""
    one_of("engine", name, ENGINES, "It decides how gradients are clipped per example.")
    return ENGINES[name](layer_rules)


__all__ = [
    "ENGINES",
    "AutomaticEngine",
    "BookKeepingEngine",
    "ExampleLoss",
    "GradientEngine",
    "OneExample",
    "SequentialEngine",
    "TwoPassEngine",
    "engine_named",
]
