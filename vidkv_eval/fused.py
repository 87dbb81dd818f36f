"""From what quantizers store to the form that attention kernels read, `vidkv_kernels.packed`, and back to states.

Codes and metadata stay the same.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace

import torch

from vidkv_eval.quant.affine import Affine
from vidkv_eval.quant.base import QuantizedStates, Quantizer
from vidkv_eval.quant.fitted import Fitted
from vidkv_eval.quant.grouped import GroupedQuantizer
from vidkv_eval.quant.grouping import ungroup
from vidkv_eval.quant.metadata import to_half
from vidkv_eval.quant.sign import Sign
from vidkv_eval.quant.spectral import Spectral
from vidkv_eval.quant.split_channels import SplitChannels
from vidkv_eval.quant.split_tokens import SplitTokens, split_positions
from vidkv_eval.quant.ternary import Ternary
from vidkv_kernels.layouts import LAYOUTS
from vidkv_kernels.packed import (
    CENTRED_KINDS,
    GROUP_SIZES,
    METADATA_CODES,
    STORED_KINDS,
    WORD,
    PackedKeys,
    PackedValues,
    Segment,
    pack_key_words,
    pack_words,
)
from vidkv_kernels.packing import pack, unpack
from vidkv_kernels.quantize_keys import key_matrix, real_fourier

MOST_CHANNELS = 256  # whose order fits into bytes
SIGN_KINDS = {"zero_scale": "none", "plus_minus": "centred", "mean_plus_minus": "mean"}


class NotPackable(ValueError):
    """A quantizer whose stored form kernels do not read; use attention over dequantized states."""


@dataclass(frozen=True)
class KeyPiece:
    """Key channels that are stored alike.

    Attributes:
        owner: quantizer that stored them.
        stored: by it.
        first: place of the first channel in the order of keys.
        segment: how kernels store them.
        place: which digit of a code of 16 levels this is, 4 c1 + c0: 4 or 1; 0: codes are stored whole.
    """

    owner: GroupedQuantizer
    stored: QuantizedStates
    first: int
    segment: Segment
    place: int = 0

    @property
    def codes(self) -> torch.Tensor:
        codes = _codes(self.owner, self.stored)
        return codes // self.place % 4 if self.place else codes

    @property
    def metadata(self) -> dict[str, torch.Tensor]:
        metadata = _metadata(self.owner, self.stored)
        if self.segment.offset not in STORED_KINDS:
            metadata = {name: tensor for name, tensor in metadata.items() if not name.startswith("offset")}
        if self.place > 1:
            name = "scale_unit" if "scale_unit" in metadata else "scale"
            metadata[name] = to_half(metadata[name].float() * self.place)
        return metadata


def pack_keys(quantizer: Quantizer, stored: QuantizedStates) -> PackedKeys:
    """Return stored keys in the form that kernels read.

    A code of 16 levels is two of 4, since middle + s (c - 7.5) = [middle + 4 s (c1 - 1.5)] + [s (c0 - 1.5)] for c = 4 c1 + c0: the same
    channel of the query meets two stored ones.

    Raises:
        NotPackable: the quantizer is none of Affine, Sign, Fitted, Spectral around Sign or Fitted, or SplitChannels of these; has groups
            of channels, or of a size other than 32, 64 or 128; is wide in Affine codes of other than 2 bits; or has float8 metadata.
    """
    pieces, transformed = key_pieces(quantizer, stored)
    order = None
    if isinstance(quantizer, SplitChannels):
        if stored.channels > MOST_CHANNELS:
            raise NotPackable(f"keys have {stored.channels} channels; kernels read up to {MOST_CHANNELS} in an order of their own")
        order = channel_order(stored.static["wide_channels"], stored.channels)
    segments = segments_of(pieces)
    return PackedKeys(
        segments,
        pieces[0].owner.group_size,
        pack_key_words(segments, torch.cat([piece.codes for piece in pieces], dim=-1)),
        **_join([piece.metadata for piece in pieces]),
        order=order,
        matrix=query_matrix(stored.channels, transformed, columns_of(pieces), _device(stored)),
    )


def key_pieces(quantizer: Quantizer, stored: QuantizedStates) -> tuple[list[KeyPiece], int]:
    """Return what stored keys consist of, in the order of kernels, and how many channels, the last ones, are a spectrum.

    Raises:
        NotPackable: see `pack_keys`.
    """
    wide, normal, parts = None, quantizer, {"normal": stored}
    if isinstance(quantizer, SplitChannels):
        wide, normal, parts = quantizer.wide, quantizer.normal, stored.parts
    pieces: list[KeyPiece] = []
    if "wide" in parts:
        if not (isinstance(wide, Affine) and wide.nbits == 2) and not (isinstance(wide, Fitted) and wide.levels > 2):
            raise NotPackable(f"wide channels are stored by {wide}; kernels read Affine with 2 bits and Fitted with 3, 4 or 16 levels")
        pieces += _pieces(wide, parts["wide"], 0)
    first = transformed = 0
    if "normal" in parts:
        first = stored.channels - parts["normal"].channels
        if isinstance(normal, Spectral):
            transformed = parts["normal"].channels
            pieces += _spectral_pieces(normal, parts["normal"], first)
        else:
            pieces += _pieces(normal, parts["normal"], first)
    pieces.sort(key=lambda piece: _rank(piece.segment))
    ranks = [_rank(piece.segment) for piece in pieces]
    if any(now[i] > later[i] for now, later in itertools.pairwise(ranks) for i in range(3)):
        raise NotPackable(f"keys are stored by {quantizer}; kernels do not read these kinds of offsets together")
    group_size, metadata_kind = pieces[0].owner.group_size, pieces[0].owner.metadata
    for piece in pieces:
        owner = piece.owner
        if owner.granularity != "per_channel" or owner.group_size != group_size or group_size not in GROUP_SIZES:
            raise NotPackable(f"keys are stored by {owner}; kernels read groups of one size, 32, 64 or 128 tokens of a channel")
        if owner.metadata != metadata_kind:
            raise NotPackable(f"keys are stored by {owner}; kernels read metadata of one kind, here {metadata_kind}")
    return pieces, transformed


def columns_of(pieces: list[KeyPiece]) -> tuple[tuple[int, int], ...]:
    """Return which channels, in their order, are stored: runs by first one and number."""
    return tuple((piece.first, piece.segment.channels) for piece in pieces)


def pack_values(
    quantizer: Quantizer, stored: QuantizedStates, start: int = 0, *, names_tokens: bool = False
) -> tuple[PackedValues, ...]:
    """Return stored values in the form that kernels read, as runs of tokens that are stored alike.

    Args:
        quantizer: that stored them.
        stored: values of a whole history, or of tokens to be appended to one.
        start: tokens of the history before them.
        names_tokens: runs of a quantizer that chooses tokens say which these are even where none was chosen, as they do in sequences
            beside them.
    Raises:
        NotPackable: the quantizer is none of Affine with 1 or 2 bits, Sign, Ternary, Fitted with 2, 3 or 4 levels, or SplitTokens of
            these; has groups of a size other than 32, 64 or 128; or has float8 metadata.
    """
    if not isinstance(quantizer, SplitTokens):
        return (_pack_run(quantizer, stored, None),)
    chosen = stored.static["tokens"]
    if not chosen.shape[1] and not names_tokens:
        return (_pack_run(quantizer.other, stored.parts["other"], None),)
    if start or not chosen.shape[1]:
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
    levels, kind = (3, "centred") if isinstance(quantizer, Ternary) else _form(quantizer)
    if quantizer.group_size not in GROUP_SIZES:
        raise NotPackable(f"values are stored by {quantizer}; kernels read groups of 32, 64 or 128")
    batch = stored.tensors["codes"].shape[0]
    lengths = torch.full((batch,), stored.length, dtype=torch.int32, device=_device(stored))
    return PackedValues(
        lengths, levels, kind, quantizer.granularity, quantizer.group_size, stored.channels,
        pack_words(_codes(quantizer, stored), 1 if levels == 2 else 2), **_join([_metadata(quantizer, stored)]), tokens=tokens,
    )  # fmt: skip


def _pieces(quantizer: Quantizer, stored: QuantizedStates, first: int) -> list[KeyPiece]:
    if isinstance(quantizer, Fitted) and quantizer.levels == 16:
        digits = ((4, "mean"), (1, "centred"))
        return [KeyPiece(quantizer, stored, first, Segment(stored.channels, 2, kind), place) for place, kind in digits]
    levels, kind = _form(quantizer)
    return [KeyPiece(quantizer, stored, first, Segment(stored.channels, 1 if levels == 2 else 2, kind, levels == 3))]


def _spectral_pieces(quantizer: Spectral, stored: QuantizedStates, first: int) -> list[KeyPiece]:
    pieces = _pieces(quantizer.inner, stored.parts["real"], first)
    if "imaginary" in stored.parts:
        for piece in _pieces(quantizer.inner, stored.parts["imaginary"], first + stored.parts["real"].channels):
            # Imaginary parts are read back by the odd part of the quantizer.
            kind = "centred" if piece.segment.offset == "none" else piece.segment.offset
            pieces.append(replace(piece, segment=replace(piece.segment, offset=kind)))
    return pieces


def _rank(segment: Segment) -> tuple[int, bool, bool]:
    """In what order kernels want segments; all three numbers must grow."""
    return -segment.nbits, segment.offset not in STORED_KINDS, segment.offset in CENTRED_KINDS


def segments_of(pieces: list[KeyPiece]) -> tuple[Segment, ...]:
    """Return the segments of pieces that follow each other; those of the same form are one."""
    segments: list[Segment] = []
    for piece in pieces:
        if segments and replace(segments[-1], channels=piece.segment.channels) == piece.segment:
            segments[-1] = replace(piece.segment, channels=segments[-1].channels + piece.segment.channels)
        else:
            segments.append(piece.segment)
    return tuple(segments)


def _form(quantizer: Quantizer) -> tuple[int, str]:
    """Return the number of levels and the kind of offset."""
    if isinstance(quantizer, Affine) and quantizer.nbits <= 2:
        return 1 << quantizer.nbits, "minimum"
    if isinstance(quantizer, Sign):
        return 2, SIGN_KINDS[quantizer.levels]
    if isinstance(quantizer, Fitted) and quantizer.levels <= 4:
        return quantizer.levels, "mean"
    allowed = "Affine with 1 or 2 bits, Sign, Fitted with 2, 3 or 4 levels (16 for keys) and, for values, Ternary"
    raise NotPackable(f"states are stored by {quantizer}; kernels read {allowed}")


def _codes(quantizer: GroupedQuantizer, stored: QuantizedStates) -> torch.Tensor:
    """Return codes uint8 [B, H, T, C]."""
    codes = LAYOUTS[quantizer.layout].unpack(stored.tensors["codes"], quantizer.code_count, stored.channels, quantizer.group_size)
    return ungroup(codes, quantizer.granularity)


def _metadata(quantizer: GroupedQuantizer, stored: QuantizedStates) -> dict[str, torch.Tensor]:
    """Return scale and offset, as far as there are any, and for codes of 4 bits, one a byte here, what these are counted in.

    Scale and offset are [B, H, T / S, C] (per_channel) or [B, H, T, C / S] (per_token).
    """
    if quantizer.metadata not in ("float16", "uint4"):
        raise NotPackable(f"states are stored by {quantizer}; kernels read float16 and uint4 metadata")
    names = {"scale": "scale", "minimum": "offset", "mean": "offset", "middle": "offset"}
    metadata = {names[name]: tensor for name, tensor in stored.tensors.items() if name != "codes"}
    if quantizer.metadata == "uint4":
        metadata = {name: unpack(tensor, METADATA_CODES, stored.channels) for name, tensor in metadata.items()}
        for name, tensor in stored.static.items():
            owner, _, what = name.rpartition("_")
            metadata[f"{names[owner]}_{'unit' if what == 'step' else 'center'}"] = tensor
    if isinstance(quantizer, Sign) and quantizer.levels != "zero_scale":
        name = "scale_unit" if quantizer.metadata == "uint4" else "scale"
        metadata[name] = metadata[name] * 2
    if quantizer.granularity == "per_channel":
        return metadata
    return {name: tensor.unflatten(-1, (quantizer.group_size, -1)).flatten(2, 3) for name, tensor in metadata.items()}


def _join(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put the metadata of channels beside each other and codes of 4 bits in bytes."""
    names = dict.fromkeys(name for part in parts for name in part)
    joined = {name: torch.cat([part[name] for part in parts if name in part], dim=-1) for name in names}
    return {name: pack(tensor, METADATA_CODES) if tensor.dtype == torch.uint8 else tensor for name, tensor in joined.items()}


def channel_order(wide_channels: torch.Tensor, channels: int) -> torch.Tensor:
    """Return all channels, wide ones first and both kinds ascending: [B, wide] or [B, H, wide] to uint8 [B, 1 or H, C]."""
    is_normal = torch.ones(*wide_channels.shape[:-1], channels, dtype=torch.uint8, device=wide_channels.device)
    order = is_normal.scatter_(-1, wide_channels.long(), 0).argsort(dim=-1, stable=True).to(torch.uint8)
    return order if order.dim() == 3 else order.unsqueeze(1)


@functools.cache
def query_matrix(channels: int, transformed: int, columns: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor | None:
    """Return what a query in the order of keys is multiplied with; one for all layers, sequences and caches. None: nothing.

    Args:
        transformed: how many of the channels, the last ones, are stored as their spectrum.
        columns: which channels are stored, runs of them by first one and number.
    """
    places = [place for first, count in columns for place in range(first, first + count)]
    if not transformed and places == list(range(channels)):
        return None
    matrix = key_matrix(channels, real_fourier(transformed, device)) if transformed else torch.eye(channels, device=device)
    return matrix[:, places].contiguous()


def _device(stored: QuantizedStates) -> torch.device:
    while not stored.tensors:
        stored = next(iter(stored.parts.values()))
    return next(iter(stored.tensors.values())).device
