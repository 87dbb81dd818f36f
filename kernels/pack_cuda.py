"""Packed tokens from the portable layout into the records of a `FragmentHistory`, by the kernels of `pack_cuda.cu`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vidkv_kernels import nvrtc
from vidkv_kernels.fragments import Form
from vidkv_kernels.packed import PackedKeys, PackedValues

if TYPE_CHECKING:
    from vidkv_kernels.fragment_history import FragmentHistory

SOURCE = Path(__file__).with_name("pack_cuda.cu")
THREADS = 128


def append(history: FragmentHistory, keys: PackedKeys, run: PackedValues, tokens: int) -> None:
    """Write new tokens behind those that `history` holds; its lengths stay as they are.

    Args:
        tokens: how many of the source's tokens to look at; `run.lengths` says how many are there.
    """
    form = history.form
    batch, heads, capacity = history.keys.shape[:3]
    kernels = _kernels(form, history.device)
    grid = (tokens // form.group_size, heads, batch)
    if not grid[0]:
        return
    stream = torch.cuda.current_stream(history.device).cuda_stream
    starts, counts = nvrtc.pointer(history.lengths), nvrtc.pointer(run.lengths)
    key_arguments = (
        nvrtc.pointer(keys.codes), nvrtc.pointer(keys.scale), nvrtc.pointer(keys.offset), ctypes.c_longlong(keys.scale.shape[2]),
        _segments(form), ctypes.c_int(form.stored_offsets), starts, counts, nvrtc.pointer(history.keys), ctypes.c_longlong(capacity),
        nvrtc.pointer(history.key_scale_max),
    )  # fmt: skip
    value_arguments = (
        nvrtc.pointer(run.codes), nvrtc.pointer(run.scale), nvrtc.pointer(run.offset), ctypes.c_longlong(run.entries), starts, counts,
        nvrtc.pointer(history.values), ctypes.c_longlong(capacity), nvrtc.pointer(history.value_scale_max),
    )  # fmt: skip
    with torch.cuda.device(history.device):
        nvrtc.Launch(kernels[0], grid, THREADS, 0, key_arguments)(stream)
        nvrtc.Launch(kernels[1], grid, THREADS, 0, value_arguments)(stream)


@functools.cache
def _kernels(form: Form, device: torch.device) -> tuple[Any, Any]:
    constants = {**form.constants(), "SEGMENTS": len(form.segments)}
    code = nvrtc.compile_kernels(SOURCE.read_text(encoding="utf-8"), constants, torch.cuda.get_device_capability(device))
    with torch.cuda.device(device):
        module = nvrtc.load(code)
        return nvrtc.function(module, "pack_keys"), nvrtc.function(module, "pack_values")


@functools.cache
def _segments(form: Form) -> ctypes.Structure:
    count = len(form.segments)

    class Segments(ctypes.Structure):
        _fields_ = [("first_channel", ctypes.c_int * (count + 1)), ("first_word", ctypes.c_int * count), ("bits", ctypes.c_int * count)]

    made = Segments()
    channel = word = 0
    for index, segment in enumerate(form.segments):
        made.first_channel[index], made.first_word[index], made.bits[index] = channel, word, segment.nbits
        channel += segment.channels
        word += segment.channels * segment.nbits
    made.first_channel[count] = channel
    return made
