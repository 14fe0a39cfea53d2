"""The Trainers that people swap in."""

from __future__ import annotations

from transformers import Seq2SeqTrainer, Trainer

from hf_dp.training.mixin import DPTrainerMixin


class DPTrainer(DPTrainerMixin, Trainer):
    """`transformers.Trainer` with differential privacy. See `DPTrainerMixin` for its arguments."""


class DPSeq2SeqTrainer(DPTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with differential privacy. See `DPTrainerMixin`."""
