"""What the engines share that clip all units of a micro-batch at once, by rules for layers."""

from __future__ import annotations

import contextlib
import functools
import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_dp.clipping.base import ClippingPolicy
from hf_dp.clipping.loss import LossRelease
from hf_dp.engines.attribution import UnprovedError
from hf_dp.engines.base import (
    ExampleLoss,
    GradientEngine,
    empty_sum,
    refuse_without_gradients,
    trainable_parameters,
)
from hf_dp.engines.coverage import NotTappableError
from hf_dp.engines.given_losses import with_own_batches
from hf_dp.engines.lost import refuse_lost
from hf_dp.engines.owners import Owners, checked_owners
from hf_dp.engines.recorder import Recorder
from hf_dp.engines.rows import OneExample, batch_size
from hf_dp.engines.sequential import SequentialEngine
from hf_dp.engines.sharded import is_sharded
from hf_dp.engines.taken_out import without_dropped
from hf_dp.engines.written_out import cut, units_that_fit
from hf_dp.layers.base import LayerRules
from hf_dp.layers.recognise import DEFAULT_LAYER_RULES
from hf_dp.layers.repeats import UnrepeatedError
from hf_dp.sums import ClippedSum


class VectorisedEngine(GradientEngine):
    """Takes all units at once; one at a time where the pass shows that this would not be sound.

    Units that were dropped are taken out, and the others run again without them.
    """

    def __init__(self, layer_rules: LayerRules = DEFAULT_LAYER_RULES) -> None:
        """Use `layer_rules` (module type -> rule); what they lack is recognised by computation."""
        self.recorder = Recorder(layer_rules)

    def prepare(self, model: nn.Module) -> None:
        self.recorder.coverage(model)

    def clipped_sum(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        example_loss: ExampleLoss,
        clipping: ClippingPolicy,
        loss_release: LossRelease | None = None,
        owners: Owners | None = None,
    ) -> ClippedSum:
        refuse_without_gradients()
        checked_owners(owners, inputs)
        example_loss = with_own_batches(example_loss)
        self._check(model, inputs, owners)
        if batch_size(inputs) == 0:
            return empty_sum(model, loss_release)

        def summed_by(
            engine: GradientEngine, rows: Mapping[str, Any], owned: Owners | None
        ) -> ClippedSum:
            return engine.clipped_sum(
                model,
                rows,
                example_loss=example_loss,
                clipping=clipping,
                loss_release=loss_release,
                owners=owned,
            )

        if isinstance(inputs, OneExample):
            return summed_by(SequentialEngine(), inputs, owners)
        fit = self._fit(model, clipping)
        if (batch_size(inputs) if owners is None else owners.num_units) > fit:
            parts = (summed_by(self, *part) for part in cut(inputs, owners, fit))
            return functools.reduce(operator.add, parts)

        def at_once() -> ClippedSum:
            summed, dropped = self._clipped_sum(
                model, inputs, example_loss, clipping, loss_release, owners
            )
            longest = functools.partial(_longest, summed.norms, owners)
            refuse_lost(model, inputs, self.recorder.last_coverage(model), example_loss, longest)
            again = functools.partial(summed_by, self)
            return without_dropped(summed, inputs, owners, again) if dropped else summed

        with contextlib.suppress(UnprovedError, UnrepeatedError):
            # the other ranks of a sharded model do not run it again
            with contextlib.suppress(*() if is_sharded(model) else (NotTappableError,)):
                return at_once()
            self.recorder.look_again(model, inputs, example_loss)
            return at_once()
        return summed_by(SequentialEngine(), inputs, owners)

    def _fit(self, model: nn.Module, clipping: ClippingPolicy) -> int:
        """How many units are clipped together at most."""
        if clipping.norm == "l2" or is_sharded(model):
            return 2**62
        trained = list(trainable_parameters(model).values())
        return units_that_fit(self._written_at_once([p.numel() for p in trained]), trained[0])

    @abstractmethod
    def _written_at_once(self, sizes: Sequence[int]) -> int:
        """Numbers written out together for each unit, where parameters have these `sizes`."""

    @abstractmethod
    def _check(self, model: nn.Module, inputs: Mapping[str, Any], owners: Owners | None) -> None:
        """Refuse models and micro-batches that the engine cannot take."""

    @abstractmethod
    def _clipped_sum(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        example_loss: ExampleLoss,
        clipping: ClippingPolicy,
        loss_release: LossRelease | None,
        owners: Owners | None,
    ) -> tuple[ClippedSum, bool]:
        """The sum over at least one unit, and whether to run the others without units that were dropped.

        Raises:
            NotTappableError: The examples are not where those of the first micro-batch were.
            UnprovedError: It is not known which rows are whose.
            UnrepeatedError: A module did not do the same again.
        """


def _longest(norms: Tensor, owners: Owners | None) -> list[int]:
    """Two rows: the first of each of the two units with the longest gradients."""
    units = norms.nan_to_num(0, 0, 0).argsort(descending=True)[:2].tolist()
    return units if owners is None else [sum(owners.sizes[:unit]) for unit in units]
