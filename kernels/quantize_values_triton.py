"""`quantize_values` in Triton: one program for one group of tokens of a head, which are read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vidkv_kernels.encode_triton import encode_minmax, encode_sign, encode_ternary, pack_words
from vidkv_kernels.packed import PackedValues
from vidkv_kernels.quantize_values import check_values
from vidkv_kernels.span import Span


def quantize_values(states: torch.Tensor, span: Span, threshold: float, values: PackedValues) -> PackedValues:
    """See `quantize_values_reference`."""
    check_values(states, span, values)
    batch, heads, tokens, width = states.shape
    tile = values.group_size if values.granularity == "per_channel" else 32
    _quantize_values_kernel[(triton.cdiv(tokens, tile), batch * heads)](
        states, *states.stride()[:3], span.begin, span.count, span.start, threshold,
        values.codes, _or(values.scale, values.codes), _or(values.offset, values.codes), heads, values.entries,
        LEVELS=values.levels, KIND=values.offset_kind, PER_TOKEN=values.granularity == "per_token", GROUP=values.group_size,
        IS_BYTES=values.is_bytes, HAS_SCALE=values.scale is not None, HAS_OFFSET=values.offset is not None,
        WIDTH=width, BLOCK_WIDTH=triton.next_power_of_2(max(width, 16)), TOKENS=tile,
        num_warps=8 if tile == 128 else 4,
    )  # fmt: skip
    return values


def _or(tensor: torch.Tensor | None, absent: torch.Tensor) -> torch.Tensor:
    return absent if tensor is None else tensor


@triton.jit
def _quantize_values_kernel(
    states_ptr, batch_stride, head_stride, token_stride, begin_ptr, count_ptr, start_ptr, threshold,
    codes_ptr, scale_ptr, offset_ptr, heads, entries,
    LEVELS: tl.constexpr, KIND: tl.constexpr, PER_TOKEN: tl.constexpr, GROUP: tl.constexpr, IS_BYTES: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_OFFSET: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    NBITS: tl.constexpr = 1 if LEVELS == 2 else 2
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    first = tl.program_id(0) * TOKENS
    if first + TOKENS > tl.load(count_ptr + batch):
        return
    place = row * entries + tl.load(start_ptr + batch) + first
    token, width = tl.arange(0, TOKENS), tl.arange(0, BLOCK_WIDTH)
    in_width = (width < WIDTH)[None, :]
    states_ptr += batch * batch_stride + head * head_stride + (first + tl.load(begin_ptr + batch)).to(tl.int64) * token_stride
    states = tl.load(states_ptr + token[:, None] * token_stride + width[None, :], mask=in_width, other=0).to(tl.float32)
    if PER_TOKEN:
        DIM: tl.constexpr = 2
        COLUMNS: tl.constexpr = WIDTH // GROUP
        states = tl.reshape(states, [TOKENS, BLOCK_WIDTH // GROUP, GROUP])
        column = tl.arange(0, BLOCK_WIDTH // GROUP)[None, :]
        group_places = (place + token)[:, None] * COLUMNS + column
        is_group = column < COLUMNS
    else:
        DIM: tl.constexpr = 1
        states = states[None, :, :]
        group_places = place // GROUP * WIDTH + width[None, :]
        is_group = in_width
    if LEVELS == 3:
        codes, scale = encode_ternary(states, threshold, GROUP, DIM)
        offset = scale
    elif KIND == "minimum":
        codes, scale, offset = encode_minmax(states, LEVELS, DIM)
    else:
        codes, scale, offset = encode_sign(states, KIND == "mean", KIND != "none", GROUP, DIM)
    codes = tl.reshape(codes, [TOKENS, BLOCK_WIDTH])
    if IS_BYTES:
        BYTES: tl.constexpr = (WIDTH + 4) // 5
        # A byte is a sum of five codes times powers of three, exact as a matrix product.
        byte = tl.arange(0, BLOCK_WIDTH // 4)
        digit = width % 5
        power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
        powers = tl.where((width // 5)[:, None] == byte[None, :], power[:, None], 0)
        packed = tl.dot(tl.where(in_width, codes, 0).to(tl.float16), powers.to(tl.float16)).to(tl.int32).to(tl.uint8)
        tl.store(codes_ptr + (place + token)[:, None] * BYTES + byte[None, :], packed, mask=(byte < BYTES)[None, :])
    else:
        words = pack_words(codes, TOKENS, BLOCK_WIDTH, NBITS)
        rows = place // 32 * NBITS + tl.arange(0, TOKENS * NBITS // 32)
        tl.store(codes_ptr + rows[:, None] * WIDTH + width[None, :], words, mask=in_width)
    if HAS_SCALE:
        tl.store(scale_ptr + group_places, scale.to(tl.float16), mask=is_group)
    if HAS_OFFSET:
        tl.store(offset_ptr + group_places, offset.to(tl.float16), mask=is_group)
