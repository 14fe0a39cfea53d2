"""From a drawn logical batch to micro-batches that fit in memory."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from hf_dp.coins import Coins
from hf_dp.engines.owners import Owners
from hf_dp.engines.rows import batch_size
from hf_dp.errors import ConfigurationError, PrivacyError, explain
from hf_dp.sampling.base import BatchSampler
from hf_dp.training.joining import (
    USUAL_FILLS,
    Collator,
    Fills,
    Tried,
    as_one_example,
    differ_in_size,
    has_no_positions,
    ignores_all,
    is_blank,
    join,
    kind_of,
    width_of,
)

RowCheck = Callable[[int, Any], None]

_PASSES = itertools.count(
    1
)  # over all loaders of the process, so that no two passes share a number


@dataclass(frozen=True, order=True)
class Place:
    """Which draw a batch is; later draws have greater places.

    Attributes:
        pass_number: Tells passes apart; batches of one pass were drawn together.
        index: Place within the pass, from 0.
    """

    pass_number: int
    index: int


class Draw(list[Any]):
    """The indices or the rows of a draw on their way through the loader and its workers.

    Attributes:
        place: Which draw it is.
        sizes: Examples of each drawn user, who stand one after the other; None where examples are drawn.
    """

    place: Place | None = None
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class OwnedRows:
    """Whose the rows of a micro-batch are.

    Attributes:
        owners: The rows of each user.
        at_once: Rows that may be in memory together; fewer than there are with one large user alone.
    """

    owners: Owners
    at_once: int

    @property
    def fit(self) -> bool:
        """Whether all rows may be in memory together."""
        return self.owners.num_rows <= self.at_once


class LogicalBatch:
    """The micro-batches of one draw, possibly none: one item of the loader, one optimizer step.

    It answers none of the questions that the Trainer asks a batch (its keys, its tokens), for their
    exact answers are private data.
    """

    def __init__(
        self,
        micro_batches: Sequence[Any],
        place: Place | None = None,
        owned: Sequence[OwnedRows] | None = None,
        alone: Sequence[Sequence[Any] | None] | None = None,
    ) -> None:
        """Hold what the collator made of each micro-batch, which draw it was made of, and whose it is.

        And, where it filled examples up, the batches of one example each of which it made one.
        """
        self.micro_batches = list(micro_batches)
        self.place = place
        self.owned = None if owned is None else list(owned)
        self.alone = [None] * len(self.micro_batches) if alone is None else list(alone)

    def __contains__(self, key: object) -> bool:
        return False

    def pin_memory(self) -> LogicalBatch:
        """Pin every tensor, as ``dataloader_pin_memory`` asks."""
        pin: Callable[[Any], Any] = torch.utils.data._utils.pin_memory.pin_memory
        pinned = [pin(micro_batch) for micro_batch in self.micro_batches]
        return LogicalBatch(pinned, self.place, self.owned, self.alone)


def drawn(inputs: Any) -> LogicalBatch:
    """`inputs`, if our own loader made them.

    Raises:
        PrivacyError: They come from elsewhere.
    """
    if isinstance(inputs, LogicalBatch):
        return inputs
    raise PrivacyError(
        f"training_step(inputs={type(inputs).__name__}): expected a LogicalBatch from "
        "get_train_dataloader. Other batches were not drawn by the sampler that is accounted for. "
        "Do not override get_train_dataloader; pass another dataset or data_collator instead."
    )


@dataclass(eq=False)
class LogicalBatchCollator:
    """Collates each example of a draw by itself, and joins those that are alike to micro-batches.

    In each, the longest come first. The order inside a draw is free of privacy cost: the sum does not
    depend on it. An example without any position, or target, has no loss, so it is left out: it adds nothing.

    Attributes:
        collator: The Trainer's own; it is given one example at a time.
        micro_batch_size: Examples in memory at once, at most.
        length_key: The field whose length counts.
        max_tokens: Examples times longest length in memory at once, at most, in place of
            `micro_batch_size`; an example longer than that is a micro-batch by itself.
        fills: What shorter examples are filled up with, by column.
        tried: On what examples padding was tried; others share a micro-batch with none of another length.
    """

    collator: Collator
    micro_batch_size: int
    length_key: str
    max_tokens: int | None = None
    fills: Fills = field(default_factory=lambda: USUAL_FILLS)
    tried: Tried = field(default_factory=Tried)

    def __call__(self, examples: list[Any]) -> LogicalBatch:
        """Collate one draw; an empty one gives no micro-batch."""
        alike: dict[Hashable, list[Any]] = defaultdict(list)
        for batch in self._collated(examples):
            alike[self._kind(batch)].append(batch)
        pieces = list(itertools.chain.from_iterable(map(self._pieces, alike.values())))
        batches = [join(piece, self.fills) for piece in pieces]
        alone = [piece if differ_in_size(piece) else None for piece in pieces]
        return LogicalBatch(batches, getattr(examples, "place", None), alone=alone)

    @property
    def one_by_one(self) -> bool:
        """Whether every example is a micro-batch by itself."""
        return self.micro_batch_size == 1 and self.max_tokens is None

    def _pieces(self, batches: list[Any]) -> Iterator[list[Any]]:
        ordered, start = sorted(batches, key=self._length, reverse=True), 0
        while start < len(ordered):
            size = self._at_once(self._length(ordered[start]))
            yield ordered[start : start + size]
            start += size

    def _at_once(self, longest: int) -> int:
        """Examples that may be in memory together, if the longest of them has this length."""
        if self.max_tokens is not None and longest > 0:
            return max(1, self.max_tokens // longest)
        return self.micro_batch_size

    def _kind(self, batch: Mapping[str, Any]) -> Hashable:
        return kind_of(batch, self.fills, self.tried)

    def _collated(self, examples: list[Any]) -> list[Mapping[str, Any]]:
        """A batch of each example that has any position."""
        batches = (self._batch_of(example) for example in examples)
        return [batch for batch in batches if batch is not None]

    def _batch_of(self, example: Any) -> Mapping[str, Any] | None:
        try:
            batch = self._whole_row(as_one_example(self.collator([example]), self.length_key))
        except Exception:  # an empty line stops no run, whatever a collator makes of it
            if is_blank(example, self.length_key) or self._translates_nothing(example):
                return None
            raise
        nothing = has_no_positions(batch, self.length_key) or self._translates_nothing(batch)
        return None if nothing else batch

    def _translates_nothing(self, of: Any) -> bool:
        return self.tried.translates and isinstance(of, Mapping) and ignores_all(of.get("labels"))

    def _whole_row(self, batch: Any) -> Mapping[str, Any]:
        """`batch`, of one example; rows are clipped one by one, so it must be one whole row."""
        if not isinstance(batch, Mapping) or batch_size(batch) != 1:
            raise ConfigurationError(
                explain(
                    "data_collator",
                    self._name(),
                    "columns with one row for each example",
                    "A row is clipped as a whole: an example in several rows would count several times, "
                    "and of several examples in one row none could be told apart.",
                    "Split or join texts in the dataset, whose rows are what is protected, and not in the "
                    "collator.",
                )
            )
        return batch

    def _name(self) -> str:
        # The host wraps a collator to remove columns.
        return type(getattr(self.collator, "data_collator", self.collator)).__name__

    def _length(self, batch: Mapping[str, Any]) -> int:
        return width_of(batch, self.length_key)


class LogicalBatchSampler(Sampler[list[int]]):
    """`steps_per_epoch` draws of a `BatchSampler`; every iteration begins with a new pass.

    A resumed run replays nothing: it skips as many draws as the epoch had, and goes on with fresh ones.
    Where a pass spans several draws, these belong to a new pass, which is accounted for beside the one
    that was abandoned.
    """

    def __init__(
        self,
        sampler: BatchSampler,
        num_units: int,
        steps_per_epoch: int,
        coins: Coins,
        examples_of: Callable[[list[int]], Draw] = Draw,
    ) -> None:
        """Draw from `num_units` units with `coins`; `examples_of` turns a draw into rows of the data."""
        self.sampler = sampler
        self.num_units = num_units
        self.steps_per_epoch = steps_per_epoch
        self.coins = coins
        self.examples_of = examples_of

    def __iter__(self) -> Iterator[list[int]]:
        draws = self.sampler.batches(self.num_units, self.coins)
        for number in range(self.steps_per_epoch):
            index = number % self.sampler.pass_length
            if index == 0:
                current = next(_PASSES)
            drawn_now = self.examples_of(next(draws))
            drawn_now.place = Place(current, index)
            yield drawn_now

    def __len__(self) -> int:
        return self.steps_per_epoch


class _Indexed(torch.utils.data.Dataset[Any]):
    """A map-style dataset read one example at a time.

    A transform that is applied on reading (`datasets.Dataset.set_transform`) would otherwise see a whole
    draw at once, and could join its examples or make several rows, each clipped by itself, of one.
    """

    def __init__(
        self, dataset: Any, without: str | None = None, check: RowCheck | None = None
    ) -> None:
        self.dataset = dataset
        self.without = without  # a column that nobody may see
        self.check = check

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        row = self.dataset[index]
        if self.check is not None:
            self.check(index, row)
        return without_column(row, self.without)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        rows = Draw(self[index] for index in indices)
        rows.place = getattr(indices, "place", None)
        rows.sizes = getattr(indices, "sizes", None)
        return rows


def without_column(row: Any, column: str | None) -> Any:
    """An example as collator and model may see it."""
    if column is None or not isinstance(row, Mapping) or column not in row:
        return row
    return {name: value for name, value in row.items() if name != column}


def logical_loader(
    host: DataLoader[Any],
    sampler: LogicalBatchSampler,
    collator: LogicalBatchCollator,
    without: str | None = None,
    check: RowCheck | None = None,
) -> DataLoader[LogicalBatch]:
    """A loader of logical batches with the dataset and workers of the Trainer's own.

    It is a plain loader: accelerate's would shard a draw a second time.

    Args:
        host: The Trainer's.
        sampler: Draws.
        collator: Cuts each draw into micro-batches.
        without: A column that no collator may see, or None.
        check: Called with the place and the content of each row that is read.
    """
    seed = int(sampler.coins.bits(1)[0] >> 1)  # for collators that draw, in workers: secret as well
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        _Indexed(host.dataset, without, check),
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=host.num_workers,
        pin_memory=host.pin_memory and torch.accelerator.is_available(),
        persistent_workers=host.persistent_workers,
        multiprocessing_context=host.multiprocessing_context,
        prefetch_factor=host.prefetch_factor,
        worker_init_fn=host.worker_init_fn,
        generator=generator,
    )
