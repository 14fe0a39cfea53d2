"""What a model was privately trained on before: remembered on its modules, or found beside its weights.

A second run on the same people's data adds to what the first one cost. Whether the data is the same nobody
but its owner knows, so an earlier run is not refused but said: in a warning, the ledger and the report.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hf_dp.errors import HfDpError
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.reports.of_earlier_runs import TRAINED_BEFORE, in_words
from hf_dp.reports.report import PrivacyReport
from hf_dp.training.spending import Spending

logger = logging.getLogger(__name__)

_MARK = "_hf_dp_runs"  # on modules, not in their state: run id -> what is known of it

Runs = dict[str, Mapping[str, Any]]


def remember(model: nn.Module, spending: Spending) -> None:
    """Mark the modules that a run has trained, and those around them, if it released anything.

    A copy of the model has the marks too; its saved weights have not.
    """
    if spending.ledger.num_releases == 0:
        return
    header = spending.ledger.header
    claim, run = spending.claim, spending.ledger.run_id
    known = {**_listed(header), run: _run(run, spending.epsilon, claim.delta, claim.plan.unit)}
    for module in model.modules():
        if any(p.requires_grad for p in module.parameters()):
            vars(module)[_MARK] = {**vars(module).get(_MARK, {}), **known}


def earlier_runs(model: nn.Module) -> Runs:
    """Runs that trained this model, or a part of it, as far as it shows.

    They show on modules that this process trained, and in the ledgers of local folders that the model or a
    part of it was loaded from (``config._name_or_path``); not on weights that were read in another way.
    """
    found: Runs = {}
    for module in model.modules():
        found |= vars(module).get(_MARK, {})
    for ledger in sorted(set(_ledgers(model))):
        found |= _written_in(ledger)
    return found


def for_header(runs: Runs) -> dict[str, Any]:
    """What a new ledger's first line says of earlier runs: nothing where there are none."""
    return {TRAINED_BEFORE: list(runs.values())} if runs else {}


def announce_earlier(runs: Runs, spending: Spending) -> None:
    """Warn of runs that are not counted in this one's ledger."""
    others = [run for name, run in runs.items() if name != spending.ledger.run_id]
    if others:
        logger.warning("hf_dp: %s", in_words(others))


def _ledgers(model: nn.Module) -> Iterator[Path]:
    for module in model.modules():
        folder = getattr(getattr(module, "config", None), "_name_or_path", None)
        if isinstance(folder, str) and folder and (ledger := Path(folder) / LEDGER_NAME).is_file():
            yield ledger


def _written_in(ledger: Path) -> Runs:
    try:
        record = read_ledger(ledger)
        if record.num_releases == 0:
            return {}
        guarantee = PrivacyReport.from_ledger(ledger).guarantee
    except (HfDpError, OSError):
        return {str(ledger.parent.name): _run("of an unreadable ledger", None, None, "example")}
    own = _run(record.run_id, guarantee.epsilon, guarantee.delta, guarantee.unit)
    return {**_listed(record.header), record.run_id: own}


def _listed(header: Mapping[str, Any]) -> Runs:
    return {str(run["run_id"]): run for run in header.get(TRAINED_BEFORE, ())}


def _run(name: str, epsilon: float | None, delta: float | None, unit: str) -> Mapping[str, Any]:
    shown = epsilon if epsilon is not None and math.isfinite(epsilon) else None
    return {"run_id": name, "epsilon": shown, "delta": delta, "unit": unit}
