"""`choose_channels` in Triton: atomic maxima over pieces of the tokens, then one program a sequence that ranks by counting."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vidkv_kernels.choose_channels import check_choice
from vidkv_kernels.span import Span

TOKENS = 64


def choose_channels(states: torch.Tensor, span: Span, wide_channels: int) -> torch.Tensor:
    """See `choose_channels_reference`."""
    check_choice(states, span, wide_channels)
    batch, heads, tokens, width = states.shape
    block_width = triton.next_power_of_2(width)
    # Largest values of each channel, and largest values of its negative.
    extremes = torch.full((2, batch, width), float("-inf"), dtype=torch.float32, device=states.device)
    order = torch.empty(batch, width, dtype=torch.int32, device=states.device)
    _extremes_kernel[(triton.cdiv(tokens, TOKENS), batch * heads)](
        states, *states.stride()[:3], span.begin, span.count, extremes, extremes.stride(0), heads,
        WIDTH=width, BLOCK_WIDTH=block_width, TOKENS=TOKENS, num_warps=4,
    )  # fmt: skip
    _order_kernel[(batch,)](
        extremes, extremes.stride(0), order, wide_channels, WIDTH=width, BLOCK_WIDTH=block_width, num_warps=8
    )  # fmt: skip
    return order


@triton.jit
def _extremes_kernel(
    states_ptr, batch_stride, head_stride, token_stride, begin_ptr, count_ptr, extremes_ptr, extremes_stride, heads,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    count = tl.load(count_ptr + batch)
    token, width = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK_WIDTH)
    if tl.program_id(0) * TOKENS >= count:
        return
    # Tokens beyond the last one read it again.
    position = (tl.minimum(token, count - 1) + tl.load(begin_ptr + batch)).to(tl.int64)
    places = batch * batch_stride + head * head_stride + position[:, None] * token_stride + width[None, :]
    states = tl.load(states_ptr + places, mask=(width < WIDTH)[None, :], other=0).to(tl.float32)
    place = extremes_ptr + batch * WIDTH + width
    tl.atomic_max(place, tl.max(states, axis=0), mask=width < WIDTH, sem="relaxed")
    tl.atomic_max(place + extremes_stride, tl.max(-states, axis=0), mask=width < WIDTH, sem="relaxed")


@triton.jit
def _load_width(extremes_ptr, extremes_stride, channel, WIDTH: tl.constexpr):
    """Return widths of channels; without tokens 0, beyond the last channel less than that."""
    high = tl.load(extremes_ptr + channel, mask=channel < WIDTH, other=-0.5)
    low = tl.load(extremes_ptr + extremes_stride + channel, mask=channel < WIDTH, other=-0.5)
    return tl.where(high == float("-inf"), 0.0, high + low)


@triton.jit
def _order_kernel(
    extremes_ptr, extremes_stride, order_ptr, wide_channels, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    extremes_ptr += batch * WIDTH
    channel, other = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_WIDTH)
    width = _load_width(extremes_ptr, extremes_stride, channel, WIDTH)[None, :]
    other_width = _load_width(extremes_ptr, extremes_stride, other, WIDTH)[:, None]
    is_before = other[:, None] < channel[None, :]
    is_wider = ((other_width > width) | ((other_width == width) & is_before)).to(tl.int32)
    is_wide = tl.sum(is_wider, axis=0) < wide_channels
    # Of two channels one is the wider, so what stands before the other channel is what it does not stand before.
    other_is_wide = BLOCK_WIDTH - 1 - tl.sum(is_wider, axis=1) < wide_channels
    wide_before = tl.sum((is_before & other_is_wide[:, None]).to(tl.int32), axis=0)
    position = tl.where(is_wide, wide_before, wide_channels + channel - wide_before)
    tl.store(order_ptr + batch * WIDTH + position, channel, mask=channel < WIDTH)
