"""What a model holds: parameters and buffers, whose values a forward pass must leave as they are.

Values are compared, not torch's counts of changes alone: what is written through ``.data``, a detached
tensor or a numpy view leaves no trace in a count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_dp.errors import PrivacyError
from hf_dp.layers.adapted_experts import is_wrapper

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORD = 8  # bytes
_PLAIN = (Tensor, nn.Parameter)
_COPIED = 1 << 18  # bytes; what is smaller is kept whole
_SUMMED = 1 << 15  # bytes of what is larger that make one sum


_MARK = "_hf_dp_holds_examples"  # on modules of which a drawn example changed a tensor


class _Kept(NamedTuple):
    """One tensor at one moment.

    Attributes:
        tensor: Itself.
        version: How often it was changed in place, as far as torch knows.
        form: Shape and type.
        is_saved: Whether a checkpoint has it.
    """

    tensor: Tensor
    version: int
    form: tuple[torch.Size, torch.dtype]
    is_saved: bool


class Held:
    """Parameters and buffers of a model at one moment.

    Small tensors are copied. Of those above 256 KB the bytes are added up as whole numbers, 32 KB to a sum:
    any one number that changes shows, and only an exchange of numbers inside 32 KB does not. That reads
    all weights once, at the speed of memory, where each micro-batch reads them three times at the least.
    """

    def __init__(self, model: nn.Module) -> None:
        """Note what `model` holds now."""
        self._kept = dict(_tensors(model))
        self._numbers = _Numbers({name: kept.tensor for name, kept in self._kept.items()})

    def refuse_changes(self, model: nn.Module) -> None:
        """Refuse what was changed since: it carries examples, unnoised, into later steps and files.

        A tensor that is not saved may be made anew or grow, as tables of positions do.

        Raises:
            PrivacyError: A number in a parameter or a buffer is another, or a saved one is new.
        """
        _refuse(self.changed_in(model))

    def changed_in(self, model: nn.Module) -> list[str]:
        """The names of those that would be refused."""
        now = Held(model)
        changed = [name for name, new in now._kept.items() if _is_other(self._kept.get(name), new)]
        changed += now._numbers.other_than(self._numbers)
        return changed


def _refuse(changed: Sequence[str]) -> None:
    if changed:
        raise PrivacyError(
            f"model.{changed[0]}: expected a tensor that the forward pass leaves as it is. It may "
            "gather statistics of private examples, neither clipped nor noised, and is saved with it. "
            "Load the model anew, and switch running statistics off (track_running_stats=False), or "
            "replace the layer."
        )


@contextlib.contextmanager
def holding_nothing(model: nn.Module) -> Iterator[None]:
    """Within it drawn examples go through `model`; what it keeps of them makes it of no use from then on.

    Raises:
        PrivacyError: See `Held.refuse_changes`; or it kept something of an earlier draw.
    """
    for name, module in model.named_modules():
        if _MARK in vars(module):
            raise PrivacyError(
                f"model.{name}: expected a layer that holds nothing of any example. An earlier step "
                "was refused because drawn examples had changed its tensors, neither clipped nor noised. "
                "Load the model anew, and switch off or replace what gathers statistics."
            )
    before = Held(model)
    try:
        yield
    finally:
        changed = before.changed_in(model)
        for name in changed:
            vars(model.get_submodule(name.rpartition(".")[0]))[_MARK] = True
        _refuse(changed)


def _tensors(model: nn.Module) -> Iterator[tuple[str, _Kept]]:
    put_back = set(map(id, _put_back_by_peft(model)))
    for name, parameter in model.named_parameters():
        kept = _noted(parameter, is_saved=True)
        yield name, kept._replace(version=0) if id(parameter) in put_back else kept
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                saved = name not in module._non_persistent_buffers_set
                yield f"{prefix}.{name}" if prefix else name, _noted(buffer, is_saved=saved)


def _put_back_by_peft(model: nn.Module) -> Iterator[Tensor]:
    """What ``LoraConfig(target_parameters=)`` adapts: each call puts it back, as a change."""
    for module in model.modules():
        if is_wrapper(module):
            yield module.get_param()  # type: ignore[operator]


def _noted(tensor: Tensor, *, is_saved: bool) -> _Kept:
    version = 0 if tensor.is_inference() else tensor._version
    return _Kept(tensor, version, (tensor.shape, tensor.dtype), is_saved)


def _is_other(old: _Kept | None, new: _Kept) -> bool:
    """Whether a change shows without a look at the numbers."""
    if old is None:
        return new.is_saved
    if old.tensor is new.tensor:
        return old.version != new.version or old.form != new.form
    return new.is_saved and old.form != new.form


class _Numbers:
    """The numbers of tensors, read as whole numbers: even what stands for nan is equal to itself then.

    Attributes:
        wholes: Those of all tensors of one type on one device, in a row: few, so that they are compared fast.
        of: Name, or name/part -> its share of them.
    """

    @torch.no_grad()
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            for place, flat in numbers_of(name, tensor):
                groups.setdefault((flat.device, flat.dtype), {})[place] = flat
        self.wholes: list[Tensor] = []
        self.of: dict[str, Tensor] = {}
        for parts in groups.values():
            whole = torch.cat(list(parts.values()))  # a copy
            shares = whole.split([len(flat) for flat in parts.values()])
            self.wholes.append(whole)
            self.of |= dict(zip(parts, shares, strict=True))

    def other_than(self, before: _Numbers) -> list[str]:
        """The names of those whose numbers are others; where sizes differ, there is nothing to compare."""
        if list(self.of) == list(before.of) and all(map(torch.equal, self.wholes, before.wholes)):
            return []
        return [
            place.partition("/")[0]
            for place, new in self.of.items()
            if (old := before.of.get(place)) is not None
            and new.shape == old.shape
            and not torch.equal(new, old.to(new.device))
        ]


def numbers_of(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """The numbers of a tensor, in one dimension, as whole numbers: all of them, or sums and the rest."""
    if type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from numbers_of(f"{name}/{part}", getattr(tensor, part))
    elif tensor.layout == torch.sparse_coo:
        yield from numbers_of(f"{name}/indices", tensor._indices())
        yield from numbers_of(f"{name}/values", tensor._values())
    elif tensor.layout != torch.strided:
        yield from numbers_of(f"{name}/dense", tensor.to_dense())
    elif tensor.device.type != "meta":
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        flat = real.reshape(-1).view(_WHOLE[real.element_size()])
        yield from _summed(name, flat) if flat.nbytes > _COPIED else [(name, flat)]


def _summed(name: str, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    if flat.storage_offset() * flat.element_size() % _WORD:
        flat = flat.clone()  # begins in the middle of a word
    end = flat.nbytes // _SUMMED * _SUMMED // flat.element_size()
    yield f"{name}/sums", flat[:end].view(torch.int64).view(-1, _SUMMED // _WORD).sum(1)
    yield f"{name}/rest", flat[end:]
