"""Made-up examples, on which a loss is chosen and tried without looking at anybody's data.

A choice made on real examples would itself depend on them: one example could switch the loss, the engine
or the batching of all the others. Only names, types and widths of the columns are taken from the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.engines.rows import row
from hf_dp.training.reductions import IGNORED
from hf_dp.training.tasks import unwrapped
from hf_dp.training.vectorised import logits_of, without_targets

LENGTHS = (5, 7, 2, 4)
"""Of the made-up examples: different, so that padding that changes a loss shows."""

PER_TOKEN = frozenset(
    {"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"}
    | {"special_tokens_mask", "mm_token_type_ids", "global_attention_mask", "langs", "bbox"}
)
_ENDS = ("start_positions", "end_positions")


def made_up_rows(
    model: nn.Module, columns: Mapping[str, Any], lengths: tuple[int, ...] = LENGTHS
) -> dict[str, Any]:
    """Examples of these lengths with the columns of a real batch, padded on the right.

    Args:
        model: Read for its vocabulary, and run once without labels for its number of classes.
        columns: A collated batch of one example; of its values only shapes and types are used.
        lengths: Of the examples, in tokens.
    """
    generator = torch.Generator().manual_seed(0)  # public on purpose: so are these examples
    width = _width(columns)
    rows: dict[str, Any] = {}
    for name, value in columns.items():
        if name not in ("labels", *_ENDS):
            rows[name] = _column(name, value, width, _tokens(model), lengths, generator)
    for name in _ENDS:
        if name in columns:
            ends = [int(torch.randint(0, length, (), generator=generator)) for length in lengths]
            rows[name] = torch.tensor(ends, device=columns[name].device)
    if isinstance(columns.get("labels"), Tensor):
        rows["labels"] = _labels(model, columns["labels"], rows, lengths, generator)
    return rows


def each_alone(rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same examples, each as a batch of one without its padding."""
    return [_cut(row(rows, index), length) for index, length in enumerate(LENGTHS)]


def _cut(example: Mapping[str, Any], length: int) -> dict[str, Any]:
    full = max(LENGTHS)
    return {
        name: value[:, :length]
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == full
        else value
        for name, value in example.items()
    }


def _width(columns: Mapping[str, Any]) -> int | None:
    """How many positions the real example has; None where it has none."""
    for name in ("input_ids", "attention_mask", "inputs_embeds"):
        value = columns.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[1]
    return None


def _column(
    name: str,
    value: Any,
    width: int | None,
    tokens: tuple[int, int],
    lengths: tuple[int, ...],
    generator: torch.Generator,
) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    # by name: a list of features is not one of tokens because this example has as many of both
    per_token = width is not None and name in PER_TOKEN
    tail = (max(lengths), *value.shape[2:]) if per_token else tuple(value.shape[1:])
    shape = (len(lengths), *tail)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (B, T)
    if name in ("input_ids", "decoder_input_ids"):
        vocabulary, padding = tokens
        made = torch.randint(0, vocabulary - 1, shape, generator=generator)
        made = made + (made >= padding).long()  # padding stands for nothing but itself
        made = made.masked_fill(~mask, padding) if per_token else made
    elif "attention_mask" in name:
        made = mask.expand(shape) if per_token else torch.ones(shape)
    elif name == "position_ids":
        made = torch.arange(shape[1]).expand(shape) if len(shape) == 2 else torch.zeros(shape)
    elif value.is_floating_point():
        made = torch.randn(shape, generator=generator)
    else:
        made = torch.zeros(shape)
    return made.to(value)


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


def _labels(
    model: nn.Module,
    real: Tensor,
    rows: Mapping[str, Any],
    lengths: tuple[int, ...],
    generator: torch.Generator,
) -> Tensor:
    count = len(lengths)
    if real.is_floating_point():
        made = torch.rand(count, *real.shape[1:], generator=generator)
        return (made.round() if real.dim() == 2 else made).to(real)
    classes = _classes(model, rows)
    if real.dim() < 2 or (real.shape[1:] == (1,) and _width(rows) is None):
        return torch.randint(0, classes, (count, *real.shape[1:]), generator=generator).to(real)
    made = torch.randint(0, classes, (count, max(lengths)), generator=generator)
    own = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return made.masked_fill(~own, IGNORED).to(real)


@torch.no_grad()
def _classes(model: nn.Module, rows: Mapping[str, Any]) -> int:
    """Width of the model's output; the vocabulary where it cannot be run without labels."""
    try:
        return logits_of(model(**without_targets(model, rows))).shape[-1]
    except Exception:  # a decoder wants its labels, a foreign model may want anything
        return _vocabulary(model)
