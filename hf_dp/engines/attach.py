"""Taps at every point of a model, for one micro-batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from hf_dp.engines.coverage import Coverage
from hf_dp.engines.formula_tap import FormulaTap
from hf_dp.engines.tap import PointTap, Recording
from hf_dp.engines.whole_tap import WholeTap


@contextlib.contextmanager
def recording(coverage: Coverage, num_units: int) -> Iterator[Recording]:
    """Tap every point of `coverage`; hooks and ``requires_grad`` are put back on the way out."""
    parameters = coverage.parameters
    anchor = torch.zeros((), device=next(iter(parameters.values())).device, requires_grad=True)
    record = Recording(parameters, anchor, num_units)
    with contextlib.ExitStack() as stack:
        stack.callback(_enable, parameters.values())
        for point in coverage.points:
            kind: type[PointTap] = FormulaTap if point.rule is not None else WholeTap
            kind(record, point, coverage).attach(stack)
        yield record


def _enable(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)
