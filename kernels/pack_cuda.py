"""Tokens from the portable layout, or as bytes, into the records of a `FragmentHistory`, by the kernels of `pack_cuda.cu`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from vidkv_kernels import nvrtc
from vidkv_kernels.fragments import Form
from vidkv_kernels.packed import PackedKeys, PackedValues

SOURCE = Path(__file__).with_name("pack_cuda.cu")
THREADS = 128


def write_keys(
    form: Form, keys: PackedKeys, records: torch.Tensor, scale_max: torch.Tensor, starts: torch.Tensor, counts: torch.Tensor, tokens: int
) -> None:
    """Write new keys into records.

    Args:
        records: uint8 [B, H, capacity, key_record_bytes].
        scale_max: float32 [B, H], raised to the largest scale.
        starts: int32 [B], tokens in front of the new ones, in whole groups.
        counts: int32 [B], new tokens.
        tokens: how many of the source's tokens to look at, in whole groups.
    """
    arguments = (
        nvrtc.pointer(keys.codes), nvrtc.pointer(keys.scale), nvrtc.pointer(keys.offset), ctypes.c_longlong(keys.scale.shape[2]),
        ctypes.c_int(form.stored_offsets), nvrtc.pointer(starts), nvrtc.pointer(counts), nvrtc.pointer(records),
        ctypes.c_longlong(records.shape[2]), nvrtc.pointer(scale_max),
    )  # fmt: skip
    _launch(_kernels(form, False, records.device)[0], form, records, tokens, arguments)


def write_values(
    form: Form, run: PackedValues, records: torch.Tensor, scale_max: torch.Tensor, starts: torch.Tensor, entries: int
) -> None:
    """Write the entries of a run into records; as `write_keys`, `run.lengths` being the counts."""
    arguments = (
        nvrtc.pointer(run.codes), nvrtc.pointer(run.scale), nvrtc.pointer(run.offset), ctypes.c_longlong(run.entries),
        nvrtc.pointer(starts), nvrtc.pointer(run.lengths), nvrtc.pointer(records), ctypes.c_longlong(records.shape[2]),
        nvrtc.pointer(scale_max),
    )  # fmt: skip
    _launch(_kernels(form, False, records.device)[1], form, records, entries, arguments)


def write_bytes(
    form: Form, which: int, codes: torch.Tensor, metadata: torch.Tensor, records: torch.Tensor, starts: torch.Tensor, counts: torch.Tensor
) -> None:
    """Write new tokens into records; metadata of 4 bits.

    Args:
        which: 0: keys, 1: values.
        codes: uint8 [B, H, T, C], T in whole groups.
        metadata: uint8 [B, H, T / S, C], scale in the upper half, offset in the lower one.
        records, starts, counts: as in `write_keys`.
    """
    room = codes.shape[2]
    size = (ctypes.c_longlong(metadata.shape[2]), ctypes.c_int(0)) if which == 0 else (ctypes.c_longlong(room),)
    arguments = (
        nvrtc.pointer(codes), nvrtc.pointer(metadata), nvrtc.pointer(None), *size, nvrtc.pointer(starts), nvrtc.pointer(counts),
        nvrtc.pointer(records), ctypes.c_longlong(records.shape[2]), nvrtc.pointer(None),
    )  # fmt: skip
    _launch(_kernels(form, True, records.device)[which], form, records, room, arguments)


def _launch(kernel: Any, form: Form, records: torch.Tensor, tokens: int, arguments: tuple) -> None:
    batch, heads = records.shape[:2]
    grid = (tokens // form.group_size, heads, batch)
    if grid[0]:
        with torch.cuda.device(records.device):
            nvrtc.Launch(kernel, grid, THREADS, 0, arguments)(torch.cuda.current_stream(records.device).cuda_stream)


@functools.cache
def _kernels(form: Form, has_bytes: bool, device: torch.device) -> tuple[Any, Any]:
    constants = {**form.constants(), "BYTES": int(has_bytes)}
    code = nvrtc.compile_kernels(SOURCE.read_text(encoding="utf-8"), constants, torch.cuda.get_device_capability(device))
    with torch.cuda.device(device):
        module = nvrtc.load(code)
        return nvrtc.function(module, "pack_keys"), nvrtc.function(module, "pack_values")
