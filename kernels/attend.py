"""One decode step of grouped-query attention over a packed cache: out = softmax(scaling * q . k) v over all tokens of a layer.

Keys and values are those of `packed.PackedLayer`: prefix and residual as they are, history as its codes mean. Query head h
reads key/value head h // (HQ / H). A sequence without any token gets zeros.
"""

from __future__ import annotations

import torch

from vidkv_kernels.op import Op
from vidkv_kernels.packed import PackedKeys, PackedLayer, Segment, check
from vidkv_kernels.random_layer import random_layer


def attend_reference(query: torch.Tensor, layer: PackedLayer, scaling: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Attend with one new token of each sequence.

    Args:
        query: [B, HQ, 1, D], after rotary embedding.
        layer: what is attended to, H key/value heads; HQ is a multiple of H.
        scaling: factor of the scores, 1 / sqrt(D) in most models.
        dtype: of the computation and of the result; None: that of the query. The softmax is computed in float32 at least.
    Returns:
        [B, HQ, 1, D].
    Raises:
        ValueError: the query does not fit the layer.
    """
    check_query(query, layer)
    dtype = dtype or query.dtype
    heads, width = layer.residual.keys.shape[1], query.shape[3]
    queries = query.to(dtype).reshape(query.shape[0], heads, -1, width)
    scores, values, is_held = [], [], []
    for part in (layer.prefix, layer.residual):
        if part is not None:
            scores.append(queries @ part.keys.to(dtype).transpose(-1, -2))
            is_held.append(_is_held(part.lengths, part.keys.shape[2]))
            values.append(part.values.to(dtype))
    if layer.keys is not None:
        history = _history_scores(queries, layer.keys)
        for run in layer.values:
            is_held.append(_is_held(run.lengths, run.entries))
            values.append(run.decode(dtype))
            scores.append(history[..., : run.entries] if run.tokens is None else _take(history, run.tokens, is_held[-1]))
    held = torch.cat(is_held, dim=-1)[:, None, None, :]
    # What lies beyond the lengths may be anything, NaN as well.
    all_scores = torch.where(held, torch.cat(scores, dim=-1) * scaling, float("-inf"))
    all_values = torch.where(held.transpose(-1, -2), torch.cat(values, dim=2), 0)
    exact = torch.promote_types(dtype, torch.float32)
    weights = torch.where(held, all_scores.to(exact).softmax(dim=-1), 0).to(dtype)
    return (weights @ all_values).reshape(query.shape)


def check_query(query: torch.Tensor, layer: PackedLayer) -> None:
    """Raise a ValueError unless `attend` can take this query."""
    batch, heads, _, width = layer.residual.keys.shape
    check("query", query, (batch, None, 1, width), layer.residual.keys.dtype, layer.device)
    if query.shape[1] % heads:
        raise ValueError(f"query has {query.shape[1]} heads; allowed: multiples of {heads}, the key/value heads")


def _history_scores(queries: torch.Tensor, keys: PackedKeys) -> torch.Tensor:
    mapped = queries
    if keys.order is not None:
        mapped = mapped.gather(-1, keys.order.long().unsqueeze(2).expand(mapped.shape))
    if keys.matrix is not None:
        mapped = mapped @ keys.matrix.to(queries.dtype)
    scores = mapped @ keys.decode(queries.dtype).transpose(-1, -2)
    return scores if keys.center is None else scores + queries @ keys.center.to(queries.dtype).unsqueeze(-1)


def _is_held(lengths: torch.Tensor, room: int) -> torch.Tensor:
    return torch.arange(room, device=lengths.device) < lengths[:, None]


def _take(history: torch.Tensor, tokens: torch.Tensor, is_held: torch.Tensor) -> torch.Tensor:
    index = torch.where(is_held, tokens, 0).long()[:, None, None, :]
    return history.gather(-1, index.expand(*history.shape[:3], -1))


def cases(device: torch.device) -> dict[str, tuple]:
    """Return awkward inputs of `attend`."""
    half, single, brain = torch.float16, torch.float32, torch.bfloat16
    minmax = (Segment(64, 2, "minimum"),)
    one_bit = (Segment(64, 1, "minimum"),)
    published = (Segment(32, 2, "minimum"), Segment(17, 1, "none"), Segment(15, 1, "centred"))
    few_wide = (Segment(12, 2, "minimum"), Segment(52, 1, "centred"))
    ternary = (Segment(7, 2, "mean"), Segment(58, 2, "mean", is_ternary=True), Segment(6, 2, "centred"))
    few_ternary = (Segment(20, 2, "minimum"), Segment(12, 2, "centred", is_ternary=True), Segment(32, 1, "centred"))
    four_bits = {"metadata": torch.uint8}
    doubled = (Segment(32, 2, "minimum"), Segment(33, 1, "none"), Segment(31, 1, "centred"))
    calls = {
        "one token in the residual, nothing else": (half, [0], [1], {"segments": None}),
        "nothing at all in one sequence": (single, [0, 32], [0, 0], {}),
        "lengths that fill neither groups nor blocks": (half, [33, 95], [1, 63], {"room": 128}),
        "query groups of 7": (half, [96], [17], {"query_heads": 14, "heads": 2}),
        "query groups of 20": (half, [64], [2], {"query_heads": 20}),
        "query groups of 1": (single, [64, 128], [3, 0], {"heads": 2}),
        "min-max keys, values per token": (half, [256], [9], {"segments": minmax, "values": ("per_token", 4, "minimum")}),
        "keys and values of 1 bit": (single, [160], [5], {"segments": one_bit, "values": ("per_token", 2, "minimum")}),
        "as published": (single, [96, 64], [2, 40], {"segments": published, "values": ("per_channel", 3, "unscaled")}),
        "as published, values per token": (half, [64], [3], {"segments": published, "values": ("per_token", 3, "unscaled")}),
        "ternary values per token": (half, [64, 96], [3, 3], {"values": ("per_token", 3, "centred")}),
        "signs without mean, few wide channels": (half, [128], [31], {"segments": few_wide}),
        "more key channels than the query has": (half, [64], [12], {"segments": doubled}),
        "groups of 128": (half, [256, 128], [7, 8], {"group_size": 128, "values": ("per_channel", 4, "minimum")}),
        "groups of 64, sign values": (single, [128], [4], {"group_size": 64, "values": ("per_channel", 2, "mean")}),
        "heads of 128 channels": (half, [96], [20], {"width": 128}),
        "channels in another order, not mapped": (half, [96, 64], [5, 2], {"segments": few_wide, "heads": 2, "maps": ("order",)}),
        "channels mapped, in their own order": (half, [64], [3], {"maps": ("matrix",)}),
        "five ternary values a byte": (half, [96, 32], [20, 1], {"values": ("per_channel", 3, "bytes")}),
        "protected tokens": (half, [192, 128], [6, 50], {"protected": [64, 32]}),
        "protected tokens in one sequence": (single, [96, 96], [1, 1], {"protected": [32, 0]}),
        "a prefix in full precision": (half, [64, 32], [10, 1], {"prefix": [4, 0]}),
        "float8 metadata and centred keys": (half, [128, 96], [33, 2], {"metadata": torch.float8_e4m3fn, "center": 2.0}),
        "float8 metadata per token": (
            half, [96], [1], {"metadata": torch.float8_e4m3fn, "values": ("per_token", 4, "minimum")}
        ),
        "ternary keys and values, 4-bit metadata": (
            half, [256, 33], [16, 2], {"segments": ternary, "values": ("per_channel", 3, "mean"), "heads": 2, **four_bits}
        ),
        "ternary keys and values, 4-bit metadata, groups of 64": (
            single, [192], [3], {"segments": ternary, "values": ("per_channel", 3, "mean"), "group_size": 64, **four_bits}
        ),
        "ternary keys": (half, [96], [5], {"segments": few_ternary}),
        "min-max keys and sign values, 4-bit metadata": (single, [96], [4], {"values": ("per_channel", 2, "mean"), **four_bits}),
        "protected tokens, 4-bit metadata": (half, [192, 128], [6, 50], {"protected": [64, 32], **four_bits}),
        "five ternary values a byte, 4-bit metadata": (half, [64], [4], {"values": ("per_channel", 3, "bytes"), **four_bits}),
        "a key channel far above all others": (brain, [128], [16], {"center": 40.0}),
        "sequences of very different length": (brain, [512, 0, 32], [40, 5, 64], {}),
    }
    return {name: _case(device, *arguments, **form) for name, (*arguments, form) in calls.items()}


def _case(
    device: torch.device, dtype: torch.dtype, history: list[int], residual: list[int], query_heads: int = 2, **form: object
) -> tuple[torch.Tensor, PackedLayer, float]:
    generator = torch.Generator(device).manual_seed(len(history) + sum(history) + sum(residual))
    layer = random_layer(generator, dtype, history, residual, **form)
    width = layer.residual.keys.shape[3]
    query = torch.randn(len(history), query_heads, 1, width, generator=generator, device=device).to(dtype)
    return query, layer, width**-0.5


OP = Op("attend", attend_reference, cases, is_exact=False)
