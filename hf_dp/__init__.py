"""Differentially private fine-tuning with the Hugging Face Trainer.

Names are resolved when first used, so that ``import hf_dp`` and the command line load neither torch
nor transformers before something needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from hf_dp._version import __version__

if TYPE_CHECKING:
    from hf_dp.ledger import Ledger
    from hf_dp.plan import PrivacyPlan
    from hf_dp.reports.report import PrivacyReport
    from hf_dp.training.arguments import DPArguments
    from hf_dp.training.clipped_sum import clipped_sum
    from hf_dp.training.mixin import DPTrainerMixin
    from hf_dp.training.trainer import DPSeq2SeqTrainer, DPTrainer

__all__ = [
    "DPArguments",
    "DPSeq2SeqTrainer",
    "DPTrainer",
    "DPTrainerMixin",
    "Ledger",
    "PrivacyPlan",
    "PrivacyReport",
    "__version__",
    "clipped_sum",
]

_HOME = {
    "DPArguments": "hf_dp.training.arguments",
    "DPSeq2SeqTrainer": "hf_dp.training.trainer",
    "DPTrainer": "hf_dp.training.trainer",
    "DPTrainerMixin": "hf_dp.training.mixin",
    "Ledger": "hf_dp.ledger",
    "PrivacyPlan": "hf_dp.plan",
    "PrivacyReport": "hf_dp.reports.report",
    "clipped_sum": "hf_dp.training.clipped_sum",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'hf_dp' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
