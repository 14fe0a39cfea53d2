"""An example of somebody's own batch without the padding that its neighbours brought, on either side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.engines.rows import OneExample, batch_size, row
from hf_dp.errors import ConfigurationError, explain
from hf_dp.training.joining import MASK, TARGET_MASK
from hf_dp.training.positions import PER_TOKEN, axis_of
from hf_dp.training.reductions import IGNORED
from hf_dp.training.tasks import is_encoder_decoder, unwrapped

_READ = frozenset({"input_ids", "inputs_embeds", "input_values", "input_features"})
_OF_TEXT = PER_TOKEN | _READ | {"labels"}
_OF_TARGET = ("labels", "decoder_input_ids", TARGET_MASK)
_ENDS = ("start_positions", "end_positions")
_POSITIONS = "position_ids"
_SEVERAL = 2


def unpadded(model: nn.Module, inputs: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """The example at `index` as a batch of one, of which nothing follows how long others are.

    What ``attention_mask`` hides before its first and after its last token goes, and so do targets of
    models that translate where they are ignored; answers are counted from the first token that is left.

    Args:
        model: Asked whether it is an encoder-decoder.
        inputs: A batch as somebody's loop padded it.
        index: Which row.

    Raises:
        ConfigurationError: There is padding that cannot be told from the example; of one that is alone it
            is left as it is.
    """
    one = row(inputs, index)
    if isinstance(inputs, OneExample):
        return one
    several = batch_size(inputs) >= _SEVERAL
    targets = _OF_TARGET if is_encoder_decoder(model) and one.get("labels") is not None else ()
    mask = one.get(MASK)
    if isinstance(mask, Tensor) and mask.dim() == axis_of(one) + 1:
        one = _without_hidden(one, mask, targets, several=several)
    return _without_ignored(one) if targets else one


def from_the_first_token(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same examples with positions that do not count padding on the left.

    Args:
        inputs: With ``position_ids`` of ``(1, T)`` or ``(B, T)``, as others stay as they are.
    """
    mask, positions = inputs.get(MASK), inputs.get(_POSITIONS)
    if not (isinstance(mask, Tensor) and isinstance(positions, Tensor) and mask.dim() == 2):
        return inputs
    if positions.dim() != mask.dim() or positions.shape[1] != mask.shape[1] or not mask.numel():
        return inputs
    first = (mask != 0).to(torch.uint8).argmax(1, keepdim=True)  # 0 where there is none
    positions = positions.expand(len(mask), -1)
    counted = positions.gather(1, first) - positions[:, :1] == first
    return {**inputs, _POSITIONS: (positions - first * counted).clamp(min=0)}


def _without_hidden(
    one: dict[str, Any], mask: Tensor, targets: Iterable[str], *, several: bool
) -> dict[str, Any]:
    axis, width = axis_of(one), mask.shape[-1]
    places = mask[0].reshape(-1, width).any(0).nonzero().flatten()
    if len(places) in (0, width):
        return one
    first, last = int(places[0]), int(places[-1])
    wide = {
        name
        for name, value in one.items()
        if isinstance(value, Tensor) and value.shape[axis : axis + 1] == (width,)
    }
    wide = {n for n in wide.difference(targets) if n != "labels" or not one[n].is_floating_point()}
    if wide.isdisjoint(_READ):
        return one  # the mask counts positions in another place, as Whisper's does
    if not wide <= _OF_TEXT:
        if not several:
            return one
        raise _not_told(sorted(wide - _OF_TEXT)[0], "a column that is padded as the tokens are")
    cut = dict(one)
    for name in wide:
        cut[name] = one[name].narrow(axis, first, last + 1 - first)
    for name in _ENDS:
        if isinstance(one.get(name), Tensor):
            cut[name] = (one[name] - first).clamp(min=0)
    return cut


def _without_ignored(one: dict[str, Any]) -> dict[str, Any]:
    labels = one["labels"]
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return one
    marks = one.get(TARGET_MASK)
    places = ((labels[0] != IGNORED) if marks is None else marks[0] != 0).nonzero().flatten()
    if len(places) == 0:
        return one
    names = (n for n in _OF_TARGET if isinstance(one.get(n), Tensor))
    own = [name for name in names if one[name].shape[:2] == labels.shape]
    return {**one, **{name: one[name][:, : int(places[-1]) + 1] for name in own}}


def targets_at_the_front(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same examples of a model that translates, their targets beginning with what is to be learned.

    A loop of one's own may have padded them on the left. So what is ignored before the first target counts
    as padding, and where ``decoder_input_ids`` are given, as far as these are the padding token.

    Args:
        model: Asked whether it is an encoder-decoder, and for its padding token.
        inputs: With ``labels`` of ``(B, L)``; with a mask of the decoder's they stay as they are.
    """
    labels, given = inputs.get("labels"), inputs.get("decoder_input_ids")
    if not is_encoder_decoder(model) or not isinstance(labels, Tensor) or TARGET_MASK in inputs:
        return inputs
    if labels.dim() != 2 or labels.is_floating_point() or not labels.numel():
        return inputs
    ahead = (labels != IGNORED).to(torch.uint8).argmax(1, keepdim=True)  # 0 where all are ignored
    moved = {"labels": labels}
    if isinstance(given, Tensor) and given.shape == labels.shape:
        config: Any = getattr(unwrapped(model), "config", None)
        token = getattr(config, "pad_token_id", None)
        empty = given.ne(-1 if token is None else token).to(torch.uint8).argmax(1, keepdim=True)
        if token == getattr(config, "decoder_start_token_id", None):
            empty = (empty - 1).clamp(min=0)
        ahead = ahead.minimum(empty)
        moved["decoder_input_ids"] = given
    elif given is not None:
        return inputs
    places = (torch.arange(labels.shape[1], device=labels.device) + ahead) % labels.shape[1]
    return {**inputs, **{name: value.gather(1, places) for name, value in moved.items()}}


def is_padded(inputs: Mapping[str, Any], *, translates: bool) -> bool:
    """Whether masks of several examples hide anything, or targets of their own length have ignored ends."""
    masks = [m for m in map(inputs.get, (MASK, TARGET_MASK)) if isinstance(m, Tensor)]
    labels = inputs.get("labels") if translates else None
    if isinstance(labels, Tensor) and labels.dim() > 1:
        masks.append(labels[:, [0, -1]] != IGNORED)
    return batch_size(inputs) >= _SEVERAL and not all(bool(mask.all()) for mask in masks)


def _not_told(column: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        explain(
            "clipped_sum.batch",
            column,
            f"no {what}",
            "It cannot be told what of it is the example's own, and this model's loss depends on "
            "padding: one example would change the gradients of others.",
            "Pad on the right, pass attention_mask (and decoder_attention_mask), or give each example a call "
            "of its own.",
        )
    )
