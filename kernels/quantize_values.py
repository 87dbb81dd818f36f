"""Quantize values and pack them into buffers of `packed.PackedValues`, with the rules of `encode`.

The kind of code follows from the buffers: 3 levels are ternary, a kind minimum is min-max, any other is sign. A group is S tokens
of one channel (per_channel) or S channels of one token (per_token). Only words and metadata of the span are written.
"""

from __future__ import annotations

import torch

from vidkv_kernels.encode import encode_minmax, encode_sign, encode_ternary
from vidkv_kernels.op import Op
from vidkv_kernels.packed import PackedValues, pack_words
from vidkv_kernels.packing import pack
from vidkv_kernels.span import Span, check_states


def quantize_values_reference(states: torch.Tensor, span: Span, threshold: float, values: PackedValues) -> PackedValues:
    """Quantize a span of values into buffers, entry after entry.

    Args:
        states: [B, H, T, D].
        span: tokens to take and entries to fill, multiples of 32 and of the group size if groups are per_channel.
        threshold: of ternary codes, in units of the mean size of a group.
        values: buffers, written in place; their lengths are left as they are.
    Returns:
        `values`.
    Raises:
        ValueError: the buffers are of a kind that this operation does not make, or do not fit the states.
    """
    check_values(states, span, values)
    step = values.group_size if values.granularity == "per_channel" else 32
    for row, (begin, count, start) in enumerate(span.rows()):
        count -= count % step
        tokens = states[row, :, begin : begin + count].float()  # [H, count, D]
        if values.granularity == "per_channel":
            codes, *metadata = _encode(tokens.unflatten(1, (-1, values.group_size)), threshold, values, 2)
            codes, place = codes.flatten(1, 2), slice(start // step, (start + count) // step)
        else:
            codes, *metadata = _encode(tokens.unflatten(2, (-1, values.group_size)), threshold, values, 3)
            codes, place = codes.flatten(2, 3), slice(start, start + count)
        if values.is_bytes:
            values.codes[row, :, start : start + count] = pack(codes, 3)
        else:
            values.codes[row, :, start // 32 : (start + count) // 32] = pack_words(codes, values.nbits)
        for buffer, states_of_groups in zip((values.scale, values.offset), metadata, strict=True):
            if buffer is not None:
                buffer[row, :, place] = states_of_groups
    return values


def check_values(states: torch.Tensor, span: Span, values: PackedValues) -> None:
    """Raise a ValueError unless `quantize_values` can fill these buffers."""
    check_states("states", states, span, values.codes, values.width)
    allowed = {2: ("minimum", "mean", "none", "centred"), 3: ("centred",), 4: ("minimum",)}[values.levels]
    if values.offset_kind not in allowed:
        raise ValueError(f"values of {values.levels} levels have offset_kind {values.offset_kind!r}; allowed: {', '.join(allowed)}")
    if values.scale is None and values.levels != 3:
        raise ValueError(f"values.scale is None, for {values.levels} levels; only ternary codes can be without")
    for name in ("scale", "offset"):
        tensor = getattr(values, name)
        if tensor is not None and tensor.dtype != torch.float16:
            raise ValueError(f"values.{name} is {tensor.dtype}; this operation writes torch.float16")
    if values.granularity == "per_token" and values.group_size & (values.group_size - 1):
        raise ValueError(f"values.group_size is {values.group_size}; allowed per token: powers of two")


def _encode(
    groups: torch.Tensor, threshold: float, values: PackedValues, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    if values.levels == 3:
        return *encode_ternary(groups, threshold, dim), None
    if values.offset_kind == "minimum":
        return encode_minmax(groups, values.levels, dim)
    return encode_sign(groups, values.offset_kind, dim)


def make_values(
    batch: int, heads: int, entries: int, width: int, device: torch.device, *, levels: int, offset_kind: str,
    granularity: str = "per_channel", group_size: int = 32, is_scaled: bool = True, is_bytes: bool = False,
) -> PackedValues:  # fmt: skip
    """Make buffers for `entries` values of each sequence, none of them held yet."""
    nbits = 1 if levels == 2 else 2
    columns = (entries // group_size, width) if granularity == "per_channel" else (entries, width // group_size)
    metadata = {"dtype": torch.float16, "device": device}
    if is_bytes:
        codes = torch.empty(batch, heads, entries, -(-width // 5), dtype=torch.uint8, device=device)
    else:
        codes = torch.empty(batch, heads, entries // 32, nbits * width, dtype=torch.int32, device=device)
    return PackedValues(
        torch.zeros(batch, dtype=torch.int32, device=device), levels, offset_kind, granularity, group_size, width, codes,
        torch.empty(batch, heads, *columns, **metadata) if is_scaled else None,
        torch.empty(batch, heads, *columns, **metadata) if offset_kind in ("minimum", "mean") else None,
    )  # fmt: skip


def cases(device: torch.device) -> dict[str, tuple]:
    """Return awkward inputs of `quantize_values`; sums of their numbers are exact in any order."""
    half, single, brain = torch.float16, torch.float32, torch.bfloat16
    ternary = {"levels": 3, "offset_kind": "centred"}
    minmax = {"levels": 4, "offset_kind": "minimum"}
    calls = {
        "ternary": (half, [0], [64], [0], ternary),
        "ternary after entries held, other tokens before": (single, [3], [32], [64], ternary),
        "ternary without scale": (half, [0], [32], [0], {**ternary, "is_scaled": False}),
        "ternary, five a byte": (half, [1], [64], [32], {**ternary, "is_bytes": True}),
        "ternary per token": (half, [0], [96], [0], {**ternary, "granularity": "per_token"}),
        "sequences of different length, one empty": (brain, [0, 5, 70], [96, 0, 45], [0, 64, 32], ternary),
        "more tokens than one program takes": (half, [0], [160], [0], ternary),
        "min-max of 2 bits": (half, [0], [64], [0], minmax),
        "min-max of 2 bits per token": (half, [2], [64], [32], {**minmax, "granularity": "per_token"}),
        "min-max of 1 bit per token": (single, [0], [32], [0], {"levels": 2, "offset_kind": "minimum", "granularity": "per_token"}),
        "signs around the mean, groups of 64": (half, [0], [64], [64], {"levels": 2, "offset_kind": "mean", "group_size": 64}),
        "signs, one level zero": (half, [0], [64], [0], {"levels": 2, "offset_kind": "none"}),
        "signs around zero, groups of 128": (half, [0], [128], [0], {"levels": 2, "offset_kind": "centred", "group_size": 128}),
    }
    return {name: _case(device, *call) for name, call in calls.items()}


def exact_states(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return multiples of 1/8 up to 4 in size, whose sums are exact, with a constant and a zero channel and equal sizes."""
    states = torch.randint(-32, 33, shape, generator=generator, device=generator.device) / 8
    states[..., 1], states[..., 2] = 2.5, 0
    states[..., 3] = states[..., 3].sign() * 1.5
    return states.to(dtype)


def _case(
    device: torch.device, dtype: torch.dtype, begin: list[int], count: list[int], start: list[int], form: dict
) -> tuple[torch.Tensor, Span, float, PackedValues]:
    generator = torch.Generator(device).manual_seed(0)
    room = max(first + number for first, number in zip(begin, count, strict=True)) + 1
    # Heads beside each other in a token, as a model makes them.
    states = exact_states(generator, dtype, len(begin), room, 2, 64).transpose(1, 2)
    values = make_values(len(begin), 2, 256, 64, device, **form)
    return states, Span.of(device, begin, count, start), 0.75, values


OP = Op("quantize_values", quantize_values_reference, cases, is_exact=True)
