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


class _Fresh(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        *((f"{tensor}_{axis}", ctypes.c_longlong) for tensor in ("key", "value") for axis in ("batch", "head")),
    ]


class _Chosen(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "marks", "before")),
        *((name, ctypes.c_longlong) for name in ("capacity", "blocks")),
    ]


class _Part(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
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

    Args and errors are those of `Attend` and of its call.
    """
    check_packed("query", query, (None,) * 4, DTYPES, residual.keys.device)
    return Attend(history, residual, query.shape[1], scaling, prefix, plan)(query)


class Attend:
    """`attend` over buffers that stay where they are, looked at once; a call brings a query, and may bring a token.

    Nothing waits for the device: lengths are read there, and the grid follows from the room of the history. A captured CUDA graph
    of a call stays right while the lengths grow.

    Args:
        history: packed keys and values, or None if there are none.
        residual: newest tokens, float16 or bfloat16; rows must start at multiples of 16 bytes. D is 64 or 128.
        query_heads: HQ, a multiple of H.
        scaling: factor of the scores.
        prefix: oldest tokens in full precision, as residual.
        plan: how the work is cut; None: chosen from the sizes.
    Raises:
        ValueError: a tensor does not fit, by name; in a call, also if the history has moved to other buffers.
        KernelError: no compiler, or a device older than compute capability 8.0.
    """

    def __init__(
        self,
        history: FragmentHistory | None,
        residual: FullPrecision,
        query_heads: int,
        scaling: float,
        prefix: FullPrecision | None = None,
        plan: Plan | None = None,
    ):
        batch, heads, _, width = residual.keys.shape
        device, dtype = residual.keys.device, residual.keys.dtype
        if device.type != "cuda":
            raise ValueError(f"residual is on {device}; allowed: a CUDA device")
        if width not in (64, 128):
            raise ValueError(f"residual has {width} channels; allowed: 64, 128")
        if query_heads < 1 or query_heads % heads:
            raise ValueError(f"query has {query_heads} heads; allowed: multiples of {heads}, the key/value heads")
        for name, part in (("residual", residual), ("prefix", prefix)):
            if part is not None:
                _check_part(name, part, (batch, heads, None, width), DTYPES if part is residual else (dtype,), device)
        if history is not None:
            check("history.keys", history.keys, (batch, heads, None, history.form.key_record_bytes), torch.uint8, device)
            if history.form.width != width:
                raise ValueError(f"history has {history.form.width} channels; allowed: {width}, as the residual")
        form = history.form if history is not None else Form(width, (Segment(width, 2, "minimum"),))
        ratio = query_heads // heads
        head_blocks = -(-ratio // HEADS_AT_ONCE)
        if plan is None:
            plan = _choose(form, batch * heads * head_blocks, 0 if history is None else history.capacity, device)
        order, matrix, center = maps = _maps(history)
        has_maps = tuple(tensor is not None for tensor in maps)
        kernels = _kernels(form, plan.chunks, plan.warps, plan.blocks, dtype == torch.bfloat16, has_maps, device)
        self.device = device
        self._shape = torch.Size((batch, query_heads, 1, width))
        self._fresh_shape = torch.Size((batch, heads, 1, width))
        self._dtype = dtype
        self._kept = (history, residual, prefix)  # whose memory the arguments point to
        self._version = 0 if history is None else history.version
        self._query, self._out, self._fresh = ctypes.c_void_p(), ctypes.c_void_p(), _Fresh()
        self._splits = plan.splits if plan.splits > 1 else 0
        self._partial, self._weights = ctypes.c_void_p(), ctypes.c_void_p()
        packed = [None] * 7
        if history is not None:
            packed = [history.keys, history.values, history.lengths, history.key_scale_max, history.value_scale_max]
            packed += history.units or (None, None)
        keys, values, lengths, key_bound, value_bound, *units = map(nvrtc.pointer, packed)
        # What a block needs first comes first: each line of parameters is waited for.
        arguments = (
            ctypes.c_int(heads), ctypes.c_int(ratio), ctypes.c_uint(-(-(1 << 32) // (plan.splits * plan.warps))),
            ctypes.c_float(scaling * LOG2_E), nvrtc.pointer(order), *_strides(order), lengths, nvrtc.pointer(residual.lengths),
            nvrtc.pointer(None if prefix is None else prefix.lengths), keys, values,
            ctypes.c_longlong(0 if history is None else history.keys.shape[2]), self._query, key_bound, value_bound, nvrtc.pointer(matrix),
            self._fresh, _part(residual), *units, nvrtc.pointer(center), *_strides(center), _chosen(history), self._partial, self._weights,
            self._out, _part(prefix),
        )  # fmt: skip
        grid = (plan.splits, heads * head_blocks, batch)
        with torch.cuda.device(device):
            self._launches = [nvrtc.Launch(kernels.attend, grid, 32 * plan.warps, kernels.shared_bytes, arguments)]
            if plan.splits > 1:
                arguments = (self._partial, self._weights, self._out, ctypes.c_int(plan.splits))
                early = {"is_early": kernels.can_start_early}
                threads = width if plan.splits <= 4 else 2 * width  # 4 or 8 splits at a time
                self._launches.append(nvrtc.Launch(kernels.merge, (batch * query_heads, 1, 1), threads, 0, arguments, **early))

    def __call__(self, query: torch.Tensor, new: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Attend.

        Args:
            query: [B, HQ, 1, D], contiguous, dtype of the residual.
            new: keys and values, [B, H, 1, D], of one more token of each sequence. It is attended to, and written behind the residual,
                which must have room for it; the lengths are left for the caller to raise.
        Returns:
            [B, HQ, 1, D] in the dtype of the query; zeros for a sequence without tokens.
        """
        if self._kept[0] is not None and self._kept[0].version != self._version:
            raise ValueError("history has moved to other buffers since this was made; make it again")
        if query.shape != self._shape or query.dtype != self._dtype or query.device != self.device or not query.is_contiguous():
            check_packed("query", query, tuple(self._shape), self._dtype, self.device)
        fresh = self._fresh
        if new is None:
            fresh.keys = None
        else:
            keys, values = new
            for name, states in (("new keys", keys), ("new values", values)):
                if states.shape != self._fresh_shape or states.dtype != self._dtype or states.device != self.device:
                    check(name, states, tuple(self._fresh_shape), self._dtype, self.device)
            fresh.key_batch, fresh.key_head, _, key_step = keys.stride()
            fresh.value_batch, fresh.value_head, _, value_step = values.stride()
            fresh.keys, fresh.values = keys.data_ptr(), values.data_ptr()
            if key_step != 1 or value_step != 1 or (
                fresh.keys | fresh.values | 2 * (fresh.key_batch | fresh.key_head | fresh.value_batch | fresh.value_head)
            ) % 16:
                raise ValueError(
                    f"new keys and values have strides {keys.stride()}, {values.stride()}; rows must begin at multiples of 16 bytes"
                )
        out = torch.empty_like(query)
        self._query.value, self._out.value = query.data_ptr(), out.data_ptr()
        if self._splits:
            rows, width = self._shape[0] * self._shape[1], self._shape[3]
            partial = torch.empty(rows * self._splits * (width + 1), dtype=torch.float32, device=self.device)
            self._partial.value = partial.data_ptr()
            self._weights.value = self._partial.value + 4 * rows * self._splits * width
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if torch.cuda.current_device() == self.device.index:
            for launch in self._launches:
                launch(stream)
        else:
            with torch.cuda.device(self.device):
                for launch in self._launches:
                    launch(stream)
        return out


def _check_part(name: str, part: FullPrecision, shape: tuple, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    for side in ("keys", "values"):
        states = getattr(part, side)
        check(f"{name}.{side}", states, shape, dtypes, device)
        if states.data_ptr() % 16 or any(stride % 8 for stride in states.stride()[:3]):
            raise ValueError(f"{name}.{side} has strides {states.stride()}; rows must begin at multiples of 16 bytes: use .contiguous()")


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
    barriers = -(-warps * (32 if form.is_protected else 16) // 128) * 128
    slots = warps * records * (form.key_record_bytes + form.value_record_bytes)
    if form.is_protected:
        rows = 2 * max(2 * records, 4) * form.group_size + 1  # of two queues of probabilities, 16 bytes each
        slots += warps * (form.value_record_bytes + 2 * form.protected.value_record_bytes + 16 * rows)
    row = 4 * (16 * form.key_steps + 4)
    mapped = 8 * max(row, 2 * (form.width + 8)) + 16 * form.width
    if form.metadata_bits == 4:
        mapped += 6 * (16 * form.key_steps + form.width) + 8 * row + 64 * (-(-form.key_steps // 4) * 4) + 32
    return barriers + max(slots + 512 * form.offset_rows + mapped, warps * 8 * (form.width + 3) * 4)


@functools.cache
def _choose(form: Form, tiles: int, room: int, device: torch.device) -> Plan:
    """Choose a plan: sizes were measured on an H200 (kernels/NOTES.md)."""
    properties = torch.cuda.get_device_properties(device)
    blocks_each = tiles * room / 32 / properties.multi_processor_count
    chunks, warps = next(plan for most, plan in PLANS if blocks_each < most)
    if form.is_value_offset_stored or form.metadata_bits == 4 or form.is_protected:
        warps = min(warps, 8)  # what they add needs registers
    # With protected tokens a warp reads up to two records of values more, so that the fewest keys are not worth one.
    least = 2 if form.is_protected else 1
    chunks = max(chunks, least)
    limit = properties.shared_memory_per_block_optin
    while chunks > 1 and _shared_bytes(form, chunks, warps) > limit:
        chunks //= 2
    while warps > 1 and _shared_bytes(form, chunks, warps) > limit:
        warps //= 2
    splits = choose_splits(tiles, -(-room // form.group_size), warps, properties.multi_processor_count, least)
    return Plan(chunks, warps, 1, splits)


def choose_splits(tiles: int, records: int, warps: int, slots: int, least: int = 1) -> int:
    """Return by how many blocks the records of a head are shared, so that the blocks fill the device in as few rounds as possible.

    Args:
        tiles: heads, in blocks of 8 query heads, of all sequences.
        records: of a head.
        slots: blocks that run at the same time.
        least: records of a warp, unless there are fewer than one block takes.
    """
    fixed = 2  # what a block costs besides its records, in records of a warp
    most = max(1, min(-(-records // (warps * least)), 256))

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


def _chosen(history: FragmentHistory | None) -> _Chosen:
    if history is None or history.protected is None:
        return _Chosen()
    own = history.protected
    return _Chosen(own.values.data_ptr(), own.marks.data_ptr(), own.before.data_ptr(), own.values.shape[2], own.marks.shape[1])


def _part(part: FullPrecision | None) -> _Part:
    if part is None:
        return _Part()
    pointers = (part.keys.data_ptr(), part.values.data_ptr())
    return _Part(*pointers, *part.keys.stride()[:3], *part.values.stride()[:3])
