"""From what quantizers store to the form that attention kernels read, `vidkv_kernels.packed`, and back to states.

Codes and metadata stay the same.
"""

from __future__ import annotations

import functools
import math

import torch

from vidkv_eval.quant.affine import Affine
from vidkv_eval.quant.base import QuantizedStates, Quantizer
from vidkv_eval.quant.grouped import GroupedQuantizer
from vidkv_eval.quant.grouping import ungroup
from vidkv_eval.quant.sign import Sign
from vidkv_eval.quant.spectral import Spectral
from vidkv_eval.quant.split_channels import SplitChannels
from vidkv_eval.quant.split_tokens import SplitTokens, split_positions
from vidkv_eval.quant.ternary import Ternary
from vidkv_kernels.layouts import LAYOUTS
from vidkv_kernels.packed import GROUP_SIZES, WORD, PackedKeys, PackedValues, Segment, pack_words
from vidkv_kernels.quantize_keys import key_matrix, real_fourier

MOST_CHANNELS = 256  # whose order fits into bytes
SIGN_KINDS = {"zero_scale": "none", "plus_minus": "centred", "mean_plus_minus": "mean"}


class NotPackable(ValueError):
    """A quantizer whose stored form kernels do not read; use attention over dequantized states."""


def pack_keys(quantizer: Quantizer, stored: QuantizedStates) -> PackedKeys:
    """Return stored keys in the form that kernels read.

    Raises:
        NotPackable: the quantizer is none of Affine, Sign, Spectral around Sign, or SplitChannels of these; has groups of
            channels, or of a size other than 32, 64 or 128; or is wide in more than 2 bits.
    """
    wide, normal, parts = None, quantizer, {"normal": stored}
    if isinstance(quantizer, SplitChannels):
        wide, normal, parts = quantizer.wide, quantizer.normal, dict(stored.parts)
    elif isinstance(quantizer, Affine) and quantizer.nbits == 2:
        wide, normal, parts = quantizer, None, {"wide": stored}
    pieces = []
    if "wide" in parts:
        if not isinstance(wide, Affine) or wide.nbits != 2:
            raise NotPackable(f"wide channels are stored by {wide}; kernels read Affine with 2 bits")
        pieces.append((wide, parts["wide"], 2, "minimum"))
    matrix = None
    if "normal" in parts:
        if isinstance(normal, Spectral):
            matrix = fourier_matrix(stored.channels, parts["normal"].channels, _device(parts["normal"]))
            pieces += _spectral_pieces(normal, parts["normal"])
        else:
            pieces.append((normal, parts["normal"], 1, _kind(normal)))
    for owner, _, nbits, _ in pieces:
        if owner.code_count != 2**nbits:
            raise NotPackable(f"normal channels are stored by {owner}; kernels read 1 bit of those")
    group_size = pieces[0][0].group_size
    for owner, *_ in pieces:
        if owner.granularity != "per_channel" or owner.group_size != group_size or group_size not in GROUP_SIZES:
            raise NotPackable(f"keys are stored by {owner}; kernels read groups of one size, 32, 64 or 128 tokens of a channel")
    order = None
    if isinstance(quantizer, SplitChannels):
        if quantizer.per_head:
            raise NotPackable(f"keys are stored by {quantizer}; kernels read one set of wide channels for all heads")
        if stored.channels > MOST_CHANNELS:
            raise NotPackable(f"keys have {stored.channels} channels; kernels read up to {MOST_CHANNELS} in an order of their own")
        order = channel_order(stored.static["wide_channels"], stored.channels)
    metadata = [_metadata(owner, piece) for owner, piece, _, _ in pieces]
    offsets = [offset for _, offset in metadata if offset is not None]
    return PackedKeys(
        _segments(pieces),
        group_size,
        torch.cat([pack_words(_codes(owner, piece), nbits) for owner, piece, nbits, _ in pieces], dim=-1),
        torch.cat([scale for scale, _ in metadata], dim=-1),
        torch.cat(offsets, dim=-1) if offsets else None,
        order=order,
        matrix=matrix,
    )


def pack_values(quantizer: Quantizer, stored: QuantizedStates, start: int = 0) -> tuple[PackedValues, ...]:
    """Return stored values in the form that kernels read, as runs of tokens that are stored alike.

    Args:
        quantizer: that stored them.
        stored: values of a whole history, or of tokens to be appended to one.
        start: tokens of the history before them.
    Raises:
        NotPackable: the quantizer is none of Affine with 1 or 2 bits, Sign, Ternary, or SplitTokens of these, or has groups of a
            size other than 32, 64 or 128.
    """
    if not isinstance(quantizer, SplitTokens):
        return (_pack_run(quantizer, stored, None),)
    chosen = stored.static["tokens"]
    if not chosen.shape[1]:
        return (_pack_run(quantizer.other, stored.parts["other"], None),)
    if start:
        # None of them is chosen.
        others = torch.arange(start, start + stored.length, dtype=torch.int32, device=chosen.device)
        return (_pack_run(quantizer.other, stored.parts["other"], others.expand(chosen.shape[0], -1).contiguous()),)
    chosen, others = split_positions(chosen, stored.length)
    runs = {"chosen": (quantizer.chosen, chosen), "other": (quantizer.other, others)}
    return tuple(_pack_run(runs[name][0], part, runs[name][1].int()) for name, part in stored.parts.items())


def read_keys(keys: PackedKeys, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the first `length` keys as attention sees them, [B, H, length, D]; computed in float32, rounded once to `dtype`."""
    states = keys.decode(torch.float32)[:, :, :length]
    if keys.matrix is not None:
        states = states @ keys.matrix.T
    if keys.order is not None:
        places = keys.order.long().argsort(dim=-1).unsqueeze(2)
        states = states.gather(-1, places.expand(*states.shape[:3], -1))
    if keys.center is not None:
        states = states + keys.center.unsqueeze(2)
    return states.to(dtype)


def read_values(values: tuple[PackedValues, ...], length: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the first `length` values, [B, H, length, D]; computed in float32, rounded once to `dtype`.

    Runs may have room beyond what they hold; sequences hold equally many entries of each.
    """
    if len(values) == 1 and values[0].tokens is None:
        return values[0].decode(torch.float32)[:, :, :length].to(dtype)
    first = values[0].codes
    states = torch.empty(*first.shape[:2], length, values[0].width, dtype=dtype, device=first.device)
    for run in values:
        held = int(run.lengths[0])
        places = run.tokens[:, None, :held, None].long().expand(*first.shape[:2], -1, run.width)
        states.scatter_(2, places, run.decode(torch.float32)[:, :, :held].to(dtype))
    return states


@functools.lru_cache
def packed_form(key: Quantizer, value: Quantizer, channels: int) -> tuple[PackedKeys, tuple[PackedValues, ...]]:
    """Return one packed block of zeros, which shows the form in which these quantizers store heads of so many channels.

    Raises:
        NotPackable: kernels do not read what one of them stores.
    """
    zeros = torch.zeros(1, 1, math.lcm(key.block, value.block, WORD), channels)
    parts = (value.chosen, value.other) if isinstance(value, SplitTokens) else (value,)
    return pack_keys(key, key.quantize(zeros)), tuple(run for part in parts for run in pack_values(part, part.quantize(zeros)))


def _pack_run(quantizer: Quantizer, stored: QuantizedStates, tokens: torch.Tensor | None) -> PackedValues:
    if isinstance(quantizer, Ternary):
        levels, kind = 3, "centred"
    else:
        levels, kind = (4 if isinstance(quantizer, Affine) and quantizer.nbits == 2 else 2), _kind(quantizer)
    if quantizer.group_size not in GROUP_SIZES:
        raise NotPackable(f"values are stored by {quantizer}; kernels read groups of 32, 64 or 128")
    scale, offset = _metadata(quantizer, stored)
    batch = stored.tensors["codes"].shape[0]
    lengths = torch.full((batch,), stored.length, dtype=torch.int32, device=_device(stored))
    codes = pack_words(_codes(quantizer, stored), 1 if levels == 2 else 2)
    return PackedValues(
        lengths, levels, kind, quantizer.granularity, quantizer.group_size, stored.channels, codes, scale, offset, tokens=tokens
    )


def _spectral_pieces(quantizer: Spectral, stored: QuantizedStates) -> list[tuple[Quantizer, QuantizedStates, int, str]]:
    kind = _kind(quantizer.inner)
    pieces = [(quantizer.inner, stored.parts["real"], 1, kind)]
    if "imaginary" in stored.parts:
        # Imaginary parts are read back by the odd part of the quantizer.
        pieces.append((quantizer.inner, stored.parts["imaginary"], 1, "centred" if kind == "none" else kind))
    return pieces


def _segments(pieces: list[tuple[Quantizer, QuantizedStates, int, str]]) -> tuple[Segment, ...]:
    """Return the segments of pieces that follow each other; those of the same form are one."""
    channels: dict[tuple[int, str], int] = {}
    for _, piece, nbits, kind in pieces:
        channels[nbits, kind] = channels.get((nbits, kind), 0) + piece.channels
    return tuple(Segment(count, nbits, kind) for (nbits, kind), count in channels.items())


def _kind(quantizer: Quantizer) -> str:
    if isinstance(quantizer, Affine) and quantizer.nbits <= 2:
        return "minimum"
    if isinstance(quantizer, Sign):
        return SIGN_KINDS[quantizer.levels]
    raise NotPackable(f"states are stored by {quantizer}; kernels read Affine with 1 or 2 bits, Sign and, for values, Ternary")


def _codes(quantizer: GroupedQuantizer, stored: QuantizedStates) -> torch.Tensor:
    """Return codes uint8 [B, H, T, C]."""
    codes = LAYOUTS[quantizer.layout].unpack(stored.tensors["codes"], quantizer.code_count, stored.channels, quantizer.group_size)
    return ungroup(codes, quantizer.granularity)


def _metadata(quantizer: GroupedQuantizer, stored: QuantizedStates) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return scale and offset: [B, H, T / S, C] (per_channel) or [B, H, T, C / S] (per_token)."""
    if quantizer.metadata != "float16":
        raise NotPackable(f"states are stored by {quantizer}; kernels read float16 metadata")
    scale, offset = stored.tensors.get("scale"), stored.tensors.get("minimum", stored.tensors.get("mean"))
    if isinstance(quantizer, Sign) and quantizer.levels != "zero_scale":
        scale = scale * 2
    if quantizer.granularity == "per_channel":
        return scale, offset
    return tuple(None if part is None else part.unflatten(-1, (quantizer.group_size, -1)).flatten(2, 3) for part in (scale, offset))


def channel_order(wide_channels: torch.Tensor, channels: int) -> torch.Tensor:
    """Return all channels, wide ones first and both kinds ascending: [B, wide] to uint8 [B, 1, C]."""
    is_normal = torch.ones(wide_channels.shape[0], channels, dtype=torch.uint8, device=wide_channels.device)
    return is_normal.scatter_(1, wide_channels.long(), 0).argsort(dim=-1, stable=True).to(torch.uint8).unsqueeze(1)


@functools.cache
def fourier_matrix(channels: int, transformed: int, device: torch.device) -> torch.Tensor:
    """Return the matrix of keys whose last channels are a spectrum; one for all layers, sequences and caches."""
    return key_matrix(channels, real_fourier(transformed, device))


def _device(stored: QuantizedStates) -> torch.device:
    while not stored.tensors:
        stored = next(iter(stored.parts.values()))
    return next(iter(stored.tensors.values())).device
