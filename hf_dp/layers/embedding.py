"""Rules for lookup tables: Embedding, and the relative position bias of T5-like attention."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from hf_dp.layers.base import positions, trains
from hf_dp.layers.factors import Factor, OneHot, Vec, wide


def embedding(
    module: nn.Module, inputs: Tensor, output_grads: Tensor, num_units: int
) -> Iterator[tuple[nn.Parameter, Factor]]:
    """`torch.nn.Embedding`: row ``ids[b, t]`` of the table gets ``g[b, t]``; a padding row nothing."""
    weight = module._parameters.get("weight")
    if not trains(weight):
        return
    g = positions(output_grads, num_units)
    ids = inputs.reshape(num_units, -1).contiguous()
    padding = getattr(module, "padding_idx", None)
    if padding is not None:
        g = g.masked_fill((ids == padding)[:, :, None], 0)
    yield weight, OneHot(ids, g, weight.shape[0])


def relative_bias(
    module: nn.Module, inputs: Tensor, output_grads: Tensor, num_units: int
) -> Iterator[tuple[nn.Parameter, Factor]]:
    """The table behind ``compute_bias``: buckets ``(q, k)`` for all units, gradients ``(B, H, q, k)``."""
    weight = module.get_parameter("relative_attention_bias.weight")
    if not trains(weight):
        return
    g = wide(output_grads).permute(0, 2, 3, 1).flatten(1, 2)  # (B, q * k, H)
    table = g.new_zeros(num_units, *weight.shape)
    yield weight, Vec(table.index_add_(1, inputs.flatten(), g))


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether `embedding` covers this table's options."""
    return (
        isinstance(module, nn.Embedding)
        and module.max_norm is None
        and not module.scale_grad_by_freq
    )
