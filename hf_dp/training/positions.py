"""Which axes of a batch's columns are positions: as many as the mask tells apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.training.tasks import unwrapped

_TARGETS = frozenset({"decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"})
PER_TOKEN = frozenset(
    {"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"}
    | {"special_tokens_mask", "mm_token_type_ids", "global_attention_mask", "langs", "bbox"}
)
"""Columns that are known to have an entry for each token."""

_LIMITS = frozenset(
    {"max_position_embeddings", "n_positions", "max_sequence_length", "max_target_positions"}
    | {"max_encoder_position_embeddings", "max_decoder_position_embeddings"}
)
_RESERVED = 2  # position rows that some models never use


@dataclass(frozen=True)
class Span:
    """Where a column has positions, and how many of them are each example's own.

    Attributes:
        axes: Of the column, ``(B, ...)``; never the first, which is the examples'.
        lengths: Of the examples.
    """

    axes: tuple[int, ...]
    lengths: tuple[int, ...]

    def shape(self, real: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a batch of these examples, with the other axes of a real one."""
        width = max(self.lengths)
        return tuple(width if axis in self.axes else size for axis, size in enumerate(real))

    def own(self, shape: tuple[int, ...]) -> Tensor:
        """Which entries are the examples' own along the last axis of positions, not padding."""
        own = torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]  # (B, T)
        view = [1] * len(shape)
        view[0], view[self.axes[-1]] = own.shape
        return own.view(view).expand(shape)

    def cut(self, value: Tensor, index: int) -> Tensor:
        """One example's row without its padding."""
        for axis in self.axes:
            value = value.narrow(axis, 0, self.lengths[index])
        return value


Spans = Mapping[str, Span]
"""Column -> where its positions are."""


def axis_of(columns: Mapping[str, Any]) -> int:
    """The axis of a column on which its positions are: of several texts to choose from, the third."""
    ids, mask = columns.get("input_ids"), columns.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor):
        return 1
    return 2 if ids.dim() == 3 and ids.shape == mask.shape else 1


def width_of(columns: Mapping[str, Any]) -> int | None:
    """How many positions the example of a batch of one has; None where it has none."""
    for name in ("input_ids", "attention_mask", "inputs_embeds"):
        value = columns.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[axis_of(columns)]
    return None


def reads_text(columns: Mapping[str, Any]) -> bool:
    """Whether positions are tokens, not numbers of a sound."""
    return any(name in columns for name in ("input_ids", "inputs_embeds"))


def room_of(model: nn.Module) -> int | None:
    """How many tokens its configuration has positions for; None where it sets no limit."""
    config: Any = getattr(unwrapped(model), "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limits = [getattr(config, name, None) for name in _LIMITS]
    known = [limit for limit in limits if isinstance(limit, int)]
    adapters: Mapping[str, Any] = getattr(model, "peft_config", {})
    prompts = [getattr(adapter, "num_virtual_tokens", None) or 0 for adapter in adapters.values()]
    taken = _RESERVED + max(prompts, default=0)  # by what comes before an example's own
    return min(known) - taken if known else None


def spans_of(
    columns: Mapping[str, Any],
    lengths: tuple[int, ...],
    target_lengths: tuple[int, ...],
    *,
    by_name: bool,
    translates: bool,
) -> dict[str, Span]:
    """Find them in a collated batch of one example.

    Args:
        columns: Of its values only shapes and types are used.
        lengths: That the made-up examples are to have.
        target_lengths: And their targets, where these have lengths of their own.
        by_name: Whether columns must be known to be per token, not merely as wide as the mask.
        translates: Whether the model's labels have lengths of their own.
    """
    width, first, spans = width_of(columns), axis_of(columns), dict[str, Span]()
    for name, value in columns.items():
        if not isinstance(value, Tensor) or value.dim() < 2:
            continue
        if name == "labels":
            own = translates or value.shape[1] != width
            if first == 1 and _of_tokens(value, width, translates=translates):
                spans[name] = Span((1,), target_lengths if own else lengths)
        elif name in _TARGETS:
            spans[name] = Span((1,), target_lengths)
        elif axes := _axes(name, value, width, first, by_name=by_name):
            spans[name] = Span(axes, lengths)
    return spans


def _axes(
    name: str, value: Tensor, width: int | None, first: int, *, by_name: bool
) -> tuple[int, ...]:
    if name not in PER_TOKEN and (by_name or width == 1):  # of one token, much is as wide by chance
        return ()
    return tuple(axis for axis in range(first, value.dim()) if value.shape[axis] == width)


def _of_tokens(labels: Tensor, width: int | None, *, translates: bool) -> bool:
    """Whether labels, ``(B, L)``, are of tokens; not so numbers, nor one class of a whole example."""
    one = labels.shape[1:] == (1,) and (width is None or (width > 1 and not translates))
    return not labels.is_floating_point() and not one
