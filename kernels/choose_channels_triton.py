"""`choose_channels` in Triton: extremes of pieces of the tokens, then one program a sequence that ranks channels by counting."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vidkv_kernels.choose_channels import check_choice
from vidkv_kernels.span import Span

PIECE = 256
TOKENS = 64


def choose_channels(states: torch.Tensor, span: Span, wide_channels: int) -> torch.Tensor:
    """See `choose_channels_reference`."""
    check_choice(states, span, wide_channels)
    batch, heads, tokens, width = states.shape
    pieces = triton.cdiv(tokens, PIECE)
    block_width = triton.next_power_of_2(width)
    extremes = torch.empty(2, batch, heads * pieces, width, dtype=torch.float32, device=states.device)
    order = torch.empty(batch, width, dtype=torch.int32, device=states.device)
    _extremes_kernel[(pieces, batch * heads)](
        states, *states.stride()[:3], span.begin, span.count, extremes, extremes.stride(0), heads,
        WIDTH=width, BLOCK_WIDTH=block_width, TOKENS=TOKENS, PIECE=PIECE, num_warps=4,
    )  # fmt: skip
    _order_kernel[(batch,)](
        extremes, extremes.stride(0), order, heads * pieces, wide_channels,
        WIDTH=width, BLOCK_WIDTH=block_width, ROWS=32, num_warps=8,
    )  # fmt: skip
    return order


@triton.jit
def _extremes_kernel(
    states_ptr, batch_stride, head_stride, token_stride, begin_ptr, count_ptr, extremes_ptr, extremes_stride, heads,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TOKENS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    count = tl.load(count_ptr + batch)
    begin = tl.load(begin_ptr + batch)
    width = tl.arange(0, BLOCK_WIDTH)
    states_ptr += batch * batch_stride + head * head_stride
    low = tl.full([BLOCK_WIDTH], float("inf"), tl.float32)
    high = tl.full([BLOCK_WIDTH], float("-inf"), tl.float32)
    first = tl.program_id(0) * PIECE
    for offset in range(0, PIECE, TOKENS):
        token = first + offset + tl.arange(0, TOKENS)
        inside = (token < count)[:, None] & (width < WIDTH)[None, :]
        places = (token + begin).to(tl.int64)[:, None] * token_stride + width[None, :]
        states = tl.load(states_ptr + places, mask=inside, other=0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(inside, states, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(inside, states, float("-inf")), axis=0))
    place = (row * tl.num_programs(0) + tl.program_id(0)) * WIDTH + width
    tl.store(extremes_ptr + place, low, mask=width < WIDTH)
    tl.store(extremes_ptr + extremes_stride + place, high, mask=width < WIDTH)


@triton.jit
def _order_kernel(
    extremes_ptr, extremes_stride, order_ptr, pieces, wide_channels,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_WIDTH)
    is_channel = channel < WIDTH
    low = tl.full([BLOCK_WIDTH], float("inf"), tl.float32)
    high = tl.full([BLOCK_WIDTH], float("-inf"), tl.float32)
    for start in range(0, pieces, ROWS):
        piece = start + tl.arange(0, ROWS)
        inside = (piece < pieces)[:, None] & is_channel[None, :]
        place = (batch * pieces + piece)[:, None] * WIDTH + channel[None, :]
        low = tl.minimum(low, tl.min(tl.load(extremes_ptr + place, mask=inside, other=float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.load(extremes_ptr + extremes_stride + place, mask=inside, other=float("-inf")), axis=0))
    # Without tokens all widths are equal; places beyond the channels stand last.
    width = tl.where(is_channel, tl.maximum(high - low, 0.0), -1.0)
    other = tl.arange(0, BLOCK_WIDTH)
    is_same = other[:, None] == channel[None, :]
    is_before = other[:, None] < channel[None, :]
    other_width = tl.sum(tl.where(is_same, width[None, :], 0.0), axis=1)[:, None]
    is_wider = (other_width > width[None, :]) | ((other_width == width[None, :]) & is_before)
    is_wide = (tl.sum(is_wider.to(tl.int32), axis=0) < wide_channels).to(tl.int32)
    other_is_wide = tl.sum(tl.where(is_same, is_wide[None, :], 0), axis=1)[:, None]
    wide_before = tl.sum(tl.where(is_before, other_is_wide, 0), axis=0)
    position = tl.where(is_wide != 0, wide_before, wide_channels + channel - wide_before)
    tl.store(order_ptr + batch * WIDTH + position, channel, mask=is_channel)
