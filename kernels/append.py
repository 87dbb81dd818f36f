"""Move full residuals into the packed history, in place and without waiting for the device."""

from __future__ import annotations

import torch

from vidkv_kernels import quantize_keys, quantize_values
from vidkv_kernels.packed import PackedLayer
from vidkv_kernels.span import Span


def append_residual(
    layer: PackedLayer, residual_length: int, order: torch.Tensor, transform: torch.Tensor | None, threshold: float
) -> None:
    """Quantize the residual of each sequence that holds `residual_length` tokens, and empty it; others are left as they are.

    Lengths of history and residual are changed in place. No length is read, so room is the caller's to ensure.

    Args:
        layer: with keys, and one run of values in the order of tokens.
        residual_length: tokens of a full residual, a multiple of both group sizes.
        order, transform, threshold: as in `quantize_keys` and `quantize_values`.
    Raises:
        ValueError: the layer has no such history, or the residual no such room.
    """
    if len(layer.values) != 1 or layer.values[0].tokens is not None:
        raise ValueError(f"layer.values has {len(layer.values)} runs; append takes one run in the order of tokens")
    keys, values, residual = layer.keys, layer.values[0], layer.residual
    unit = max(keys.group_size, values.group_size if values.granularity == "per_channel" else 32)
    if residual_length % unit or not 0 < residual_length <= residual.keys.shape[2]:
        raise ValueError(f"residual_length is {residual_length}; allowed: multiples of {unit} up to {residual.keys.shape[2]}, the room")
    is_full = residual.lengths >= residual_length
    count = torch.where(is_full, residual_length, 0).int()
    span = Span(torch.zeros_like(count), count, values.lengths)
    quantize_keys.OP(residual.keys[:, :, :residual_length], span, order, transform, keys)
    quantize_values.OP(residual.values[:, :, :residual_length], span, threshold, values)
    values.lengths.add_(count)
    residual.lengths.sub_(count)
