"""What a step costs, counted instead of timed: FLOPs, kernels, and the peak of live tensor bytes.

The counts are deterministic, so tests can bound them (tests/engines/test_cost.py).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
Step = Callable[[], object]


@dataclass(frozen=True)
class Cost:
    """What one step needs.

    Attributes:
        flops: Of matrix products, attention and convolutions, two for each multiply-add.
        kernels: Operations that compute or copy; views and allocations are free.
        peak_bytes: Largest total size of the tensors that the step made and that were alive at once;
            gradients count, the model and its batch do not, nor does workspace inside a kernel.
    """

    flops: int
    kernels: int
    peak_bytes: int

    def over(self, other: Cost) -> dict[str, float]:
        """Each count as a multiple of the other's."""
        mine, theirs = asdict(self), asdict(other)
        return {name: mine[name] / theirs[name] for name in mine}


def cost_of(step: Step) -> Cost:
    """Run `step` three times: once to warm up, then under each counter; its result is kept alive."""
    step()
    # additions in place are missing from torch's own table
    in_place = {aten.addmm_: _addmm_flops, aten.baddbmm_: _baddbmm_flops}
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping={**in_place, **attention}) as flops:
        step()
    counter = _counted(step)
    return Cost(flops.get_total_flops(), counter.kernels, counter.peak)


def peak_of(step: Step) -> int:
    """`Cost.peak_bytes` alone; the step runs twice."""
    step()
    return _counted(step).peak


def _counted(step: Step) -> Counter:
    gc.collect()
    counter = Counter()
    with counter:
        result = step()
    del result
    return counter


def _addmm_flops(_: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])


def _baddbmm_flops(_: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * a[0] * a[1] * a[2] * b[2])


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, positions, width = query
    return int(2 * batch * heads * positions * key[2] * (width + value[3]))


def _attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    return 5 * _attention_flops(query, key, value) // 2  # scores again, and four gradients


class Counter(TorchDispatchMode):
    """Counts kernels and follows the storages that were made while it was on.

    Attributes:
        kernels: How many operations computed or copied.
        names: How often each operation was called.
        peak: The largest total of live bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = 0
        self.live = 0
        self.peak = 0
        self.names: dict[str, int] = {}
        self._known: dict[int, weakref.ref[Any]] = {}
        self._outside: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._outside.add(tensor.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        self.names[str(func)] = self.names.get(str(func), 0) + 1
        self.kernels += _computes(func)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._outside:
            return

        def freed(_: object) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def _computes(func: Any) -> bool:
    """Whether an operation is more than a view or an allocation."""
    schema = func._schema
    returns_view = any(
        r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
    )
    name = schema.name.removeprefix("aten::")
    return not returns_view and name not in _FREE


_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "_local_scalar_dense",
    "is_nonzero",
    "set_data",
    "sym_size",
    "_reshape_alias",
}
