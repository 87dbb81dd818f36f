"""`quantize_keys` in Triton: one program for 64 or 128 tokens of a head, which are read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vidkv_kernels.encode_triton import encode_minmax, encode_sign
from vidkv_kernels.packed import PackedKeys
from vidkv_kernels.quantize_keys import check_keys, normal_kinds
from vidkv_kernels.span import Span


def quantize_keys(
    states: torch.Tensor, span: Span, order: torch.Tensor, transform: torch.Tensor | None, keys: PackedKeys
) -> PackedKeys:
    """See `quantize_keys_reference`."""
    check_keys(states, span, order, transform, keys)
    batch, heads, tokens, _ = states.shape
    normal = keys.channels - keys.wide_channels
    tile = max(64, keys.group_size)
    _quantize_keys_kernel[(triton.cdiv(tokens, tile), batch * heads)](
        states, *states.stride()[:3], span.begin, span.count, span.start, order, order if transform is None else transform,
        keys.codes, keys.scale, keys.codes if keys.offset is None else keys.offset, heads, keys.codes.shape[2] * 32,
        WIDE=keys.wide_channels, BLOCK_WIDE=triton.next_power_of_2(max(keys.wide_channels, 16)),
        NORMAL=normal, BLOCK_NORMAL=triton.next_power_of_2(max(normal, 16)), STORED=keys.stored_offsets,
        KIND=(normal_kinds(keys) or ("",))[0], HAS_TRANSFORM=transform is not None, GROUP=keys.group_size, TOKENS=tile,
        # 16-bit states are exact in TF32; its three terms then keep the accuracy of float32.
        PRECISION="ieee" if states.dtype == torch.float32 else "tf32x3",
        num_warps=tile // 16,
    )  # fmt: skip
    return keys


@triton.jit
def _store(
    codes, scale, offset, codes_ptr, scale_ptr, offset_ptr, place, first, count,
    FIRST_WORD: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, HAS_OFFSET: tl.constexpr,
    NBITS: tl.constexpr, WORDS: tl.constexpr, CHANNELS: tl.constexpr, STORED: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    PER_WORD: tl.constexpr = 32 // NBITS
    channel = tl.arange(0, BLOCK)[:, None]
    digits = tl.reshape(codes, [BLOCK, TOKENS // PER_WORD, PER_WORD])
    words = tl.sum(digits << (NBITS * tl.arange(0, PER_WORD))[None, None, :], axis=2)
    part = tl.arange(0, TOKENS // PER_WORD)
    column = FIRST_WORD + (part % NBITS * COUNT)[None, :] + channel
    is_word = (first + part * PER_WORD < count)[None, :] & (channel < COUNT)
    tl.store(codes_ptr + (place // 32 + part // NBITS)[None, :] * WORDS + column, words, mask=is_word)
    group = tl.arange(0, TOKENS // GROUP)
    is_group = (first + group * GROUP < count)[None, :] & (channel < COUNT)
    row = (place // GROUP + group)[None, :]
    tl.store(scale_ptr + row * CHANNELS + FIRST + channel, scale.to(tl.float16), mask=is_group)
    if HAS_OFFSET:
        tl.store(offset_ptr + row * STORED + FIRST + channel, offset.to(tl.float16), mask=is_group)


@triton.jit
def _quantize_keys_kernel(
    states_ptr, batch_stride, head_stride, token_stride, begin_ptr, count_ptr, start_ptr, order_ptr, transform_ptr,
    codes_ptr, scale_ptr, offset_ptr, heads, tokens,
    WIDE: tl.constexpr, BLOCK_WIDE: tl.constexpr, NORMAL: tl.constexpr, BLOCK_NORMAL: tl.constexpr, STORED: tl.constexpr,
    KIND: tl.constexpr, HAS_TRANSFORM: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Tiles are [channels, tokens], so that most of a group lies in one thread.
    CHANNELS: tl.constexpr = WIDE + NORMAL
    WORDS: tl.constexpr = 2 * WIDE + NORMAL
    GROUPS: tl.constexpr = TOKENS // GROUP
    batch, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1).to(tl.int64) % heads
    first = tl.program_id(0) * TOKENS
    count = tl.load(count_ptr + batch)
    count -= count % GROUP
    if first >= count:
        return
    place = tl.program_id(1).to(tl.int64) * tokens + tl.load(start_ptr + batch) + first
    token = tl.arange(0, TOKENS)
    is_token = (first + token < count)[None, :]
    states_ptr += batch * batch_stride + head * head_stride + (first + tl.load(begin_ptr + batch)).to(tl.int64) * token_stride
    position = token[None, :] * token_stride
    order_ptr += batch * CHANNELS
    if WIDE:
        channel = tl.arange(0, BLOCK_WIDE)
        in_wide = channel < WIDE
        source = tl.load(order_ptr + channel, mask=in_wide, other=0)
        states = tl.load(states_ptr + position + source[:, None], mask=is_token & in_wide[:, None], other=0).to(tl.float32)
        codes, scale, offset = encode_minmax(tl.reshape(states, [BLOCK_WIDE, GROUPS, GROUP]), 4, 2)
        _store(
            codes, scale, offset, codes_ptr, scale_ptr, offset_ptr, place, first, count,
            0, 0, WIDE, BLOCK_WIDE, True, 2, WORDS, CHANNELS, STORED, GROUP, TOKENS,
        )  # fmt: skip
    if NORMAL:
        normal = tl.arange(0, BLOCK_NORMAL)
        in_normal = normal < NORMAL
        source = tl.load(order_ptr + WIDE + normal, mask=in_normal, other=0)
        states = tl.load(states_ptr + position + source[:, None], mask=is_token & in_normal[:, None], other=0).to(tl.float32)
        if HAS_TRANSFORM:
            inside = in_normal[:, None] & in_normal[None, :]
            transposed = tl.load(transform_ptr + normal[:, None] + normal[None, :] * NORMAL, mask=inside, other=0)
            states = tl.dot(transposed, states, input_precision=PRECISION)
        groups = tl.reshape(states, [BLOCK_NORMAL, GROUPS, GROUP])
        if KIND == "minimum":
            codes, scale, offset = encode_minmax(groups, 2, 2)
        else:
            codes, scale, offset = encode_sign(groups, KIND == "mean", KIND != "none", GROUP, 2)
        _store(
            codes, scale, offset, codes_ptr, scale_ptr, offset_ptr, place, first, count,
            2 * WIDE, WIDE, NORMAL, BLOCK_NORMAL, KIND == "minimum" or KIND == "mean", 1, WORDS, CHANNELS, STORED, GROUP, TOKENS,
        )  # fmt: skip
