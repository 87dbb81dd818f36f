"""`attend` in Triton: the history is split over programs that keep words in registers; a second kernel merges by log-sum-exp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vidkv_kernels.attend import check_query
from vidkv_kernels.packed import CENTER_CODE, FullPrecision, PackedKeys, PackedLayer, PackedValues, ternary_channels

# Half a block of 32 tokens is 16 tokens: one 2-bit word of each channel. A program takes 8 halves at once and goes through their
# tokens a few at a time, so that a word that was brought into the order of a matrix operand is unpacked 16 times without moving
# again. The rows of an operand are the first of these tokens in each half, then the second, and so on: rows r and r + 8 are in one
# thread, which therefore holds words and metadata of a half once.
HALF = tl.constexpr(16)
HALVES = tl.constexpr(8)
AT_ONCE = tl.constexpr(2)
ROWS = tl.constexpr(HALVES.value * AT_ONCE.value)
STEP = 128
DENSE_TOKENS = 32
# Programs of one launch, where the history is long enough: more than run at once on large GPUs.
PROGRAMS = 1024
SPLITS_AT_ONCE = 64
CHANNELS_AT_ONCE = 32
LOG2_E = 1.4426950408889634
# A maximum that is lower than any score, but finite, so that differences of maxima are numbers.
LOWEST = tl.constexpr(-1.0e30)
CENTER = tl.constexpr(CENTER_CODE)


def attend(query: torch.Tensor, layer: PackedLayer, scaling: float) -> torch.Tensor:
    """See `attend_reference`."""
    check_query(query, layer)
    batch, query_heads, _, width = query.shape
    heads = layer.residual.keys.shape[1]
    per_head = query_heads // heads
    block_heads = min(16, max(8, triton.next_power_of_2(per_head)))
    head_blocks = triton.cdiv(per_head, block_heads)
    mapped, constant = _map_query(query, layer.keys)
    splits = [_split_count(run.entries, batch * heads * head_blocks) for run in layer.values]
    dense = [part for part in (layer.residual, layer.prefix) if part is not None]
    dense_splits = [triton.cdiv(part.keys.shape[2], DENSE_TOKENS) for part in dense]
    total = sum(splits) + sum(dense_splits)
    sums = torch.empty(batch, query_heads, total, width, dtype=torch.float32, device=query.device)
    # For each split its maximum, in units of powers of two, and the sum of its weights.
    weights = torch.empty(2, batch, query_heads, total, dtype=torch.float32, device=query.device)
    shared = {
        "scaling": scaling * LOG2_E,
        "HEADS": heads,
        "PER_HEAD": per_head,
        "BLOCK_HEADS": block_heads,
        "HEAD_BLOCKS": head_blocks,
        "WIDTH": width,
        "BLOCK_WIDTH": triton.next_power_of_2(max(width, 16)),
        "num_warps": 1,
    }
    place = 0
    for part, count in zip(dense, dense_splits, strict=True):
        _launch_dense(query, part, sums, weights, place, count, shared)
        place += count
    for run, count in zip(layer.values, splits, strict=True):
        _launch_history(mapped, constant, layer.keys, run, sums, weights, place, count, shared, query.dtype)
        place += count
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    _merge_kernel[(batch * query_heads, triton.cdiv(width, CHANNELS_AT_ONCE))](
        sums, weights, out, weights.stride(0), total, WIDTH=width, BLOCK_WIDTH=CHANNELS_AT_ONCE, BLOCK_SPLITS=SPLITS_AT_ONCE, num_warps=4
    )  # fmt: skip
    return out


def _split_count(entries: int, rows: int) -> int:
    return max(1, min(triton.cdiv(entries, STEP), triton.cdiv(PROGRAMS, rows)))


def _map_query(query: torch.Tensor, keys: PackedKeys | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the query as history sees it, [B, HQ, C], and what every score of history has in common, float32 [B, HQ]."""
    batch, query_heads, _, width = query.shape
    if keys is None or (keys.order is None and keys.matrix is None and keys.center is None):
        return query.reshape(batch, query_heads, width), None
    mapped = torch.empty(batch, query_heads, keys.channels, dtype=torch.float32, device=query.device)
    constant = torch.empty(batch, query_heads, dtype=torch.float32, device=query.device) if keys.center is not None else None
    _map_query_kernel[(batch * query_heads, triton.cdiv(keys.channels, CHANNELS_AT_ONCE))](
        query, query.stride(0), query.stride(1), _or(keys.order, query), *_broadcast_strides(keys.order), _or(keys.matrix, query),
        _or(keys.center, query), *_broadcast_strides(keys.center),
        mapped, mapped if constant is None else constant, query_heads, query_heads // keys.codes.shape[1],
        WIDTH=width, BLOCK_WIDTH=triton.next_power_of_2(width), CHANNELS=keys.channels,
        BLOCK_CHANNELS=CHANNELS_AT_ONCE, HAS_ORDER=keys.order is not None, HAS_MATRIX=keys.matrix is not None,
        HAS_CENTER=constant is not None, num_warps=4,
    )  # fmt: skip
    return mapped, constant


def _broadcast_strides(tensor: torch.Tensor | None) -> tuple[int, int]:
    """Return the strides of batch and head, 0 where all share one."""
    if tensor is None:
        return 0, 0
    return tuple(0 if tensor.shape[dim] == 1 else tensor.stride(dim) for dim in (0, 1))


def _launch_dense(
    query: torch.Tensor, part: FullPrecision, sums: torch.Tensor, weights: torch.Tensor, place: int, count: int, shared: dict
) -> None:
    if not count:
        return
    _dense_kernel[(count, part.keys.shape[0] * shared["HEADS"] * shared["HEAD_BLOCKS"])](
        query, query.stride(0), query.stride(1),
        part.keys, *part.keys.stride()[:3], part.values, *part.values.stride()[:3], part.lengths,
        sums, weights, weights.stride(0), sums.shape[2], place,
        BLOCK_TOKENS=DENSE_TOKENS, **shared,
    )  # fmt: skip


def _launch_history(
    mapped: torch.Tensor,
    constant: torch.Tensor | None,
    keys: PackedKeys,
    values: PackedValues,
    sums: torch.Tensor,
    weights: torch.Tensor,
    place: int,
    count: int,
    shared: dict,
    dtype: torch.dtype,
) -> None:
    normal = keys.channels - keys.wide_channels
    ternary, ternary_end = ternary_channels(keys.segments)
    scale, offset = _bytes(values.scale), _bytes(values.offset)
    _history_kernel[(count, mapped.shape[0] * shared["HEADS"] * shared["HEAD_BLOCKS"])](
        mapped, mapped.stride(0), mapped.stride(1), mapped if constant is None else constant,
        keys.codes, _bytes(keys.scale), _or(_bytes(keys.offset), keys.codes),
        _or(keys.scale_unit, keys.codes), *_broadcast_strides(keys.scale_unit),
        _or(keys.offset_unit, keys.codes), _or(keys.offset_center, keys.codes), *_broadcast_strides(keys.offset_unit),
        values.codes, _or(scale, values.codes), _or(offset, values.codes),
        _or(values.scale_unit, values.codes), *_broadcast_strides(values.scale_unit),
        _or(values.offset_unit, values.codes), _or(values.offset_center, values.codes), *_broadcast_strides(values.offset_unit),
        _or(values.tokens, values.codes), values.lengths,
        sums, weights, weights.stride(0), sums.shape[2], place, keys.codes.shape[2], values.entries,
        HAS_CONSTANT=constant is not None, KEY_GROUP=keys.group_size,
        WIDE=keys.wide_channels, BLOCK_WIDE=_block(keys.wide_channels), NORMAL=normal, BLOCK_NORMAL=_block(normal),
        STORED=keys.stored_offsets, UNCENTRED=keys.uncentred_channels,
        WIDE_HAS_BASE=keys.stored_offsets > 0 or keys.uncentred_channels < keys.wide_channels,
        NORMAL_HAS_BASE=max(keys.stored_offsets, keys.uncentred_channels) > keys.wide_channels,
        TERNARY=ternary, TERNARY_END=ternary_end, KEY_KIND=_metadata_kind(keys.scale), KEY_OFFSET_KIND=_metadata_kind(keys.offset),
        LEVELS=values.levels, IS_BYTES=values.is_bytes, MIDDLE=values.middle, VALUE_GROUP=values.group_size,
        # Without scales there are no groups, and the other form is the faster one.
        PER_TOKEN=values.granularity == "per_token" and scale is not None, HAS_SCALE=scale is not None, HAS_OFFSET=offset is not None,
        VALUE_KIND=_metadata_kind(values.scale), VALUE_OFFSET_KIND=_metadata_kind(values.offset),
        IS_GATHERED=values.tokens is not None, COMPUTE=tl.float32 if dtype == torch.float32 else tl.float16, **shared,
    )  # fmt: skip


def _metadata_kind(tensor: torch.Tensor | None) -> int:
    """How `_load_metadata` reads it: 0 float16, 1 float8, 2 codes of 4 bits."""
    return 0 if tensor is None else {torch.float16: 0, torch.float8_e4m3fn: 1, torch.uint8: 2}[tensor.dtype]


def _bytes(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.float8_e4m3fn else tensor


def _or(tensor: torch.Tensor | None, absent: torch.Tensor) -> torch.Tensor:
    return absent if tensor is None else tensor


def _block(channels: int) -> int:
    return triton.next_power_of_2(max(channels, 16)) if channels else 0


@triton.jit
def _map_query_kernel(
    query_ptr, query_batch_stride, query_head_stride, order_ptr, order_batch_stride, order_head_stride, matrix_ptr,
    center_ptr, center_batch_stride, center_head_stride, mapped_ptr, constant_ptr, query_heads, per_head,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_MATRIX: tl.constexpr, HAS_CENTER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, query_head = row // query_heads, row % query_heads
    head = query_head // per_head
    width, channel = tl.arange(0, BLOCK_WIDTH), tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_width, in_channels = width < WIDTH, channel < CHANNELS
    query_ptr += batch * query_batch_stride + query_head * query_head_stride
    place = width
    if HAS_ORDER:
        place = tl.load(order_ptr + batch * order_batch_stride + head * order_head_stride + width, mask=in_width, other=0).to(tl.int32)
    query = tl.load(query_ptr + place, mask=in_width, other=0).to(tl.float32)
    if HAS_MATRIX:
        inside = in_width[:, None] & in_channels[None, :]
        matrix = tl.load(matrix_ptr + width[:, None] * CHANNELS + channel[None, :], mask=inside, other=0)
        mapped = tl.sum(query[:, None] * matrix, axis=0)
        tl.store(mapped_ptr + row * CHANNELS + channel, mapped, mask=in_channels)
    else:
        tl.store(mapped_ptr + row * CHANNELS + width, query, mask=in_width)
    if HAS_CENTER:
        # Of the query in its own order.
        center = tl.load(center_ptr + batch * center_batch_stride + head * center_head_stride + place, mask=in_width, other=0)
        tl.store(constant_ptr + row, tl.sum(query * center, axis=0))


@triton.jit
def _program_heads(
    HEADS: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK_HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr
):  # fmt: skip
    """Return batch, key/value head, query heads [BLOCK_HEADS] and which of these exist."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // (HEADS * HEAD_BLOCKS), row // HEAD_BLOCKS % HEADS
    member = row % HEAD_BLOCKS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    return batch, head, head * PER_HEAD + member, member < PER_HEAD


@triton.jit
def _store_split(
    accumulator, maximum, total, sums_ptr, weights_ptr, weights_stride, splits, split, batch, query_head, is_head,
    HEADS: tl.constexpr, PER_HEAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    place = (batch * (HEADS * PER_HEAD) + query_head) * splits + split
    width = tl.arange(0, BLOCK_WIDTH)
    tl.store(sums_ptr + place[None, :] * WIDTH + width[:, None], accumulator, mask=is_head[None, :] & (width < WIDTH)[:, None])
    tl.store(weights_ptr + place, maximum, mask=is_head)
    tl.store(weights_ptr + weights_stride + place, total, mask=is_head)


@triton.jit(do_not_specialize=["splits", "place"])
def _dense_kernel(
    query_ptr, query_batch_stride, query_head_stride,
    key_ptr, key_batch_stride, key_head_stride, key_token_stride,
    value_ptr, value_batch_stride, value_head_stride, value_token_stride, lengths_ptr,
    sums_ptr, weights_ptr, weights_stride, splits, place, scaling,
    BLOCK_TOKENS: tl.constexpr, HEADS: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK_HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    batch, head, query_head, is_head = _program_heads(HEADS, PER_HEAD, BLOCK_HEADS, HEAD_BLOCKS)
    split = tl.program_id(0)
    length = tl.load(lengths_ptr + batch)
    token = split * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    width = tl.arange(0, BLOCK_WIDTH)
    is_held, in_width = token < length, width < WIDTH
    token = token.to(tl.int64)
    query_rows = query_ptr + batch * query_batch_stride + query_head * query_head_stride
    query = tl.load(query_rows[None, :] + width[:, None], mask=is_head[None, :] & in_width[:, None], other=0)
    key_rows = key_ptr + batch * key_batch_stride + head * key_head_stride + token * key_token_stride
    keys = tl.load(key_rows[:, None] + width[None, :], mask=is_held[:, None] & in_width[None, :], other=0)
    value_rows = value_ptr + batch * value_batch_stride + head * value_head_stride + token * value_token_stride
    values = tl.load(value_rows[None, :] + width[:, None], mask=is_held[None, :] & in_width[:, None], other=0)
    # bfloat16 is exact in TF32, whose products are as precise as those of float16.
    COMPUTE: tl.constexpr = tl.float16 if keys.dtype == tl.float16 else tl.float32
    PRECISION: tl.constexpr = "ieee" if keys.dtype == tl.float32 else "tf32"
    scores = tl.dot(keys.to(COMPUTE), query.to(COMPUTE), input_precision=PRECISION) * scaling
    scores = tl.where(is_held[:, None], scores, LOWEST)
    maximum = tl.max(scores, axis=0)
    weights = tl.where(is_held[:, None], tl.exp2(scores - maximum[None, :]), 0.0)
    accumulator = tl.dot(values.to(COMPUTE), weights.to(COMPUTE), input_precision=PRECISION)
    _store_split(
        accumulator, maximum, tl.sum(weights, axis=0), sums_ptr, weights_ptr, weights_stride, splits, place + split,
        batch, query_head, is_head, HEADS, PER_HEAD, WIDTH, BLOCK_WIDTH,
    )  # fmt: skip


@triton.jit
def _stride(COLUMNS: tl.constexpr, KIND: tl.constexpr):
    """Return the elements of a row of metadata."""
    return (COLUMNS + 1) // 2 if KIND == 2 else COLUMNS


@triton.jit
def _load_unit(unit_ptr, column, inside, KIND: tl.constexpr):
    """Return the unit of metadata, which float16 has none of."""
    return tl.load(unit_ptr + column, mask=inside, other=0).to(tl.float32) if KIND else tl.zeros_like(column).to(tl.float32)


@triton.jit
def _load_origin(center_ptr, column, inside, unit, KIND: tl.constexpr):
    """Return what code 0 of an offset in 4 bits means; 0 for other kinds."""
    return tl.load(center_ptr + column, mask=inside, other=0).to(tl.float32) - CENTER * unit if KIND == 2 else unit * 0


@triton.jit
def _load_metadata(ptr, row, column, inside, unit, origin, COLUMNS: tl.constexpr, KIND: tl.constexpr):
    """Load metadata of rows and columns, as float32.

    KIND: 0 float16; 1 float8 e4m3 in bytes, which is a float16 of other exponent bias, times `unit`; 2 codes of 4 bits, times `unit`
    plus `origin`.
    """
    if KIND == 2:
        codes = tl.load(ptr + row * ((COLUMNS + 1) // 2) + column // 2, mask=inside, other=0).to(tl.int32)
        return ((codes >> (column % 2 * 4)) & 15).to(tl.float32) * unit + origin
    raw = tl.load(ptr + row * COLUMNS + column, mask=inside, other=0)
    if KIND == 1:
        bits = raw.to(tl.int16)
        raw = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return raw.to(tl.float32) * 256 * unit
    return raw.to(tl.float32)


@triton.jit
def _load_key_metadata(
    scale_ptr, offset_ptr, scale_unit_ptr, offset_unit_ptr, offset_center_ptr, group, is_held, FIRST: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, STORED: tl.constexpr, UNCENTRED: tl.constexpr, TERNARY: tl.constexpr,
    TERNARY_END: tl.constexpr, BASE: tl.constexpr, MIDDLE: tl.constexpr, KIND: tl.constexpr, OFFSET_KIND: tl.constexpr,
):  # fmt: skip
    """Return scales, and what a code BASE means, of channels FIRST .. FIRST + COUNT in some groups, float32 [groups, BLOCK].

    MIDDLE is the middle of centred channels that are not ternary; that of uncentred ones is 0.
    """
    channel = FIRST + tl.arange(0, BLOCK)
    in_channels = channel < FIRST + COUNT
    row, column, inside = group[:, None], channel[None, :], is_held[:, None] & in_channels[None, :]
    unit = _load_unit(scale_unit_ptr, channel, in_channels, KIND)[None, :]
    scale = _load_metadata(scale_ptr, row, column, inside, unit, unit * 0, CHANNELS, KIND)
    middle = tl.where((channel >= TERNARY) & (channel < TERNARY_END), 1.0, MIDDLE)
    base = scale * tl.where(channel < UNCENTRED, BASE, BASE - middle)[None, :]
    if FIRST < STORED:
        is_stored = in_channels & (channel < STORED)
        unit = _load_unit(offset_unit_ptr, channel, is_stored, OFFSET_KIND)[None, :]
        origin = _load_origin(offset_center_ptr, channel[None, :], is_stored[None, :], unit, OFFSET_KIND)
        base += _load_metadata(offset_ptr, row, column, inside & is_stored[None, :], unit, origin, STORED, OFFSET_KIND)
    return scale, base


@triton.jit
def _two_bits_times_scale(words, position, factor):
    """Return codes of 2 bits at bit `position` of uint32 words, times scale, as float32; `factor` is 4 * scale."""
    # The bits of a code, rotated to the top of a mantissa, make 1 + code / 4 without a conversion.
    amount = (21 - position) & 31
    rotated = (words << amount) | (words >> (32 - amount))
    return ((rotated & 0x600000) | 0x3F800000).to(tl.float32, bitcast=True) * factor - factor


@triton.jit
def _one_bit_times_scale(words, position, factor):
    """Return (code - 1/2) * scale for codes of 1 bit at bit `position` of uint32 words, as float32; `factor` is -scale / 2."""
    sign = (words << (31 - position)) & 0x80000000
    return (sign ^ factor.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _dot(left, right, COMPUTE: tl.constexpr):
    return tl.dot(left.to(COMPUTE), right.to(COMPUTE), input_precision="ieee")


@triton.jit
def _dot_exactly(left, right, COMPUTE: tl.constexpr):
    """A product whose left side keeps the accuracy of float32, as two terms of the lower precision."""
    return _dot(left, right, COMPUTE) + _dot(left - left.to(COMPUTE).to(tl.float32), right, COMPUTE)


@triton.jit
def _to_rows(halves, COLUMNS: tl.constexpr):
    """Repeat what halves have in common for the tokens taken at once: [1, HALVES, COLUMNS] to [ROWS, COLUMNS]."""
    return tl.reshape(tl.broadcast_to(halves, [AT_ONCE, HALVES, COLUMNS]), [ROWS, COLUMNS])


@triton.jit
def _as_row(vector, IS_MATRIX: tl.constexpr):
    """Give a vector the dimensions of [rows, width], or of [tokens at once, halves, width]."""
    return vector[None, :] if IS_MATRIX else vector[None, None, :]


@triton.jit(do_not_specialize=["splits", "place", "key_blocks", "entries"])
def _history_kernel(
    mapped_ptr, mapped_batch_stride, mapped_head_stride, constant_ptr,
    key_codes_ptr, key_scale_ptr, key_offset_ptr,
    key_scale_unit_ptr, key_scale_unit_batch_stride, key_scale_unit_head_stride,
    key_offset_unit_ptr, key_offset_center_ptr, key_offset_unit_batch_stride, key_offset_unit_head_stride,
    value_codes_ptr, value_scale_ptr, value_offset_ptr,
    value_scale_unit_ptr, value_scale_unit_batch_stride, value_scale_unit_head_stride,
    value_offset_unit_ptr, value_offset_center_ptr, value_offset_unit_batch_stride, value_offset_unit_head_stride,
    tokens_ptr, lengths_ptr, sums_ptr, weights_ptr, weights_stride, splits, place, key_blocks, entries, scaling,
    HAS_CONSTANT: tl.constexpr, KEY_GROUP: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_WIDE: tl.constexpr, NORMAL: tl.constexpr, BLOCK_NORMAL: tl.constexpr,
    STORED: tl.constexpr, UNCENTRED: tl.constexpr, WIDE_HAS_BASE: tl.constexpr, NORMAL_HAS_BASE: tl.constexpr,
    TERNARY: tl.constexpr, TERNARY_END: tl.constexpr, KEY_KIND: tl.constexpr, KEY_OFFSET_KIND: tl.constexpr,
    LEVELS: tl.constexpr, IS_BYTES: tl.constexpr, MIDDLE: tl.constexpr, VALUE_GROUP: tl.constexpr,
    PER_TOKEN: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_OFFSET: tl.constexpr,
    VALUE_KIND: tl.constexpr, VALUE_OFFSET_KIND: tl.constexpr,
    IS_GATHERED: tl.constexpr, COMPUTE: tl.constexpr,
    HEADS: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK_HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    CHANNELS: tl.constexpr = WIDE + NORMAL
    WORDS: tl.constexpr = 2 * WIDE + NORMAL
    VALUE_BITS: tl.constexpr = 1 if LEVELS == 2 else 2
    # What the functions that unpack take instead of a scale, in units of it, and what they leave to be added.
    FACTOR: tl.constexpr = -0.5 if LEVELS == 2 else 4.0
    BASE: tl.constexpr = (0.5 if LEVELS == 2 else 0.0) - MIDDLE
    STATIC_SCALE: tl.constexpr = HAS_SCALE and not PER_TOKEN
    # What a half has in common is added once for its 16 tokens: to keys by a product with the query, to values by a product with
    # the sum of their weights. In float32 that would cost accuracy, because it nearly cancels what codes add.
    IS_SINGLE: tl.constexpr = COMPUTE == tl.float32
    LATE_OFFSETS: tl.constexpr = (BASE != 0 or HAS_OFFSET) and not PER_TOKEN and not IS_SINGLE
    batch, head, query_head, is_head = _program_heads(HEADS, PER_HEAD, BLOCK_HEADS, HEAD_BLOCKS)
    row = batch * HEADS + head
    split = tl.program_id(0)
    length = tl.load(lengths_ptr + batch)
    row_in_step = tl.arange(0, ROWS)
    first_entry = row_in_step % HALVES * HALF + row_in_step // HALVES
    nth = tl.arange(0, AT_ONCE)[:, None, None]
    width = tl.arange(0, BLOCK_WIDTH)
    in_width = width < WIDTH

    key_codes_ptr += row * key_blocks * WORDS
    key_scale_ptr += row * key_blocks * 32 // KEY_GROUP * _stride(CHANNELS, KEY_KIND)
    key_offset_ptr += row * key_blocks * 32 // KEY_GROUP * _stride(STORED, KEY_OFFSET_KIND)
    key_scale_unit_ptr += batch * key_scale_unit_batch_stride + head * key_scale_unit_head_stride
    key_offset_unit_ptr += batch * key_offset_unit_batch_stride + head * key_offset_unit_head_stride
    key_offset_center_ptr += batch * key_offset_unit_batch_stride + head * key_offset_unit_head_stride
    value_scale_unit_ptr += batch * value_scale_unit_batch_stride + head * value_scale_unit_head_stride
    value_offset_unit_ptr += batch * value_offset_unit_batch_stride + head * value_offset_unit_head_stride
    value_offset_center_ptr += batch * value_offset_unit_batch_stride + head * value_offset_unit_head_stride
    tokens_ptr += batch * entries
    VALUE_COLUMNS: tl.constexpr = WIDTH // VALUE_GROUP if PER_TOKEN else WIDTH
    if PER_TOKEN:
        value_scale_ptr += row * entries * VALUE_COLUMNS
        value_offset_ptr += row * entries * VALUE_COLUMNS
        column = width // VALUE_GROUP
    else:
        value_scale_ptr += row * entries // VALUE_GROUP * _stride(WIDTH, VALUE_KIND)
        value_offset_ptr += row * entries // VALUE_GROUP * _stride(WIDTH, VALUE_OFFSET_KIND)
        column = width
    value_unit = _load_unit(value_scale_unit_ptr, column, in_width, VALUE_KIND)
    value_offset_unit = _load_unit(value_offset_unit_ptr, column, in_width, VALUE_OFFSET_KIND)
    value_origin = _as_row(_load_origin(value_offset_center_ptr, column, in_width, value_offset_unit, VALUE_OFFSET_KIND), PER_TOKEN)
    value_unit, value_offset_unit = _as_row(value_unit, PER_TOKEN), _as_row(value_offset_unit, PER_TOKEN)
    value_column = _as_row(column, PER_TOKEN)
    if IS_BYTES:
        BYTES: tl.constexpr = (WIDTH + 4) // 5
        value_codes_ptr += row * entries * BYTES
        digit = width % 5
        # byte // 3^digit as a product and a shift: exact for all bytes.
        divisor = tl.where(digit == 0, 65536, tl.where(digit == 1, 21846, tl.where(digit == 2, 7282, tl.where(digit == 3, 2428, 810))))
    else:
        value_codes_ptr += row * entries // 32 * VALUE_BITS * WIDTH

    mapped_rows = mapped_ptr + batch * mapped_batch_stride + query_head * mapped_head_stride
    if WIDE:
        wide = tl.arange(0, BLOCK_WIDE)
        in_wide = wide < WIDE
        wide_query = tl.load(mapped_rows[None, :] + wide[:, None], mask=is_head[None, :] & in_wide[:, None], other=0)
    if NORMAL:
        normal = tl.arange(0, BLOCK_NORMAL)
        in_normal = normal < NORMAL
        normal_query = tl.load(mapped_rows[None, :] + WIDE + normal[:, None], mask=is_head[None, :] & in_normal[:, None], other=0)
    constant = tl.zeros([BLOCK_HEADS], tl.float32)
    if HAS_CONSTANT:
        constant = tl.load(constant_ptr + batch * (HEADS * PER_HEAD) + query_head, mask=is_head, other=0)

    maximum = tl.full([BLOCK_HEADS], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    accumulator = tl.zeros([BLOCK_WIDTH, BLOCK_HEADS], tl.float32)
    steps = tl.cdiv(length, HALVES * HALF)
    share = tl.cdiv(steps, tl.num_programs(0))
    for step in range(split * share, tl.minimum(split * share + share, steps)):
        half = step * HALVES + tl.arange(0, HALVES)
        is_half = half * HALF < length
        # Where the two halves of a block share words of 1 bit, the second one starts at bit 16.
        start_of_half = (half % 2 * HALF)[None, :, None]
        half = half.to(tl.int64)
        half_bias = tl.zeros([HALVES, BLOCK_HEADS], tl.float32)
        if not IS_GATHERED:
            group = half * HALF // KEY_GROUP
            if WIDE:
                places = key_codes_ptr + (half // 2 * WORDS + half % 2 * WIDE)[None, :, None] + wide[None, None, :]
                wide_words = tl.load(places, mask=is_half[None, :, None] & in_wide[None, None, :], other=0).to(tl.uint32)
                scale, base = _load_key_metadata(
                    key_scale_ptr, key_offset_ptr, key_scale_unit_ptr, key_offset_unit_ptr, key_offset_center_ptr, group, is_half,
                    0, WIDE, BLOCK_WIDE, CHANNELS, STORED, UNCENTRED, TERNARY, TERNARY_END, 0.0, 1.5, KEY_KIND, KEY_OFFSET_KIND,
                )  # fmt: skip
                wide_factor, wide_base = (scale * 4)[None, :, :], base[None, :, :]
                if WIDE_HAS_BASE and not IS_SINGLE:
                    half_bias += _dot_exactly(base, wide_query, COMPUTE)
            if NORMAL:
                places = key_codes_ptr + (half // 2 * WORDS)[None, :, None] + 2 * WIDE + normal[None, None, :]
                normal_words = tl.load(places, mask=is_half[None, :, None] & in_normal[None, None, :], other=0).to(tl.uint32)
                scale, base = _load_key_metadata(
                    key_scale_ptr, key_offset_ptr, key_scale_unit_ptr, key_offset_unit_ptr, key_offset_center_ptr, group, is_half,
                    WIDE, NORMAL, BLOCK_NORMAL, CHANNELS, STORED, UNCENTRED, TERNARY, TERNARY_END, 0.5, 0.5, KEY_KIND, KEY_OFFSET_KIND,
                )  # fmt: skip
                normal_factor, normal_base = (scale * -0.5)[None, :, :], base[None, :, :]
                if NORMAL_HAS_BASE and not IS_SINGLE:
                    half_bias += _dot_exactly(base, normal_query, COMPUTE)
        bias = _to_rows(half_bias[None, :, :], BLOCK_HEADS)
        is_stored = is_half[None, :, None] & in_width[None, None, :]
        if not IS_BYTES:
            word_row = half if VALUE_BITS == 2 else half // 2
            value_words = tl.load(value_codes_ptr + word_row[None, :, None] * WIDTH + width[None, None, :], mask=is_stored, other=0)
            value_words = value_words.to(tl.uint32)
        value_factor = tl.full([1, HALVES, BLOCK_WIDTH], FACTOR, tl.float32)
        value_group = (half * HALF // VALUE_GROUP)[None, :, None]
        if STATIC_SCALE:
            value_factor *= _load_metadata(
                value_scale_ptr, value_group, value_column, is_stored, value_unit, value_unit * 0, VALUE_COLUMNS, VALUE_KIND
            )  # fmt: skip
        if HAS_OFFSET and IS_SINGLE and not PER_TOKEN:
            value_offset = _load_metadata(
                value_offset_ptr, value_group, value_column, is_stored, value_offset_unit, value_origin, VALUE_COLUMNS, VALUE_OFFSET_KIND
            )  # fmt: skip
        weight_sums = tl.zeros([ROWS, BLOCK_HEADS], tl.float32)

        for index in range(0, HALF, AT_ONCE):
            entry = step * (HALVES * HALF) + first_entry + index
            is_held = entry < length
            scores = bias
            if IS_GATHERED:
                token = tl.load(tokens_ptr + entry, mask=is_held, other=0).to(tl.int64)
                block = key_codes_ptr + token // 32 * WORDS
                group = token // KEY_GROUP
                if WIDE:
                    inside = is_held[:, None] & in_wide[None, :]
                    wide_words = tl.load((block + token % 32 // 16 * WIDE)[:, None] + wide[None, :], mask=inside, other=0).to(tl.uint32)
                    scale, base = _load_key_metadata(
                        key_scale_ptr, key_offset_ptr, key_scale_unit_ptr, key_offset_unit_ptr, key_offset_center_ptr, group, is_held,
                        0, WIDE, BLOCK_WIDE, CHANNELS, STORED, UNCENTRED, TERNARY, TERNARY_END, 0.0, 1.5, KEY_KIND, KEY_OFFSET_KIND,
                    )  # fmt: skip
                    position = (token % 16 * 2).to(tl.int32)[:, None]
                    keys = _two_bits_times_scale(wide_words, position, scale * 4)
                    if WIDE_HAS_BASE and IS_SINGLE:
                        keys += base
                    elif WIDE_HAS_BASE:
                        scores += _dot_exactly(base, wide_query, COMPUTE)
                    scores += _dot(keys, wide_query, COMPUTE)
                if NORMAL:
                    inside = is_held[:, None] & in_normal[None, :]
                    normal_words = tl.load((block + 2 * WIDE)[:, None] + normal[None, :], mask=inside, other=0).to(tl.uint32)
                    scale, base = _load_key_metadata(
                        key_scale_ptr, key_offset_ptr, key_scale_unit_ptr, key_offset_unit_ptr, key_offset_center_ptr, group, is_held,
                        WIDE, NORMAL, BLOCK_NORMAL, CHANNELS, STORED, UNCENTRED, TERNARY, TERNARY_END, 0.5, 0.5, KEY_KIND, KEY_OFFSET_KIND,
                    )  # fmt: skip
                    position = (token % 32).to(tl.int32)[:, None]
                    keys = _one_bit_times_scale(normal_words, position, scale * -0.5)
                    if NORMAL_HAS_BASE and IS_SINGLE:
                        keys += base
                    elif NORMAL_HAS_BASE:
                        scores += _dot_exactly(base, normal_query, COMPUTE)
                    scores += _dot(keys, normal_query, COMPUTE)
            else:
                if WIDE:
                    keys = _two_bits_times_scale(wide_words, 2 * (index + nth), wide_factor)
                    if WIDE_HAS_BASE and IS_SINGLE:
                        keys += wide_base
                    scores += _dot(tl.reshape(keys, [ROWS, BLOCK_WIDE]), wide_query, COMPUTE)
                if NORMAL:
                    keys = _one_bit_times_scale(normal_words, index + nth + start_of_half, normal_factor)
                    if NORMAL_HAS_BASE and IS_SINGLE:
                        keys += normal_base
                    scores += _dot(tl.reshape(keys, [ROWS, BLOCK_NORMAL]), normal_query, COMPUTE)
            scores = tl.where(is_held[:, None], (scores + constant[None, :]) * scaling, LOWEST)
            new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
            fading = tl.exp2(maximum - new_maximum)
            maximum = new_maximum
            # The first token of a step is held, so that the maximum is a score and LOWEST far below it.
            weights = tl.exp2(scores - maximum[None, :]).to(COMPUTE)
            weight_sums = weight_sums * fading[None, :] + weights.to(tl.float32)

            inside = is_held[:, None] & in_width[None, :]
            factor = value_factor
            if PER_TOKEN:
                value_row = entry.to(tl.int64)[:, None]
                factor = FACTOR * _load_metadata(
                    value_scale_ptr, value_row, value_column, inside, value_unit, value_unit * 0, VALUE_COLUMNS, VALUE_KIND
                )  # fmt: skip
                factor = tl.reshape(factor, [AT_ONCE, HALVES, BLOCK_WIDTH])
            if IS_BYTES:
                digits = tl.load(value_codes_ptr + entry.to(tl.int64)[:, None] * BYTES + width[None, :] // 5, mask=inside, other=0)
                digits = (digits.to(tl.int32) * divisor[None, :]) >> 16
                digits = tl.reshape(digits - 3 * ((digits * 21846) >> 16), [AT_ONCE, HALVES, BLOCK_WIDTH])
                values = digits.to(tl.float32) * (factor / FACTOR)
            elif VALUE_BITS == 2:
                values = _two_bits_times_scale(value_words, 2 * (index + nth), factor)
            else:
                values = _one_bit_times_scale(value_words, index + nth + start_of_half, factor)
            if BASE != 0 and not LATE_OFFSETS:
                values += factor * (BASE / FACTOR)
            if HAS_OFFSET and IS_SINGLE and not PER_TOKEN:
                values += value_offset
            values = tl.reshape(values, [ROWS, BLOCK_WIDTH])
            if PER_TOKEN and HAS_OFFSET:
                values += _load_metadata(
                    value_offset_ptr, value_row, value_column, inside, value_offset_unit, value_origin, VALUE_COLUMNS, VALUE_OFFSET_KIND
                )  # fmt: skip
            accumulator = accumulator * fading[None, :] + _dot(tl.trans(values), weights, COMPUTE)
            total = total * fading

        total += tl.sum(weight_sums, axis=0)
        if LATE_OFFSETS:
            offsets = value_factor * (BASE / FACTOR)
            if HAS_OFFSET:
                offsets += _load_metadata(
                    value_offset_ptr, value_group, value_column, is_stored, value_offset_unit, value_origin, VALUE_COLUMNS,
                    VALUE_OFFSET_KIND,
                )  # fmt: skip
            offsets = tl.trans(_to_rows(offsets, BLOCK_WIDTH))
            rounded = weight_sums.to(COMPUTE)
            accumulator += _dot_exactly(offsets, rounded, COMPUTE)
            accumulator += _dot(offsets, weight_sums - rounded.to(tl.float32), COMPUTE)

    _store_split(
        accumulator, maximum, total, sums_ptr, weights_ptr, weights_stride, splits, place + split,
        batch, query_head, is_head, HEADS, PER_HEAD, WIDTH, BLOCK_WIDTH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    sums_ptr, weights_ptr, out_ptr, weights_stride, splits,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    width = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    in_width = width < WIDTH
    maxima = tl.full([BLOCK_SPLITS], LOWEST, tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        maxima = tl.maximum(maxima, tl.load(weights_ptr + row * splits + split, mask=split < splits, other=LOWEST))
    maximum = tl.max(maxima, axis=0)
    totals = tl.zeros([BLOCK_SPLITS], tl.float32)
    mixed = tl.zeros([BLOCK_SPLITS, BLOCK_WIDTH], tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        in_splits = split < splits
        place = row * splits + split
        factors = tl.exp2(tl.load(weights_ptr + place, mask=in_splits, other=LOWEST) - maximum)
        totals += factors * tl.load(weights_ptr + weights_stride + place, mask=in_splits, other=0)
        inside = in_splits[:, None] & in_width[None, :]
        mixed += factors[:, None] * tl.load(sums_ptr + place[:, None] * WIDTH + width[None, :], mask=inside, other=0)
    total = tl.sum(totals, axis=0)
    # Where there is no token, all sums are zero.
    tl.store(out_ptr + row * WIDTH + width, tl.sum(mixed, axis=0) / tl.where(total > 0, total, 1.0), mask=in_width)
