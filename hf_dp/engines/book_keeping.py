"""One backward pass: taps record, rules turn records into factors, factors give norms and sums.

Source:
    Bu et al. (2023), arXiv:2210.00038 (book-keeping).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from hf_dp.clipping.base import ClippingPolicy
from hf_dp.clipping.loss import LossRelease
from hf_dp.engines.base import (
    ExampleLoss,
    gradient_clipping,
    released_losses,
    sums_of_all,
)
from hf_dp.engines.books import Books
from hf_dp.engines.owners import Owners
from hf_dp.engines.precision import full_precision
from hf_dp.engines.rows import batch_size
from hf_dp.engines.sharded import refuse_sharded
from hf_dp.engines.shares import Shares, cancelling
from hf_dp.engines.vectorised import VectorisedEngine
from hf_dp.engines.written_out import summed_written_out
from hf_dp.sums import ClippedSum


class BookKeepingEngine(VectorisedEngine):
    """Vectorised per-example clipping in one backward pass, for layers that have a rule."""

    name: ClassVar[str] = "book_keeping"

    def _written_at_once(self, sizes: Sequence[int]) -> int:
        return sum(sizes)

    def _check(self, model: nn.Module, inputs: Mapping[str, Any], owners: Owners | None) -> None:
        if batch_size(inputs):
            why = "It answers for layers whose parameters have gone back into shards."
            refuse_sharded(model, self.name, why)

    def _clipped_sum(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        example_loss: ExampleLoss,
        clipping: ClippingPolicy,
        loss_release: LossRelease | None,
        owners: Owners | None,
    ) -> tuple[ClippedSum, bool]:
        if clipping.norm == "l1":
            return summed_written_out(
                self.recorder,
                model,
                inputs,
                example_loss=example_loss,
                clipping=clipping,
                loss_release=loss_release,
                owners=owners,
            )
        books = Books()
        with self.recorder.forward(model, inputs, example_loss, owners) as passed:
            passed.backward(books.add, on_group=books.add_group)
        losses = passed.losses
        policy = gradient_clipping(clipping, loss_release)
        with full_precision(losses.device):
            norms = books.norms(losses)
            total = norms.total()
            dropped = ~torch.isfinite(total)
            apart = cancelling(total, norms.uncancelled, policy.sensitivity)
            shares = None
            if bool((apart | dropped).any()):  # the one place where an accelerator is waited for
                units = apart.nonzero()  # (few, 1)
                books.take_apart(norms, units)
                total = norms.total()
                dropped = ~torch.isfinite(total)
                shares = Shares(dropped, units)
            parameters = passed.parameters
            shapes = {name: parameter.shape for name, parameter in parameters.items()}
            found = books.sums(policy.weights(norms.squared), shapes, shares)
            grads = sums_of_all(parameters, found)
        summed = ClippedSum(
            grads=grads,
            norms=total.sqrt(),
            losses=losses,
            loss_sum=released_losses(losses, dropped, clipping, loss_release),
        )
        return summed, shares is not None and bool(dropped.any())
