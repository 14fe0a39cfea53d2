"""Whether an example's loss depends on the padding that longer neighbours make necessary.

The test is made on made-up examples, in full precision and at weights where nothing is zero by chance:
a head that begins at zero, or the row of the padding token, would hide what the first noisy steps
bring out. Losses that agree there agree for all weights, and so do their gradients.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_dp.engines.base import is_out_of_memory
from hf_dp.engines.familiar import foreign_code
from hf_dp.engines.precision import full_precision
from hf_dp.engines.rows import batch_size, select_rows
from hf_dp.engines.undisturbed import draws, evaluation_flags, undisturbed
from hf_dp.layers.randomness import kept_randomness
from hf_dp.training.alone import ExampleLoss
from hf_dp.training.losses import is_coarse
from hf_dp.training.made_up import KNOWN, LENGTHS, MadeUpRows, each_alone, made_up_rows
from hf_dp.training.positions import axis_of, reads_text, room_of
from hf_dp.training.shortened import shortened
from hf_dp.training.tasks import unwrapped

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-5
_BOUNDS = (2, 10)  # of the whole numbers that are tried
_WINDOWS = re.compile(r"window|chunk|local_att|block_size")
"""Words in the names of a configuration's numbers that may set what longer texts look at."""

_KEYS = re.compile(r"index\w*_topk|topk_(tokens|keys|blocks)|keep_window")
"""Of how many keys the best are chosen: among more, padding is a candidate, and products hide how many."""

_LONG = 65  # as if every model had such a window: some have blocks that no configuration names
_BEYOND = 9  # by so many tokens more than twice a window is tried
_TRIED = 5  # texts that are longer than it; of some windows not every text shows it
_LONGEST = 128  # windows above that are not tried: it would take longer than training
_MOST_PARAMETERS = 2_000_000_000  # of which a copy in float32, 8 GB, is made for the test


def padding_matters(
    loss: ExampleLoss,
    model: nn.Module,
    rows: MadeUpRows | None,
    padding_id: int | None = None,
) -> bool:
    """Whether a made-up example's loss changes with padding or with its neighbours.

    Numbers of a user's own, say rewards, are zero in `rows`; others are tried as far as the loss takes
    them. Losses that are all the same show nothing.

    Args:
        loss: One loss per example.
        model: Left as it is; one in half precision is copied.
        rows: Made-up examples of different lengths as one batch, or None where there are none.
        padding_id: The token that the collator pads with; None if that is not known, and then it
            must not matter which.

    Returns:
        True also where it could not be tried.
    """
    if rows is None:
        return True
    try:
        wide = _wide(model)
        with full_precision(next(wide.parameters()).device), undisturbed(wide):
            if wide is not model or not is_coarse(wide):
                variants = list(_variants(rows, wide, padding_id))
                variants += [other for other in _numbered(rows) if _is_taken(loss, wide, other)]
                return any(_differs(loss, wide, variant) for variant in variants) or not any(
                    _tells(loss, wide, variant) for variant in variants
                )
    except Exception as error:  # the loss is foreign code
        logger.debug("the loss could not be tried: %s", type(error).__name__)
    return True


def padded_up_to(
    loss: ExampleLoss, model: nn.Module, columns: Mapping[str, Any], padding_id: int | None = None
) -> int | None:
    """How long texts may be of which padding that changes no short one's loss changes none.

    Longer ones may look at less of what they hold: at windows, at chunks, at a choice of keys. Short windows
    are tried; where keys are chosen, as many as these is the end.

    Args:
        loss: One loss per example, which `padding_matters` found to be its own.
        model: Left as it is. Its configuration names its windows.
        columns: Of a real example; of its values only shapes and types are used.
        padding_id: See `padding_matters`.

    Returns:
        None where no text is too long; 0 where all are.
    """
    if not reads_text(columns) or axis_of(columns) > 1:
        return None
    known = room_of(model)
    room = math.inf if known is None else known
    keys = min(_numbers_of(model, _KEYS), default=math.inf)
    windows = {n for n in _numbers_of(model, _WINDOWS) if n <= _LONGEST} | {_LONG}
    if known is None and next(model.parameters()).device.type != "cpu":
        windows = set()  # too long a text might be the end of an accelerator's process
    for width in sorted(windows):
        if width >= min(keys, room):
            break
        longest = int(min(2 * width + _BEYOND, room))
        steps = range(longest, width, -max(1, (longest - width) // _TRIED))
        lengths = (*steps, 3, max(2, width // 2))
        if not _is_alike(loss, model, columns, lengths, padding_id):
            return 0 if width == _LONG else width
    return int(keys) if keys < room else None


def _numbers_of(model: nn.Module, words: re.Pattern[str]) -> set[int]:
    config: Any = getattr(unwrapped(model), "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    named = vars(config or object).items()
    values = [v for name, v in named if words.search(name)]
    numbers = [n for v in values for n in (v if isinstance(v, list | tuple) else [v])]
    return {n for n in numbers if isinstance(n, int) and n > 1}


@torch.no_grad()
def _is_alike(
    loss: ExampleLoss,
    model: nn.Module,
    columns: Mapping[str, Any],
    lengths: tuple[int, ...],
    padding_id: int | None,
) -> bool:
    """Whether texts of these lengths have the losses that they have alone."""
    try:
        targets = tuple(itertools.islice(itertools.cycle(LENGTHS), len(lengths)))
        rows = made_up_rows(model, columns, lengths, targets)
        wide = _wide(model)
        with full_precision(next(wide.parameters()).device), undisturbed(wide):
            for variant in _variants(rows, wide, padding_id):
                together = _in_mode(loss, wide, variant, training=False)
                single = [_in_mode(loss, wide, one, training=False) for one in each_alone(variant)]
                if not _agree(together, torch.cat(single)):
                    return False
    except MemoryError:
        return False
    except Exception as error:  # what the model does not take is in no dataset, either
        logger.debug("long texts were not taken: %s", type(error).__name__)
        return not (isinstance(error, RuntimeError) and is_out_of_memory(error))
    return True


def _wide(model: nn.Module) -> nn.Module:
    """`model`, or a float32 copy where half precision would hide small differences.

    Of a library's model that is too large to be copied, with few of its layers.
    """
    narrow = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    if not narrow:
        return model
    large = _size_of(model) > _MOST_PARAMETERS
    with shortened(model) if large and not foreign_code(model) else contextlib.nullcontext():
        if _size_of(model) > _MOST_PARAMETERS:
            raise MemoryError("too large to be copied for a test of padding")
        return copy.deepcopy(model).float()


def _size_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _variants(rows: MadeUpRows, model: nn.Module, padding_id: int | None) -> Sequence[MadeUpRows]:
    """The batch as the collator pads it; with several paddings where that is not known."""
    rows = rows.with_columns({name: _as_wide(value, model) for name, value in rows.items()})
    ids, mask = rows.get("input_ids"), rows.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or ids.shape != mask.shape:
        return [rows]
    largest = int(ids.max())
    tokens = {0, largest} if padding_id is None else {padding_id}
    given = [rows] if padding_id is None else []
    return [
        *given,
        *(
            rows.with_columns({"input_ids": ids.masked_fill(mask == 0, token)})
            for token in sorted(tokens)
        ),
    ]


def _numbered(rows: MadeUpRows) -> Iterator[MadeUpRows]:
    """The batch with other whole numbers in the columns of which nothing is known."""
    generator = torch.Generator().manual_seed(0)  # public: so are the examples
    free = {
        name: value
        for name, value in rows.items()
        if isinstance(value, Tensor)
        and value.dim() > 0
        and not (value.is_floating_point() or value.is_complex())
        and not (name in rows.spans or name in KNOWN)
    }
    for bound in _BOUNDS if free else ():
        yield rows.with_columns(
            {
                name: torch.randint(0, bound, value.shape, generator=generator).to(value)
                for name, value in free.items()
            }
        )


def _is_taken(loss: ExampleLoss, model: nn.Module, rows: MadeUpRows) -> bool:
    try:
        return bool(_in_mode(loss, model, rows, training=False).isfinite().any())
    except Exception as error:  # indices that are too large, say
        logger.debug("other numbers were not taken: %s", type(error).__name__)
        return False


def _tells(loss: ExampleLoss, model: nn.Module, rows: MadeUpRows) -> bool:
    """Whether examples have losses of their own."""
    losses = _in_mode(loss, model, rows, training=False).detach()
    return bool((losses - losses[0]).abs().max() > _TOLERANCE * losses.abs().max())


def _as_wide(value: Any, model: nn.Module) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.to(next(model.parameters()).dtype) if half else value


def _differs(loss: ExampleLoss, model: nn.Module, rows: MadeUpRows) -> bool:
    """In evaluation mode, and in training mode; there with the same draws, if it draws at all."""
    modes = [True, False]
    if draws(lambda: _in_mode(loss, model, rows, training=True)):
        if _neighbours_matter(loss, model, rows):
            return True
        modes = [False]
    for training in modes:
        together = _in_mode(loss, model, rows, training=training)
        single = [_in_mode(loss, model, one, training=training) for one in each_alone(rows)]
        if not _agree(together, torch.cat(single)):
            return True
    return False


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether losses are the same numbers; of what is infinite in both, nothing is known."""
    same = torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE)
    return same and bool(one.isfinite().all())


def _neighbours_matter(loss: ExampleLoss, model: nn.Module, rows: MadeUpRows) -> bool:
    """Whether, with the same draws, an example's loss changes when all others become copies of it."""
    count = batch_size(rows)

    def drawn(inputs: Mapping[str, Any]) -> Tensor:
        with kept_randomness(next(model.parameters()).device):
            torch.manual_seed(0)  # public: so are the examples
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            return _in_mode(loss, model, inputs, training=True)

    together = drawn(rows)
    for index in range(count):
        copies = drawn(select_rows(rows, [index] * count))
        if not _agree(together[index], copies[index]):
            return True
    return False


def _in_mode(
    loss: ExampleLoss, model: nn.Module, rows: Mapping[str, Any], *, training: bool
) -> Tensor:
    evaluation_flags(model)
    if training:
        for module in model.modules():
            module.training = True
    return loss(model, rows)


def padded_on_the_left(mask: Tensor) -> bool:
    """Whether any row, ``(B, T)``, begins with padding; an empty one does not."""
    return bool(((mask[:, 0] == 0) & mask.any(1)).any())
