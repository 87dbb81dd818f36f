"""`attend` in CUDA C++ over a `FragmentHistory`; see `attend` for the formula and `attend_cuda.cu` for the design."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vidkv_kernels import nvrtc
from vidkv_kernels.fragment_history import FragmentHistory
from vidkv_kernels.fragments import Form
from vidkv_kernels.packed import FullPrecision, Segment, check, check_packed

SOURCE = Path(__file__).with_name("attend_cuda.cu")
HEADS_AT_ONCE = 8
LOG2_E = 1.4426950408889634
DTYPES = (torch.float16, torch.bfloat16)
OLDEST_CAPABILITY = (8, 0)
# Chunks and warps of a plan, by the blocks of 32 tokens that there are for a multiprocessor.
PLANS = ((12, (1, 4)), (48, (2, 8)), (180, (4, 8)), (float("inf"), (4, 12)))


@dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
        chunks: blocks of 32 tokens that a warp takes at a time.
        warps: of a block.
        blocks: that share a multiprocessor.
        splits: blocks that share the tokens of a key/value head.
    """

    chunks: int
    warps: int
    blocks: int
    splits: int


class _Part(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        *((f"{tensor}_{axis}", ctypes.c_longlong) for tensor in ("key", "value") for axis in ("batch", "head", "token")),
    ]


def attend(
    query: torch.Tensor,
    history: FragmentHistory | None,
    residual: FullPrecision,
    scaling: float,
    prefix: FullPrecision | None = None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Attend with one new token of each sequence; the contract is `attend.attend_reference`.

    Nothing waits for the device: lengths are read there, and the grid follows from `history.max_length`. A captured CUDA graph stays
    right while the lengths grow, as long as the buffers stay where they are.

    Args:
        query: [B, HQ, 1, D], float16 or bfloat16, contiguous; HQ a multiple of H. D is 64 or 128.
        history: packed keys and values, or None if there are none.
        residual: newest tokens, dtype of the query; rows must start at multiples of 16 bytes.
        scaling: factor of the scores.
        prefix: oldest tokens in full precision, as residual.
        plan: how the work is cut; None: chosen from the sizes.
    Returns:
        [B, HQ, 1, D] in the dtype of the query; zeros for a sequence without tokens.
    Raises:
        ValueError: a tensor does not fit, by name.
        KernelError: no compiler, or a device older than compute capability 8.0.
    """
    batch, heads, _, width = residual.keys.shape
    device = query.device
    check_packed("query", query, (batch, None, 1, width), DTYPES, device)
    if width not in (64, 128):
        raise ValueError(f"query has {width} channels; allowed: 64, 128")
    if query.shape[1] % heads or not query.shape[1]:
        raise ValueError(f"query has {query.shape[1]} heads; allowed: multiples of {heads}, the key/value heads")
    if device.type != "cuda":
        raise ValueError(f"query is on {device}; allowed: a CUDA device")
    for name, part in (("residual", residual), ("prefix", prefix)):
        if part is not None:
            _check_part(name, part, (batch, heads, None, width), query)
    if history is not None:
        check("history.keys", history.keys, (batch, heads, None, history.form.key_record_bytes), torch.uint8, device)
        if history.form.width != width:
            raise ValueError(f"history has {history.form.width} channels; allowed: {width}, as the query")
    form = history.form if history is not None else Form(width, (Segment(width, 2, "minimum"),))
    ratio = query.shape[1] // heads
    tiles = batch * heads * -(-ratio // HEADS_AT_ONCE)
    if plan is None:
        plan = _choose(form, tiles, history.max_length if history is not None else 0, device)
    maps = tuple(tensor is not None for tensor in _maps(history))
    kernels = _kernels(form, plan.chunks, plan.warps, plan.blocks, query.dtype == torch.bfloat16, maps, device)
    with torch.cuda.device(device):
        return _launch(kernels, query, history, residual, prefix, scaling, plan, ratio)


def _check_part(name: str, part: FullPrecision, shape: tuple, query: torch.Tensor) -> None:
    for side in ("keys", "values"):
        states = getattr(part, side)
        check(f"{name}.{side}", states, shape, query.dtype, query.device)
        if states.data_ptr() % 16 or any(stride % 8 for stride in states.stride()[:3]):
            raise ValueError(f"{name}.{side} has strides {states.stride()}; rows must begin at multiples of 16 bytes: use .contiguous()")


def _launch(
    kernels: _Kernels,
    query: torch.Tensor,
    history: FragmentHistory | None,
    residual: FullPrecision,
    prefix: FullPrecision | None,
    scaling: float,
    plan: Plan,
    ratio: int,
) -> torch.Tensor:
    batch, query_heads, _, width = query.shape
    heads = query_heads // ratio
    rows = batch * query_heads
    stream = torch.cuda.current_stream(query.device).cuda_stream
    out = torch.empty_like(query)
    partial = weights = None
    if plan.splits > 1:
        partial = torch.empty(rows, plan.splits, width, dtype=torch.float32, device=query.device)
        weights = torch.empty(rows, plan.splits, dtype=torch.float32, device=query.device)
    packed = [None] * 7
    if history is not None:
        packed = [history.keys, history.values, history.lengths, history.key_scale_max, history.value_scale_max]
        packed += history.units or (None, None)
    keys, values, lengths, key_bound, value_bound, *units = map(nvrtc.pointer, packed)
    order, matrix, center = _maps(history)
    arguments = (
        keys, values, ctypes.c_longlong(0 if history is None else history.keys.shape[2]), lengths, nvrtc.pointer(query),
        key_bound, value_bound, nvrtc.pointer(order), *_strides(order), nvrtc.pointer(matrix), nvrtc.pointer(center), *_strides(center),
        *units, _part(residual), _part(prefix), nvrtc.pointer(partial), nvrtc.pointer(weights), nvrtc.pointer(out), ctypes.c_int(heads),
        ctypes.c_int(ratio), ctypes.c_uint(-(-(1 << 32) // (plan.splits * plan.warps))), ctypes.c_float(scaling * LOG2_E),
    )  # fmt: skip
    grid = (plan.splits, heads * -(-ratio // HEADS_AT_ONCE), batch)
    nvrtc.launch(kernels.attend, grid, 32 * plan.warps, kernels.shared_bytes, stream, arguments)
    if plan.splits > 1:
        arguments = (nvrtc.pointer(partial), nvrtc.pointer(weights), nvrtc.pointer(out), ctypes.c_int(plan.splits))
        nvrtc.launch(kernels.merge, (rows, 1, 1), 4 * width, 0, stream, arguments, is_early=kernels.can_start_early)
    return out


@dataclass(frozen=True)
class _Kernels:
    attend: Any
    merge: Any
    shared_bytes: int
    can_start_early: bool


@functools.cache
def _kernels(
    form: Form, chunks: int, warps: int, blocks: int, is_brain: bool, maps: tuple[bool, bool, bool], device: torch.device
) -> _Kernels:
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        raise nvrtc.KernelError(f"{device} has compute capability {capability[0]}.{capability[1]}; the CUDA kernels need 8.0 or newer")
    constants = {
        **form.constants(),
        "RECORDS": max(1, chunks // form.chunks),
        "WARPS": warps,
        "MIN_BLOCKS": blocks,
        "BRAIN": int(is_brain),
        **dict(zip(("ORDERED", "MAPPED", "CENTERED"), map(int, maps), strict=True)),
    }
    code = nvrtc.compile_kernels(SOURCE.read_text(encoding="utf-8"), constants, capability)
    shared_bytes = _shared_bytes(form, chunks, warps)
    with torch.cuda.device(device):
        module = nvrtc.load(code)
        attend_kernel, merge_kernel = nvrtc.function(module, "attend", shared_bytes), nvrtc.function(module, "merge")
    return _Kernels(attend_kernel, merge_kernel, shared_bytes, capability >= (9, 0))


def _shared_bytes(form: Form, chunks: int, warps: int) -> int:
    records = max(1, chunks // form.chunks)
    slots = warps * (records * (form.key_record_bytes + form.value_record_bytes) + 16)
    row = 4 * (16 * form.key_steps + 4)
    mapped = 8 * max(row, 2 * (form.width + 8)) + 16 * form.width
    if form.metadata_bits == 4:
        mapped += 6 * (16 * form.key_steps + form.width) + 8 * row + 64 * (-(-form.key_steps // 4) * 4) + 32
    return max(slots + 512 * form.offset_rows + mapped, warps * 8 * (form.width + 3) * 4)


@functools.cache
def _choose(form: Form, tiles: int, max_length: int, device: torch.device) -> Plan:
    """Choose a plan: sizes were measured on an H200 (kernels/NOTES.md)."""
    properties = torch.cuda.get_device_properties(device)
    blocks_each = tiles * max_length / 32 / properties.multi_processor_count
    chunks, warps = next(plan for most, plan in PLANS if blocks_each < most)
    if form.is_value_offset_stored or form.metadata_bits == 4:
        warps = min(warps, 8)  # what they add needs registers
    limit = properties.shared_memory_per_block_optin
    while chunks > 1 and _shared_bytes(form, chunks, warps) > limit:
        chunks //= 2
    splits = choose_splits(tiles, -(-max_length // form.group_size), warps, properties.multi_processor_count)
    return Plan(chunks, warps, 1, splits)


def choose_splits(tiles: int, records: int, warps: int, slots: int) -> int:
    """Return by how many blocks the records of a head are shared, so that the blocks fill the device in as few rounds as possible.

    Args:
        tiles: heads, in blocks of 8 query heads, of all sequences.
        records: of a head.
        slots: blocks that run at the same time.
    """
    fixed = 2  # what a block costs besides its records, in records of a warp
    most = max(1, min(-(-records // warps), 256))

    def cost(splits: int) -> float:
        return -(-tiles * splits // slots) * (records / (splits * warps) + fixed) + (0.5 if splits > 1 else 0)

    return min(range(1, most + 1), key=cost)


def _maps(history: FragmentHistory | None) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What stands between query and stored keys: order, matrix in fragments, center."""
    return (None, None, None) if history is None else (history.order, history.matrix_fragments, history.center)


def _strides(tensor: torch.Tensor | None) -> tuple[ctypes.c_longlong, ctypes.c_longlong]:
    """Strides of batch and heads, zero where one serves all."""
    if tensor is None:
        return ctypes.c_longlong(0), ctypes.c_longlong(0)
    return tuple(ctypes.c_longlong(tensor.stride(axis) if tensor.shape[axis] > 1 else 0) for axis in range(2))


def _part(part: FullPrecision | None) -> _Part:
    if part is None:
        return _Part()
    pointers = (part.keys.data_ptr(), part.values.data_ptr(), part.lengths.data_ptr())
    return _Part(*pointers, *part.keys.stride()[:3], *part.values.stride()[:3])
