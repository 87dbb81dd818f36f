"""`encode` in Triton, for float32 tiles of three dimensions whose groups lie along dimension DIM; 2 or 4 levels of min-max."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rounded(values):
    """Round through float16."""
    return values.to(tl.float16).to(tl.float32)


@triton.jit
def encode_minmax(groups, LEVELS: tl.constexpr, DIM: tl.constexpr):
    """Return codes int32, and scale and offset as float32 that float16 holds."""
    low = tl.min(groups, axis=DIM)
    scale = _rounded(tl.div_rn(tl.max(groups, axis=DIM) - low, LEVELS - 1.0))
    offset = _rounded(low)
    step = tl.expand_dims(tl.where(scale > 0, scale, 1.0), DIM)
    above = groups - tl.expand_dims(offset, DIM)
    # Halves go to the even code. These multiples of a float16 are exact in float32.
    codes = (above > 0.5 * step).to(tl.int32)
    if LEVELS == 4:
        codes += (above >= 1.5 * step).to(tl.int32) + (above > 2.5 * step).to(tl.int32)
    return codes, scale, offset


@triton.jit
def encode_sign(groups, HAS_MEAN: tl.constexpr, IS_CENTRED: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr):
    """Return codes int32, and scale and offset as float32 that float16 holds; the offset is 0 without a mean."""
    offset = tl.sum(groups, axis=DIM) * 0.0
    if HAS_MEAN:
        offset = _rounded(tl.sum(groups, axis=DIM) / GROUP)
        groups = groups - tl.expand_dims(offset, DIM)
    scale = _rounded(tl.sum(tl.abs(groups), axis=DIM) / GROUP)
    if IS_CENTRED:
        scale = scale * 2
    return (groups >= 0).to(tl.int32), scale, offset


@triton.jit
def encode_ternary(groups, threshold, GROUP: tl.constexpr, DIM: tl.constexpr):
    """Return codes int32 and scale as float32 that float16 holds."""
    sizes = tl.abs(groups)
    is_non_zero = sizes > tl.expand_dims(threshold * (tl.sum(sizes, axis=DIM) / GROUP), DIM)
    count = tl.maximum(tl.sum(is_non_zero.to(tl.float32), axis=DIM), 1.0)
    scale = _rounded(tl.div_rn(tl.sum(tl.where(is_non_zero, sizes, 0.0), axis=DIM), count))
    codes = tl.where(is_non_zero, tl.where(groups > 0, 2, tl.where(groups < 0, 0, 1)), 1)
    return codes, scale


@triton.jit
def pack_words(codes, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, NBITS: tl.constexpr):
    """Pack int32 codes [TOKENS, COLUMNS] of consecutive tokens to int32 words [TOKENS * NBITS / 32, COLUMNS]."""
    PER_WORD: tl.constexpr = 32 // NBITS
    digits = tl.reshape(codes, [TOKENS // PER_WORD, PER_WORD, COLUMNS])
    return tl.sum(digits << (NBITS * tl.arange(0, PER_WORD))[None, :, None], axis=1)
