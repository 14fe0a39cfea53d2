"""Models whose parameters FSDP2 keeps in shards: what their modules use, and each rank's part of a sum.

Only while it runs has a module its parameters whole, in tensors of their own, and those are what an
engine works with. Every rank clips its own examples by their own norms; a parameter's sum is then added
up over the ranks and cut into the parameter's shards, as a gradient would be. The ranks run the model
together, so whatever decides how often it runs is decided together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hf_dp.engines.rows import batch_size, select_rows
from hf_dp.engines.walk import named_modules_of, named_parameters_of
from hf_dp.errors import ConfigurationError, UncoveredParameterError, explain

_WHOLE = (
    WeakTensorKeyDictionary()
)  # sharded parameter -> the tensor in its place while its module runs
_ROWS = 3  # of the first rank's examples, with which a model is looked over


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 (``fully_shard``) keeps some of the model's parameters."""
    return bool(_groups(model))


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter as its module uses it; for a model in one piece, the parameter itself."""
    kept = _kept(model)
    if not _groups(model):
        return kept
    if any(_is_shard(p) and p not in _WHOLE for p in kept.values()):
        for group in _groups(model):
            group.unshard()
            for name, parameter in model.named_parameters():
                if parameter is not kept[name]:
                    _WHOLE[kept[name]] = parameter
            group.reshard()
    return {name: whole_parameter(parameter) for name, parameter in kept.items()}


def whole_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter as its module uses it, once `whole_parameters` has seen the model."""
    whole: nn.Parameter = _WHOLE.get(parameter, parameter) if _is_shard(parameter) else parameter
    return whole


@contextlib.contextmanager
def unsharded(model: nn.Module, name: str) -> Iterator[None]:
    """The parameters of the module `name` whole, as long as the context lasts."""
    groups = {id(group): group for group in _groups(model)}
    above = [name.rsplit(".", dots)[0] for dots in range(name.count(".") + 1)] if name else []
    owners = [
        groups[key] for place in (*above, "") if (key := id(model.get_submodule(place))) in groups
    ]
    if not owners:
        yield
        return
    owners[0].unshard()
    try:
        yield
    finally:
        owners[0].reshard()


@contextlib.contextmanager
def left_in_shards(model: nn.Module) -> Iterator[None]:
    """Put parameters back in shards afterwards; the outermost would wait for a backward pass."""
    try:
        yield
    finally:
        for group in _groups(model):
            group.reshard()


class Ranks:
    """The ranks that run a model together; this process alone for a model in one piece."""

    def __init__(self, model: nn.Module | None = None) -> None:
        """Note where the model's parameters are kept."""
        self.together = model is not None and is_sharded(model)
        self._kept = {} if model is None or not self.together else _kept(model)

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on one of them."""
        return any(_from_all(flag)) if self.together else flag

    def agree(self, value: object) -> bool:
        """Whether all of them have the same `value`."""
        return not self.together or all(other == value for other in _from_all(value))

    def raise_any(self, failed: UncoveredParameterError | None) -> None:
        """Raise what went wrong here, or, where it went wrong on another rank alone, say so.

        Raises:
            UncoveredParameterError: Some rank cannot tell its examples apart.
        """
        if not self.any(failed is not None):
            return
        try:
            raise failed or UncoveredParameterError(
                "a model under FSDP: expected every rank to tell its examples apart, and another one "
                "could not. Its sum would be missing. See that rank's message."
            )
        finally:
            failed = None  # its traceback leads here, and with it the graph would stay

    def check_equal(self, num_units: int) -> None:
        """Refuse micro-batches of different sizes, on every rank alike.

        Raises:
            ConfigurationError: Another rank has another number of examples.
        """
        if not self.agree(num_units):
            raise ConfigurationError(
                explain(
                    "clipped_sum.batch",
                    num_units,
                    "as many examples on every rank of a model under FSDP",
                    "The ranks run the model together, and would wait for one another for ever.",
                    "Fill up with examples without labels (all -100): they add nothing.",
                )
            )

    def own_parts(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's shards of sums over the examples of all: ``DTensor``s placed as the parameters.

        Args:
            sums: Parameter name -> sum over this rank's examples, the parameter's whole shape, the same
                names in the same order on every rank; what is in shards already stays as it is.
        """
        if not self.together:
            return dict(sums)
        return {name: self._own_part(name, total) for name, total in sums.items()}

    def _own_part(self, name: str, total: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial

        if isinstance(total, DTensor):
            return total
        kept: Any = self._kept[name]
        if not _is_shard(kept):
            raise ConfigurationError(
                f"parameter {name!r}: expected it in shards, like the others. A parameter outside "
                "fully_shard has a copy on every rank, whose noise would differ. "
                "Call fully_shard on the whole model last."
            )
        mesh = kept.device_mesh
        summands = DTensor.from_local(total, mesh, [Partial()] * mesh.ndim)
        part: Tensor = summands.redistribute(mesh, kept.placements)
        return part


def first_rows(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Examples to look the model over with: of a sharded one the first rank's, on all ranks."""
    if not is_sharded(model):
        return inputs
    device = next(model.parameters()).device
    parcel: list[Any] = [select_rows(inputs, [row % batch_size(inputs) for row in range(_ROWS)])]
    dist.broadcast_object_list(parcel, src=0, device=None if device.type == "cpu" else device)
    rows: Mapping[str, Any] = parcel[0]
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in rows.items()}


def refuse_sharded(
    model: nn.Module, engine: str, why: str, remedy: str = "Use engine='two_pass'."
) -> None:
    """Refuse an engine that does not know of other ranks.

    Raises:
        ConfigurationError: The model is sharded.
    """
    if is_sharded(model):
        raise ConfigurationError(
            explain(
                "clipped_sum.engine",
                engine,
                "'two_pass' or 'auto', and single examples, for a model under FSDP",
                why,
                remedy,
            )
        )


def _kept(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters as the optimizer has them."""
    for group in _groups(model):
        group.reshard()  # after a forward without a backward pass some are still whole
    return named_parameters_of(model)


def _groups(model: nn.Module) -> Sequence[Any]:
    if not dist.is_available() or not dist.is_initialized():
        return ()
    from torch.distributed.fsdp import FSDPModule

    return [module for module in named_modules_of(model) if isinstance(module, FSDPModule)]


def _is_shard(parameter: Tensor) -> bool:
    return hasattr(parameter, "placements")


def _from_all(value: object) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
