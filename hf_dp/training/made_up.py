"""Made-up examples, on which a loss is chosen and tried without looking at anybody's data.

A choice made on real examples would itself depend on them: one example could switch the loss, the engine
or the batching of all the others. Only names, types and widths of the columns are taken from the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_dp.engines.rows import batch_size, row
from hf_dp.training.positions import Spans, reads_text, spans_of, width_of
from hf_dp.training.reductions import IGNORED
from hf_dp.training.tasks import closing_token, is_encoder_decoder, unwrapped
from hf_dp.training.vectorised import decoder_inputs, logits_of, without_targets

LENGTHS = (5, 7, 2, 4)
"""Of the made-up examples: different, so that padding that changes a loss shows."""

_LONGER = (37, 331, 1777)
# For sound, where one position is made of hundreds of numbers: primes, so that no stride divides all
# lengths.
_ENDS = ("start_positions", "end_positions")
KNOWN = frozenset({"labels", "input_ids", "decoder_input_ids", "attention_mask", *_ENDS})
"""Columns of whole numbers that are made up by what they mean; others are zero."""


class MadeUpRows(dict[str, Any]):
    """Examples of different lengths as one batch, padded on the right.

    Attributes:
        spans: Which axes of which columns are positions. Others are as wide as in the data, so what
            padding them would do is not tried.
    """

    def __init__(self, columns: Mapping[str, Any], spans: Spans) -> None:
        """Hold the columns, and which of their axes are positions."""
        super().__init__(columns)
        self.spans = spans

    @property
    def longest(self) -> int:
        """Positions of the longest example."""
        return max((max(span.lengths) for span in self.spans.values()), default=1)

    def with_columns(self, columns: Mapping[str, Any]) -> MadeUpRows:
        """The same with other columns of the same shapes."""
        return MadeUpRows({**self, **columns}, self.spans)


@dataclass
class _Maker:
    """Makes the columns of one batch.

    Attributes:
        model: Read for its vocabulary, and run without labels for its number of classes.
        columns: Of a real example.
        spans: Which of their axes are positions.
        lengths: Of the examples.
        target_lengths: Of their targets, where these have lengths of their own.
    """

    model: nn.Module
    columns: Mapping[str, Any]
    spans: Spans
    lengths: tuple[int, ...]
    target_lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)  # public on purpose: so are the examples

    def rows(self) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in self.columns.items():
            if name not in ("labels", *_ENDS):
                made[name] = self._column(name, value)
        for name in _ENDS:
            if name in self.columns:
                ends = [self._below(length) for length in self.lengths]
                made[name] = torch.tensor(ends, device=self.columns[name].device)
        if isinstance(self.columns.get("labels"), Tensor):
            made["labels"] = self._labels(self.columns["labels"], made)
        return made | self._made_of_labels(made)

    def _below(self, bound: int) -> int:
        return int(torch.randint(0, bound, (), generator=self.generator))

    def _column(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        span = self.spans.get(name)
        shape = (len(self.lengths), *value.shape[1:])
        own = torch.ones(shape, dtype=torch.bool)
        if span is not None:
            shape = span.shape(shape)
            own = span.own(shape)
        if name in ("input_ids", "decoder_input_ids"):
            vocabulary, padding = _tokens(self.model)
            made = torch.randint(0, vocabulary - 1, shape, generator=self.generator)
            made = made + (made >= padding).long()  # padding stands for nothing but itself
            made = made.masked_fill(~own, padding)
            made = self._closed(made, own) if name == "input_ids" else made
        elif "attention_mask" in name:
            made = own
        elif name == "position_ids":
            made = torch.arange(shape[1]).expand(shape) if len(shape) == 2 else torch.zeros(shape)
        elif value.is_floating_point():
            made = torch.randn(shape, generator=self.generator)
        else:
            made = torch.zeros(shape)
        return made.to(value)

    def _closed(self, ids: Tensor, own: Tensor) -> Tensor:
        """`ids` with one closing token, the last, if the model reads the class from it."""
        token = closing_token(self.model)
        if token is None or ids.dim() != 2:
            return ids
        padding = _tokens(self.model)[1]
        other = next(n for n in range(3) if n not in (token, padding))
        last = own & ~F.pad(own[:, 1:], (0, 1))
        return ids.masked_fill(own & (ids == token), other).masked_fill(last, token)

    def _labels(self, real: Tensor, rows: Mapping[str, Any]) -> Tensor:
        count = len(self.lengths)
        if real.is_floating_point():
            made = torch.rand(count, *real.shape[1:], generator=self.generator)
            return (made.round() if real.dim() == 2 else made).to(real)
        classes, span = _classes(self.model, rows), self.spans.get("labels")
        shape = (count, *real.shape[1:]) if span is None else (count, max(span.lengths))
        made = torch.randint(0, classes, shape, generator=self.generator)
        return made.masked_fill(~span.own(shape), IGNORED).to(real) if span else made.to(real)

    def _made_of_labels(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """What a collator that knows the model makes of the labels."""
        model = unwrapped(self.model)
        known = hasattr(model, "prepare_decoder_input_ids_from_labels")
        if not known or "labels" not in self.spans or "decoder_input_ids" not in rows:
            return {}
        return {"decoder_input_ids": decoder_inputs(model, rows["labels"])}


def made_up_rows(
    model: nn.Module,
    columns: Mapping[str, Any],
    lengths: tuple[int, ...] = LENGTHS,
    target_lengths: tuple[int, ...] | None = None,
    *,
    by_name: bool = False,
) -> MadeUpRows:
    """Examples of these lengths with the columns of a real batch, padded on the right.

    Args:
        model: Read for its vocabulary, and run once without labels for its number of classes.
        columns: A collated batch of one example; of its values only shapes and types are used.
        lengths: Of the examples, in tokens.
        target_lengths: Of the targets of models that translate; None for `lengths`.
        by_name: Whether only columns that are known to be per token have positions, and not all that
            are as wide as the mask.
    """
    targets = target_lengths or lengths
    spans = spans_of(
        columns, lengths, targets, by_name=by_name, translates=is_encoder_decoder(model)
    )
    return MadeUpRows(_Maker(model, columns, spans, lengths, targets).rows(), spans)


def attempts(model: nn.Module, columns: Mapping[str, Any]) -> Iterator[MadeUpRows]:
    """Made-up rows that a model may take: short ones, then long ones for sound.

    At last, columns that may be as wide as the mask by chance keep their width.

    Args:
        model: See `made_up_rows`.
        columns: Likewise.
    """
    short = made_up_rows(model, columns)
    yield short
    if width_of(columns) is None:
        return
    square = any(
        len(span.axes) > 1 for span in short.spans.values()
    )  # and too much to make it long
    if not (square or reads_text(columns)):  # few tokens are text, too
        for scale in _LONGER:
            yield made_up_rows(model, columns, tuple(scale * length for length in LENGTHS), LENGTHS)
    named = made_up_rows(model, columns, by_name=True)
    if named.spans != short.spans:
        yield named


def each_alone(rows: MadeUpRows) -> list[dict[str, Any]]:
    """The same examples, each as a batch of one without its padding."""
    return [_cut(row(rows, index), rows.spans, index) for index in range(batch_size(rows))]


def _cut(example: Mapping[str, Any], spans: Spans, index: int) -> dict[str, Any]:
    return {
        name: spans[name].cut(value, index)
        if name in spans and isinstance(value, Tensor)
        else value
        for name, value in example.items()
    }


def _tokens(model: nn.Module) -> tuple[int, int]:
    """Size of the vocabulary, and which of it is padding."""
    config = getattr(unwrapped(model), "config", None)
    padding = getattr(config, "pad_token_id", None)
    return _vocabulary(model), padding if isinstance(padding, int) and padding >= 0 else 0


def _vocabulary(model: nn.Module) -> int:
    try:
        embeddings = unwrapped(model).get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # no model of transformers, or of sound
        embeddings = None
    size = getattr(embeddings, "num_embeddings", None)
    if isinstance(size, int):
        return size
    sizes = [
        module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)
    ]
    return max(2, min(sizes, default=2))


@torch.no_grad()
def _classes(model: nn.Module, rows: Mapping[str, Any]) -> int:
    """Width of the model's output; the vocabulary where it cannot be run without labels."""
    try:
        return logits_of(model(**without_targets(model, rows))).shape[-1]
    except Exception:  # a decoder wants its labels, a foreign model may want anything
        return _vocabulary(model)
