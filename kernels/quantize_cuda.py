"""Keys and values quantized straight into the records of a `FragmentHistory`, by the kernels of `quantize_cuda.cu`.

What they compute is what `choose_channels_reference`, `quantize_keys_reference` and `quantize_values_reference` define; where sums are
rounded, in another order, so that an element at the border of two codes may get the other one.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vidkv_kernels import nvrtc
from vidkv_kernels.fragments import STEP, Form, UnsupportedForm
from vidkv_kernels.quantize_keys import NORMAL_KINDS, key_matrix

if TYPE_CHECKING:
    from vidkv_kernels.fragment_history import FragmentHistory

SOURCE = Path(__file__).with_name("quantize_cuda.cu")
OLDEST_CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# As in the source.
KINDS = ("minimum of 2 bits", "minimum", "mean", "centred", "none", "ternary")
RANGE_THREADS, RANGE_TOKENS = 256, 128
MATRIX_UNIT = 256.0


class _States(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((axis, ctypes.c_longlong) for axis in ("batch", "head", "token")),
        ("begin", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
    ]


class _Kernels(NamedTuple):
    choose: Any
    keys: Any
    values: Any
    shared_bytes: int


def check_form(form: Form) -> None:
    """Raise an UnsupportedForm unless `append` can fill histories of this form."""
    kinds = tuple(segment.offset for segment in form.segments if segment.nbits == 1)
    wide = {segment.offset for segment in form.segments if segment.nbits == 2}
    if form.is_protected:
        raise UnsupportedForm("protected tokens have values of another kind; states are quantized to one kind")
    if form.metadata_bits != 16:
        raise UnsupportedForm(f"metadata has {form.metadata_bits} bits; states are quantized with 16")
    if form.channels != form.width or wide - {"minimum"} or kinds not in NORMAL_KINDS or any(s.levels == 3 for s in form.segments):
        raise UnsupportedForm(
            f"keys of {form.width} channels are stored as {form.segments}; states are quantized to all channels, "
            f"2 bits with minimum, then 1 bit with {NORMAL_KINDS[1:]}"
        )
    allowed = {2: ("minimum", "mean", "none", "centred"), 3: ("centred",), 4: ("minimum",)}[form.levels]
    if form.offset_kind not in allowed or not (form.is_scaled or form.levels == 3):
        raise UnsupportedForm(
            f"values have {form.levels} levels, offset_kind {form.offset_kind!r} and {'a' if form.is_scaled else 'no'} scale; states are "
            f"quantized to {', '.join(allowed)} with so many levels, and only ternary codes can be without scale"
        )


def choose_order(history: FragmentHistory, keys: torch.Tensor, begin: torch.Tensor | None, count: torch.Tensor | None) -> None:
    """Write the order of channels of `history`. See `FragmentHistory.choose_order`."""
    check_form(history.form)
    batch, heads, tokens, _ = keys.shape
    kernels = _kernels(history.form, keys.dtype, history.matrix is not None, history.device)
    keys = _aligned(keys)
    wide = ctypes.c_int(history.form.wide_channels)
    arguments = (_states(keys, begin, count), wide, nvrtc.pointer(history.scratch), nvrtc.pointer(history.order))
    grid = (max(-(-tokens // RANGE_TOKENS), 1), heads, batch)
    with torch.cuda.device(history.device):
        nvrtc.Launch(kernels.choose, grid, RANGE_THREADS, 0, arguments)(torch.cuda.current_stream().cuda_stream)


def append(
    history: FragmentHistory,
    keys: torch.Tensor,
    values: torch.Tensor,
    threshold: float,
    begin: torch.Tensor | None,
    count: torch.Tensor | None,
) -> None:
    """Quantize tokens behind those that `history` holds; its lengths stay as they are. See `FragmentHistory.quantize`."""
    form = history.form.plain
    check_form(form)
    batch, heads, tokens, width = keys.shape
    grid = (tokens // form.group_size, heads, batch)
    if not grid[0]:
        return
    kernels = _kernels(form, keys.dtype, history.matrix is not None, history.device)
    matrix = None if history.matrix is None else _matrix_parts(form, history.matrix, keys.dtype)
    order = history.order
    strides = (0, 0) if order is None else (order.stride(axis) if order.shape[axis] > 1 else 0 for axis in range(2))
    keys, values = _aligned(keys), _aligned(values)
    value_places = history.value_places
    starts, value_starts = nvrtc.pointer(history.lengths), nvrtc.pointer(value_places)
    capacity, faults = ctypes.c_longlong(history.keys.shape[2]), nvrtc.pointer(history.faults)
    key_arguments = (
        _states(keys, begin, count), nvrtc.pointer(order), *map(ctypes.c_longlong, strides), nvrtc.pointer(matrix), starts,
        nvrtc.pointer(history.keys), capacity, nvrtc.pointer(history.key_scale_max), faults,
    )  # fmt: skip
    value_arguments = (
        _states(values, begin, count), ctypes.c_float(threshold), value_starts, nvrtc.pointer(history.values), capacity,
        nvrtc.pointer(history.value_scale_max), faults,
    )  # fmt: skip
    with torch.cuda.device(history.device):
        stream = torch.cuda.current_stream().cuda_stream
        nvrtc.Launch(kernels.keys, grid, 2 * width, kernels.shared_bytes, key_arguments)(stream)
        nvrtc.Launch(kernels.values, grid, width, 0, value_arguments)(stream)


def _aligned(states: torch.Tensor) -> torch.Tensor:
    """Return states whose rows begin at multiples of 16 bytes, as they are loaded: a copy if need be."""
    steps = [stride * states.itemsize for stride, size in zip(states.stride()[:3], states.shape, strict=False) if size > 1]
    if states.data_ptr() % 16 or any(step % 16 for step in steps):
        return states.clone(memory_format=torch.contiguous_format)
    return states


def _states(states: torch.Tensor, begin: torch.Tensor | None, count: torch.Tensor | None) -> _States:
    strides = (stride * states.itemsize for stride in states.stride()[:3])
    bounds = (None if tensor is None else tensor.data_ptr() for tensor in (begin, count))
    return _States(states.data_ptr(), *strides, *bounds, states.shape[2])


def _mapped_from(form: Form) -> int:
    """First channel of the first fragment with transformed channels."""
    return form.wide_channels // STEP * STEP


@functools.lru_cache(maxsize=64)
def _matrix_parts(form: Form, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Split the matrix of keys, float32 [D, D], into a sum of numbers of half the bytes, in the order of fragments.

    Once for all who share that tensor; waits for the device.
    """
    wide = form.wide_channels
    if not torch.equal(matrix, key_matrix(form.width, matrix[wide:, wide:])):
        raise UnsupportedForm(f"the matrix of keys changes the {wide} channels of 2 bits; states are quantized with these as they are")
    first = _mapped_from(form)
    rest, parts = matrix[first:, first:], []
    if dtype == torch.float16:
        rest = MATRIX_UNIT * rest
    for _ in range(2 if dtype == torch.float16 else 3):
        parts.append(rest.to(torch.float16 if dtype == torch.float16 else torch.bfloat16))
        rest = rest - parts[-1].float()
    # [part, k, half, t, e, step, kh, g] to [step, k, part, g, t, kh, half, e]
    fields = torch.stack(parts).unflatten(2, (-1, 2, 8)).unflatten(1, (-1, 2, 4, 2))
    return fields.permute(5, 1, 0, 7, 3, 6, 2, 4).contiguous()


@functools.cache
def _kernels(form: Form, dtype: torch.dtype, is_mapped: bool, device: torch.device) -> _Kernels:
    kinds = [segment.offset for segment in form.segments if segment.nbits == 1]
    value_kind = {3: "ternary", 4: "minimum of 2 bits"}.get(form.levels, form.offset_kind)
    constants = {
        **form.constants(),
        "STATES": DTYPES.index(dtype),
        "NORMAL_KIND": KINDS.index(kinds[0] if kinds else "none"),
        "VALUE_KIND": KINDS.index(value_kind),
        "MAPPED_FROM": _mapped_from(form) if is_mapped else form.width,
    }
    # As ROW in the source.
    row = form.width * dtype.itemsize + (32 if dtype == torch.float32 else 16)
    shared_bytes = form.group_size * row
    with torch.cuda.device(device):
        module = _load(constants, device)
        return _Kernels(
            nvrtc.function(module, "choose_channels"),
            nvrtc.function(module, "quantize_keys", shared_bytes),
            nvrtc.function(module, "quantize_values"),
            shared_bytes,
        )


def _load(constants: dict[str, int], device: torch.device) -> Any:
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        raise nvrtc.KernelError(f"{device} has compute capability {capability}; these kernels need {OLDEST_CAPABILITY} or newer")
    return nvrtc.load(nvrtc.compile_kernels(SOURCE.read_text(encoding="utf-8"), constants, capability))
