"""Quantize keys and pack them into buffers of `packed.PackedKeys`, with the rules of `encode`.

Channels are taken in a given order: first the wide ones, min-max in 2 bits, then the normal ones, in 1 bit. Normal channels may be
transformed first, x @ transform. A group is S tokens of one channel. What 1 bit means follows from the segments of the buffers:

    minimum           min-max of 1 bit
    mean, or centred  signs, levels m - s and m + s, m = 0 for centred
    none              signs, levels 0 and s
    none and centred  the same, and read back as -s / 2 and s / 2 in the second segment: the imaginary parts of a spectrum, see
                      `real_fourier`

Source: arXiv:2503.16257, Algorithms 1 and 3; levels and real layout as in `vidkv_eval.quant`.
"""

from __future__ import annotations

import math

import torch

from vidkv_kernels.encode import encode_minmax, encode_sign
from vidkv_kernels.op import Op
from vidkv_kernels.packed import STORED_KINDS, PackedKeys, Segment, check, check_packed, pack_words
from vidkv_kernels.quantize_values import exact_states
from vidkv_kernels.span import Span, check_states

NORMAL_KINDS = ((), ("minimum",), ("mean",), ("centred",), ("none",), ("none", "centred"))


def quantize_keys_reference(
    states: torch.Tensor, span: Span, order: torch.Tensor, transform: torch.Tensor | None, keys: PackedKeys
) -> PackedKeys:
    """Quantize a span of keys into buffers.

    Args:
        states: [B, H, T, D], after rotary embedding.
        span: tokens to take and to fill.
        order: int32 [B, D], all channels, the wide ones first; as `choose_channels` gives it.
        transform: float32 [n, n] for the n normal channels; None: none.
        keys: buffers, written in place. What attention needs besides is the order, and the matrix that `key_matrix` gives.
    Returns:
        `keys`.
    Raises:
        ValueError: the buffers are of a kind that this operation does not make, or do not fit the states.
    """
    check_keys(states, span, order, transform, keys)
    size, split = keys.group_size, keys.wide_channels
    for row, (begin, count, start) in enumerate(span.rows()):
        count -= count % size
        groups = states[row, :, begin : begin + count][..., order[row].long()].float().unflatten(1, (-1, size))  # [H, G, S, D]
        if transform is not None:
            groups = torch.cat([groups[..., :split], groups[..., split:] @ transform], dim=-1)
        blocks, place = slice(start // 32, (start + count) // 32), slice(start // size, (start + count) // size)
        for channels, nbits in ((slice(0, split), 2), (slice(split, keys.channels), 1)):
            part = groups[..., channels]
            if not part.shape[-1]:
                continue
            kind = "minimum" if nbits == 2 else normal_kinds(keys)[0]
            codes, scale, offset = encode_minmax(part, 1 << nbits, 2) if kind == "minimum" else encode_sign(part, kind, 2)
            words = slice(0, 2 * split) if nbits == 2 else slice(2 * split, None)
            keys.codes[row, :, blocks, words] = pack_words(codes.flatten(1, 2), nbits)
            keys.scale[row, :, place, channels] = scale
            if offset is not None:
                keys.offset[row, :, place, channels] = offset
    return keys


def normal_kinds(keys: PackedKeys) -> tuple[str, ...]:
    """Return the kinds of offset of the segments of 1 bit."""
    return tuple(segment.offset for segment in keys.segments if segment.nbits == 1)


def check_keys(states: torch.Tensor, span: Span, order: torch.Tensor, transform: torch.Tensor | None, keys: PackedKeys) -> None:
    """Raise a ValueError unless `quantize_keys` can fill these buffers."""
    check_states("states", states, span, keys.codes, keys.channels)
    check_packed("order", order, (states.shape[0], keys.channels), torch.int32, keys.device)
    if transform is not None:
        normal = keys.channels - keys.wide_channels
        check_packed("transform", transform, (normal, normal), torch.float32, keys.device)
    wide = {segment.offset for segment in keys.segments if segment.nbits == 2}
    if wide - {"minimum"} or normal_kinds(keys) not in NORMAL_KINDS or any(segment.is_ternary for segment in keys.segments):
        raise ValueError(f"keys.segments is {keys.segments}; allowed: 2 bits with minimum, then 1 bit with {NORMAL_KINDS[1:]}")
    for name in ("scale", "offset"):
        tensor = getattr(keys, name)
        if tensor is not None:
            check(f"keys.{name}", tensor, (None,) * 4, torch.float16, keys.device)


def real_fourier(channels: int, device: torch.device) -> torch.Tensor:
    """Return the orthonormal real Fourier transform as a matrix, float32 [n, n]: x @ matrix is the spectrum of x.

    Columns: the real parts of frequencies 0 .. n // 2, then the imaginary parts of the frequencies between 0 and n / 2.
    """
    place = torch.arange(channels, dtype=torch.float64)
    paired = torch.arange(1, (channels + 1) // 2, dtype=torch.float64)
    angle = 2 * math.pi / channels
    real = torch.cos(angle * place[:, None] * torch.arange(channels // 2 + 1)) / math.sqrt(channels)
    real[:, 1 : (channels + 1) // 2] *= math.sqrt(2)
    imaginary = -torch.sin(angle * place[:, None] * paired) * math.sqrt(2 / channels)
    return torch.cat([real, imaginary], dim=1).float().to(device)


def key_matrix(channels: int, transform: torch.Tensor) -> torch.Tensor:
    """Return what a query of so many channels, in the order of the keys, is multiplied with to meet keys transformed like this."""
    matrix = torch.eye(channels, dtype=torch.float32, device=transform.device)
    wide = channels - transform.shape[0]
    matrix[wide:, wide:] = transform
    return matrix


def make_keys(
    batch: int, heads: int, tokens: int, segments: tuple[Segment, ...], group_size: int, device: torch.device
) -> PackedKeys:
    """Make buffers for `tokens` keys of each sequence; their order and matrix are the caller's to give."""
    channels = sum(segment.channels for segment in segments)
    stored = sum(segment.channels for segment in segments if segment.offset in STORED_KINDS)
    words = sum(segment.nbits * segment.channels for segment in segments)
    metadata = {"dtype": torch.float16, "device": device}
    return PackedKeys(
        segments, group_size,
        torch.empty(batch, heads, tokens // 32, words, dtype=torch.int32, device=device),
        torch.empty(batch, heads, tokens // group_size, channels, **metadata),
        torch.empty(batch, heads, tokens // group_size, stored, **metadata) if stored else None,
    )  # fmt: skip


def cases(device: torch.device) -> dict[str, tuple]:
    """Return awkward inputs of `quantize_keys`; sums of their numbers are exact in any order."""
    half, single, brain = torch.float16, torch.float32, torch.bfloat16
    wide, few_wide = Segment(32, 2, "minimum"), Segment(12, 2, "minimum")
    real, imaginary = Segment(17, 1, "none"), Segment(15, 1, "centred")
    calls = {
        "signs around the mean, transformed": (half, [0], [64], [0], (wide, Segment(32, 1, "mean")), 32, True),
        "as published, transformed": (half, [2], [96], [32], (wide, real, imaginary), 32, True),
        "signs around zero, few wide channels": (single, [0], [64], [0], (few_wide, Segment(52, 1, "centred")), 32, False),
        "one level zero": (half, [0], [32], [0], (few_wide, Segment(52, 1, "none")), 32, False),
        "more tokens than one program takes": (half, [0], [160], [32], (wide, Segment(32, 1, "mean")), 32, True),
        "only wide channels": (half, [0], [64], [64], (Segment(64, 2, "minimum"),), 32, False),
        "min-max of 1 bit": (half, [0], [64], [0], (Segment(64, 1, "minimum"),), 32, False),
        "groups of 64": (half, [1], [64], [64], (wide, Segment(32, 1, "mean")), 64, True),
        "groups of 128": (brain, [0], [128], [0], (wide, Segment(32, 1, "mean")), 128, False),
        "sequences of different length, one empty": (brain, [0, 5, 70], [96, 0, 45], [0, 64, 32], (wide, real, imaginary), 32, True),
    }
    return {name: _case(device, *call) for name, call in calls.items()}


def _case(
    device: torch.device, dtype: torch.dtype, begin: list[int], count: list[int], start: list[int],
    segments: tuple[Segment, ...], group_size: int, is_transformed: bool,
) -> tuple[torch.Tensor, Span, torch.Tensor, torch.Tensor | None, PackedKeys]:  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    room = max(first + number for first, number in zip(begin, count, strict=True)) + 1
    states = exact_states(generator, dtype, len(begin), room, 2, 64).transpose(1, 2)
    order = torch.stack([torch.randperm(64, generator=generator, device=device) for _ in begin]).int()
    normal = sum(segment.channels for segment in segments if segment.nbits == 1)
    # Signs instead of a Fourier transform: all sums stay exact.
    transform = torch.randint(0, 2, (normal, normal), generator=generator, device=device).float() * 2 - 1 if is_transformed else None
    keys = make_keys(len(begin), 2, 256, segments, group_size, device)
    return states, Span.of(device, begin, count, start), order, transform, keys


OP = Op("quantize_keys", quantize_keys_reference, cases, is_exact=True)
