"""The loss of an example in a run of the Trainer: chosen once, before any batch is drawn."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_dp.coins import Coins
from hf_dp.engines import ExampleLoss, GradientEngine, SequentialEngine
from hf_dp.engines.explain import EngineReport
from hf_dp.events import Norm
from hf_dp.plan import PrivacyPlan
from hf_dp.training.arguments import DPArguments
from hf_dp.training.batches import without_column
from hf_dp.training.choice import Choice, announce, choose
from hf_dp.training.chosen_noise import norm_of
from hf_dp.training.explaining import explain_training
from hf_dp.training.joining import Collator, Fills, as_one_example, fills_of, is_blank
from hf_dp.training.lines import Lines
from hf_dp.training.lost_weights import refuse_lost_weights
from hf_dp.training.memoryless import refuse_memory
from hf_dp.training.missing import refuse_missing_labels, refuse_unread_columns
from hf_dp.training.ownership import Ownership
from hf_dp.training.packing import apart
from hf_dp.training.reading import refuse_own_draws, some_places
from hf_dp.training.remembered import nothing_kept

if TYPE_CHECKING:
    from transformers import Trainer as _Host
else:
    _Host = object

_TRUSTED_HOSTS = frozenset(
    {"transformers", "trl"}
)  # whose compute_loss is what their models compute
_GATHERED = "_metrics"  # where TRL's compute_loss puts figures for the next lines of the log


class SettledMixin(_Host):
    """The part of `DPTrainerMixin` that knows the loss of an example, and how it is clipped."""

    coins: Coins
    engine: GradientEngine
    _set_aside: GradientEngine | None  # the engine that was asked for, where another is needed
    _choice: Choice | None
    _fills: Fills
    _given_loss: ExampleLoss | None
    _ownership: Ownership
    dp_args: DPArguments
    _given_plan: PrivacyPlan | None
    _lines: Lines

    @property
    def _clipping_norm_type(self) -> Norm:
        if self._given_plan is not None:
            return self._given_plan.clipping.norm
        return norm_of(self.dp_args)

    def _settle_loss(self, host: DataLoader[Any]) -> Choice:
        """Choose the loss of each example before any batch is drawn, on made-up examples.

        Anew for each run: model, data, collator and loss may be others than in the last.
        """
        own = self._computes_loss_as_library
        gathered = copy.deepcopy(vars(self).get(_GATHERED))
        with (
            self._lines.silent(),
            self.coins.for_library_code(),
            self.compute_loss_context_manager(),
        ):
            refuse_missing_labels(
                host.dataset, host.collate_fn, self.label_names, self._ownership.column
            )
            if self.dp_args.preflight:
                refuse_own_draws(host.dataset, len(self.train_dataset))
            items = self._some_items(host)
            refuse_memory(host.collate_fn, items)
            self._fills = fills_of(host.collate_fn, items[0])
            padding = self._fills.get(self._main_input)
            columns = self._columns_of(items[0], host.collate_fn)
            if own and self._given_loss is None:
                refuse_unread_columns(self.model, columns)
            self._choice = choose(
                self.model,
                columns,
                self._compute_loss_of,
                given=self._given_loss,
                trusted=own and self.compute_loss_func is None,
                label_smoothing=self.args.label_smoothing_factor,
                padding_id=None if padding is None else int(padding),
            )
            if self._choice.is_definition and self.dp_args.preflight:
                refuse_lost_weights(self.model, self._choice.rows, self._compute_loss_of)
        if gathered is not None:  # without figures of made-up examples
            self.__dict__[_GATHERED] = gathered
        announce(self._choice, self.model)
        if self._choice.is_definition and self._set_aside is None:
            self._set_aside, self.engine = self.engine, SequentialEngine()
        elif not self._choice.is_definition and self._set_aside is not None:
            self.engine, self._set_aside = self._set_aside, None
        return self._choice

    @property
    def _computes_loss_as_library(self) -> bool:
        """Whether `compute_loss` is the host's, by where its code is: a decorator may give it any name."""
        function = getattr(self.compute_loss, "__func__", self.compute_loss)
        packages = set()
        while isinstance(function, FunctionType):
            packages.add(str(function.__globals__.get("__name__")).partition(".")[0])
            function = getattr(function, "__wrapped__", None)
        return bool(packages) and packages <= _TRUSTED_HOSTS

    def _compute_loss_of(self, model: nn.Module, alone: dict[str, Any]) -> Any:
        return self.compute_loss(model, alone)

    @contextlib.contextmanager
    def _while_losses_are_computed(self) -> Iterator[None]:
        """Nothing is logged, draws are secret, and what a trainer keeps of it is told."""
        with self._lines.silent(), self.coins.for_library_code(), nothing_kept(self):
            yield

    def explain_engine(self, length: int = 128) -> EngineReport:
        """Which rule clips which parameter, in which form, at what cost.

        Args:
            length: Positions of the made-up examples on which it is found out.
        """
        host = super().get_train_dataloader()
        self._settle_loss(host)
        with self._lines.silent(), self.coins.for_library_code():
            columns = self._columns_of(self._some_items(host)[0], host.collate_fn)
            return explain_training(
                self.model,
                columns,
                engine=self.engine,
                example_loss=self._loss_of_each,
                length=length,
                norm=self._clipping_norm_type,
            )

    @property
    def _loss_of_each(self) -> ExampleLoss:
        """The chosen loss, packed so that engines see whose code it is."""
        assert self._choice is not None
        return functools.partial(
            _of_each, self.compute_loss_context_manager, self._choice.example_loss
        )

    @property
    def _main_input(self) -> str:
        """The column that the model reads first."""
        return getattr(self.model, "main_input_name", "input_ids")

    def _columns_of(self, item: Any, collate: Collator) -> Mapping[str, Any]:
        """A batch of this example, on the model's device."""
        batch = as_one_example(collate([copy.deepcopy(item)]), self._main_input)
        columns: Mapping[str, Any] = self._prepare_inputs(batch)
        return columns

    def _some_items(self, host: DataLoader[Any]) -> list[Any]:
        """A few examples as collators may see them; empty lines, which have no columns, only if all are."""
        key = self._main_input
        rows = (host.dataset[place] for place in some_places(len(self.train_dataset)))
        items = [without_column(row, self._ownership.column) for row in rows]
        return [item for item in items if not is_blank(item, key)] or items


def _of_each(
    context: Callable[[], contextlib.AbstractContextManager[Any]],
    example_loss: ExampleLoss,
    model: nn.Module,
    inputs: Mapping[str, Any],
) -> Tensor:
    with context():
        pieces = apart(inputs)
        if pieces is None:
            return example_loss(model, inputs)
        return torch.cat([example_loss(model, piece) for piece in pieces])
