"""Operations of a run, two for each multiply-add of its products, attention and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_ATEN = torch.ops.aten
Shape = tuple[int, ...]


def counted(run: Callable[[], object]) -> float | None:
    """Operations of `run`; None where the counter's own hooks cannot follow its graph."""
    counter = FlopCounterMode(display=False, custom_mapping=_MISSING)
    try:
        with counter:
            run()
    except (RuntimeError, AssertionError):
        return None
    return float(counter.get_total_flops())


def _mv(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1]


def _addmm(_: Shape, a: Shape, b: Shape, *__: Any, **___: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _baddbmm(_: Shape, a: Shape, b: Shape, *__: Any, **___: Any) -> int:
    return 2 * a[0] * a[1] * a[2] * b[2]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    batch, heads, positions, width = query
    return 2 * batch * heads * positions * key[2] * (width + value[3])


def _attention_backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    return 5 * _attention(query, key, value) // 2  # scores again, and four gradients


# What torch's own table leaves out.
_MISSING = {
    _ATEN.mv: _mv,
    _ATEN.addmm_: _addmm,
    _ATEN.baddbmm_: _baddbmm,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
