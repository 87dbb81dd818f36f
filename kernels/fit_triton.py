"""`fit` in Triton, for float32 tiles [S, COLUMNS] whose groups are the columns, and the kernel of all operations with it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vidkv_kernels.fit import ROUNDS, SMALLEST_WEIGHT
from vidkv_kernels.packed import CENTER_CODE

COLUMNS = 32
WARPS = {32: 4, 64: 4, 128: 8}  # by the tokens of a group
_ROUNDS, _SMALLEST, _CENTER = tl.constexpr(ROUNDS), tl.constexpr(SMALLEST_WEIGHT), tl.constexpr(CENTER_CODE)
# What to stop at.
SCALE, MIDDLE, CODES = range(3)


@triton.jit
def _round(values):
    """Round to the nearest integer, halves to the even one; for sizes below 2^22."""
    return (values + 12582912.0) - 12582912.0


@triton.jit
def _nearest(groups, middle, scale, half):
    step = tl.where(scale > 0, scale, 1.0)
    # Bounds first, so that rounding stays in its range.
    codes = tl.minimum(tl.maximum(tl.div_rn(groups - middle, step) + half, 0.0), 2 * half)
    return _round(codes) - half


@triton.jit
def fit_columns(
    states, levels, scale_units, middle_units, centers, metadata, codes, faults, fault, emphasis, tokens, channels, heads,
    states_batch, states_head, states_token, unit_batch, unit_head,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, EMPHASIS: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    """One program for a group of tokens and some channels; grid: groups, blocks of channels, heads of sequences."""
    group, bh = tl.program_id(0), tl.program_id(2).to(tl.int64)
    batch, head = bh // heads, bh % heads
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_held = channel < channels
    token = group.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    start = states + batch * states_batch + head * states_head
    x = tl.load(start + token[:, None] * states_token + channel[None, :], mask=is_held[None, :], other=0.0)
    half = (tl.load(levels + channel, mask=is_held, other=2).to(tl.float32) - 1)[None, :] * 0.5

    weights = tl.full([SIZE, COLUMNS], 1.0, tl.float32)
    if EMPHASIS != 0:
        distances = tl.abs(x - (tl.sum(x, axis=0) / SIZE)[None, :])
        typical = tl.sqrt_rn(tl.sum(distances * distances, axis=0) / SIZE)
        weights = tl.maximum(tl.div_rn(distances, tl.where(typical > 0, typical, 1.0)[None, :]), _SMALLEST)
        if EMPHASIS != 1:
            weights = tl.exp2(emphasis * tl.log2(weights))
    weights = tl.div_rn(weights, tl.sum(weights, axis=0)[None, :])
    low, high = tl.min(x, axis=0)[None, :], tl.max(x, axis=0)[None, :]
    # Sums are of distances from here, so that a group far from zero loses no digits.
    center = (low + high) * 0.5
    middle, scale = center, tl.div_rn(high - low, 2 * half)
    mean = tl.sum(weights * (x - center), axis=0)[None, :]
    for _ in tl.static_range(_ROUNDS):
        steps = _nearest(x, middle, scale, half)
        mean_steps = tl.sum(weights * steps, axis=0)[None, :]
        spread = weights * (steps - mean_steps)
        size = tl.sum(spread * steps, axis=0)[None, :]
        scale = tl.div_rn(tl.sum(spread * (x - center - mean), axis=0)[None, :], tl.where(size > 0, size, 1.0))
        middle = center + (mean - scale * mean_steps)
    scale = tl.maximum(scale, 0.0)

    groups = tokens // SIZE
    place = ((bh * groups + group) * channels + channel)[None, :]
    if STAGE == 0:
        tl.store(metadata + place, scale, mask=is_held[None, :])
    else:
        unit_place = batch * unit_batch + head * unit_head + channel
        scale_unit = tl.load(scale_units + unit_place, mask=is_held, other=1.0).to(tl.float32)[None, :]
        scale_code = _round(tl.minimum(tl.div_rn(scale, scale_unit), 15.0))
        scale = scale_unit * scale_code
        steps = _nearest(x, middle, scale, half)
        middle = center + tl.sum(weights * (x - center - scale * steps), axis=0)[None, :]
        if STAGE == 1:
            tl.store(metadata + place, middle, mask=is_held[None, :])
        else:
            unit = tl.load(middle_units + unit_place, mask=is_held, other=1.0).to(tl.float32)[None, :]
            origin = tl.load(centers + unit_place, mask=is_held, other=0.0).to(tl.float32)[None, :] - _CENTER * unit
            middle_code = _round(tl.minimum(tl.maximum(tl.div_rn(middle - origin, unit), 0.0), 15.0))
            tl.store(metadata + place, (scale_code * 16 + middle_code).to(tl.uint8), mask=is_held[None, :])
            found = (_nearest(x, origin + unit * middle_code, scale, half) + half).to(tl.uint8)
            code_place = (bh * tokens + token)[:, None] * channels + channel[None, :]
            tl.store(codes + code_place, found, mask=is_held[None, :])
            # Neither infinity nor NaN is less than infinity.
            is_bad = tl.sum((~(tl.abs(x) < float("inf"))).to(tl.int32)) > 0
            tl.atomic_or(faults, fault, mask=is_bad)


def launch(
    states: torch.Tensor, levels: torch.Tensor, emphasis: float, group_size: int, units: tuple[torch.Tensor, ...],
    metadata: torch.Tensor, codes: torch.Tensor, stage: int, faults: torch.Tensor | None = None, bit: int = 0,
) -> None:  # fmt: skip
    """Fit the groups of states up to a stage.

    Args:
        units: float16 [B, H, C] of equal strides, the last one 1: unit of scales, of middles, and center; as many as are known.
        metadata, codes: results, contiguous; codes are written at the last stage only.
        faults, bit: as in `fit_codes`, at the last stage only.
    """
    batch, heads, tokens, channels = states.shape
    if not states.numel():
        return
    known = (*units, *(levels,) * (3 - len(units)))  # what is not read may be anything
    strides = units[0].stride()[:2] if units else (0, 0)
    grid = (tokens // group_size, triton.cdiv(channels, COLUMNS), batch * heads)
    fit_columns[grid](
        states, levels, *known, metadata, codes, levels if faults is None else faults, bit, float(emphasis), tokens, channels, heads,
        *states.stride()[:3], *strides,
        SIZE=group_size, COLUMNS=COLUMNS, EMPHASIS=int(emphasis) if emphasis in (0, 1) else 2, STAGE=stage, num_warps=WARPS[group_size],
    )  # fmt: skip
