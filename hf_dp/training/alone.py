"""The loss of an example, by definition: what ``compute_loss`` gives on that example alone.

Alone means a batch of one, ``num_items_in_batch`` unset, and without the padding that only longer
neighbours made necessary: where positions are absolute, or every position is offered as an answer,
padding changes the loss, and then an example's gradient would depend on who it was batched with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.engines.rows import OneExample, batch_size, row
from hf_dp.errors import ConfigurationError, explain
from hf_dp.training.positions import axis_of
from hf_dp.training.reductions import IGNORED
from hf_dp.training.tasks import Task, is_encoder_decoder, recognise_task

ExampleLoss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
"""Model and micro-batch -> losses ``(B,)``, each depending on its own row only."""

ComputeLoss = Callable[[nn.Module, dict[str, Any]], Any]
"""Model and batch -> mean loss: ``Trainer.compute_loss`` bound to its trainer."""

_PER_TOKEN = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "input_values",
        "input_features",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "special_tokens_mask",
        "labels",
    }
)
_ENDS = ("start_positions", "end_positions")


def definition_loss(compute_loss: ComputeLoss, *, trim_padding: bool = True) -> ExampleLoss:
    """One call of `compute_loss` per example: slow, and right for everything.

    Args:
        compute_loss: Called with the model and a fresh dict of fresh tensors, since the Trainer's
            own takes the labels out of the dict and some models clamp them in place.
        trim_padding: Whether each row is first cut to its own tokens, see `alone`. Switch it off
            only for models that need a fixed length, with data padded to that fixed length.

    Returns:
        A loss ``(B,)`` in float32 or wider. A row whose labels are all ignored, where the mean
        over no tokens is NaN, gives zero with a zero gradient; any other NaN stays, so that the
        engine can drop the example.
    """

    def losses(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        rows = (
            alone(model, inputs, index) if trim_padding else row(inputs, index)
            for index in range(batch_size(inputs))
        )
        each = [_loss_of_row(compute_loss, model, one) for one in rows]
        return torch.stack(each) if each else torch.zeros(0)

    return losses


def alone(model: nn.Module, inputs: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The example at `index` as a batch of one, cut to its own tokens.

    Columns that ``attention_mask`` hides before its first and after its last token go. Left
    padding stays in question answering, whose targets count positions. Nothing is cut where a
    tensor of that width is not known to be per token, nor from sequence-to-sequence models, whose
    labels have a length of their own. `OneExample` stays as it is.

    Args:
        model: Asked whether it is an encoder-decoder.
        inputs: A collated batch.
        index: Which row.
    """
    one = row(inputs, index)
    if isinstance(inputs, OneExample):
        return one
    names = _cut_by_the_mask(model, one)
    if not names or not bool(one["attention_mask"].any()):
        return one
    axis = axis_of(one)
    tokens = one["attention_mask"][0].reshape(-1, one["attention_mask"].shape[axis]).any(0)
    tokens = tokens.nonzero().reshape(-1)
    first = 0 if _ENDS[0] in one else int(tokens[0])
    kept = int(tokens[-1]) + 1 - first
    return {n: v.narrow(axis, first, kept) if n in names else v for n, v in one.items()}


def moved_to_the_front(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same examples, each beginning with its first token: its padding goes to its end.

    What `alone` makes of them stays the same, so how far an example's neighbours made it be padded on
    the left moves no position of its own.

    Args:
        model: Asked whether it is an encoder-decoder.
        inputs: A collated batch.

    Returns:
        None where `alone` would keep padding on the left.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if isinstance(mask, Tensor) and isinstance(positions, Tensor) and len(positions) == 1:
        positions = positions.expand(len(mask), *positions.shape[1:])  # each row gets its own
        inputs = {**inputs, "position_ids": positions}
    names = _cut_by_the_mask(model, inputs)
    if not names or _ENDS[0] in inputs or axis_of(inputs) > 1:
        return None
    width = inputs["attention_mask"].shape[1]
    own = inputs["attention_mask"] != 0
    first = own.to(torch.uint8).argmax(1)  # 0 where there is none
    places = (torch.arange(width, device=own.device) + first[:, None]) % width  # (B, T)
    rows = torch.arange(len(own), device=own.device)[:, None]
    return {n: value[rows, places] if n in names else value for n, value in inputs.items()}


def _cut_by_the_mask(model: nn.Module, inputs: Mapping[str, Any]) -> frozenset[str]:
    """The columns from which padding may go; none where one of the mask's width may not be per token."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != axis_of(inputs) + 1:
        return frozenset()
    sided = [name for name, value in inputs.items() if _spans(value, mask)]
    float_labels = [n for n in sided if n == "labels" and inputs[n].is_floating_point()]
    per_token = frozenset(sided).difference(float_labels)
    translates = is_encoder_decoder(model) and "labels" in inputs
    return frozenset() if translates or not per_token <= _PER_TOKEN else per_token


def _spans(value: object, mask: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape[: mask.dim()] == mask.shape


def _loss_of_row(compute_loss: ComputeLoss, model: nn.Module, one: dict[str, Any]) -> Tensor:
    fresh = {name: v.clone() if isinstance(v, Tensor) else v for name, v in one.items()}
    fresh.pop("num_items_in_batch", None)
    loss = compute_loss(model, fresh)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ConfigurationError(
            explain(
                "compute_loss",
                type(loss).__name__,
                "a tensor holding one number",
                "It is called on one example at a time, and that number is the example's loss.",
                "Return the mean loss, or pass example_loss.",
            )
        )
    loss = loss.reshape(())
    if bool(loss.isnan()) and nothing_to_predict(model, one):
        loss = _zero_of(model, loss)
    return loss if loss.dtype is torch.float64 else loss.float()


def nothing_to_predict(model: nn.Module, one: Mapping[str, Any]) -> bool:
    """Whether every target of a one-row batch is ignored.

    Args:
        model: Tells whether labels are shifted by one, so that the first is never predicted.
        one: From `alone` or `hf_dp.engines.rows.row`.
    """
    if all(isinstance(one.get(name), Tensor) for name in _ENDS):
        width = next((one[n].shape[1] for n in ("input_ids", "inputs_embeds") if n in one), None)
        return width is not None and any(bool((one[name] >= width).any()) for name in _ENDS)
    labels = one.get("labels")
    if not isinstance(labels, Tensor):
        return False
    if labels.dim() == 2 and recognise_task(model, one) is Task.CAUSAL_LM:
        labels = labels[:, 1:]
    return bool((labels == IGNORED).all())


def _zero_of(model: nn.Module, like: Tensor) -> Tensor:
    # Neither where() nor a product hides a NaN from backward; a sum over nothing does.
    trainable = next((p for p in model.parameters() if p.requires_grad), None)
    if trainable is None:
        return like.new_zeros(())
    return trainable.reshape(-1)[:0].sum().to(like)
