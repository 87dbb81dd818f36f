"""One layer's cache as `attend` reads it: packed history, and tokens in full precision before and after it.

This is the contract between quantizers, which fill it, and attention kernels, which read it. A backend may copy it into an order
that suits its instructions; what it must compute is defined here, in plain torch.

Letters: B batch, H key/value heads, D head width, T tokens of history, C key channels as stored, E value entries, G groups of S.

**Keys.** Channels are reordered, and mapped by an orthogonal (or any linear) map, on the side of the query: a stored key k of C
channels scores

    q . key = (q[order] @ matrix) . k + q . center

Channels come in segments with the same bits and the same kind of offset. A group is S tokens of one channel; its codes mean

    k = scale * (code - middle) + offset,   middle = 0 for the kinds minimum and none, (levels - 1) / 2 for mean and centred
                                            offset is stored for the kinds minimum and mean, 0 for none and centred

**Values.** An entry is a value of one token. Values of one kind lie in one run of entries, token after token, or in the order
that `tokens` gives. Two runs hold protected tokens and the others. Codes mean what they mean for keys, with 2, 3 or 4 levels,
in groups of S entries of one channel (per_channel) or of S channels of one entry (per_token). A scale of None is 1.

**Words.** Codes fill int32 words in blocks of 32 tokens, the words of all channels of a block side by side, those of 2-bit key channels
before those of 1-bit ones:
1 bit:  word c holds channel c, token t of the block in bit t;
2 bits: word h * channels + c holds channel c, token 16 h + i of the block in bits 2 i and 2 i + 1.
Ternary values may instead fill bytes, 5 channels of an entry each, as `packing.pack` does it.

**Metadata** is float16; or float8 e4m3, times a `unit`; or codes of 4 bits, two a byte as `packing.pack` does it, of groups per channel:

    scale = unit * code,   offset = center + unit * (code - 7)

Unit and center are float16 and do not change over groups.

Buffers may be longer than what they hold: per-sequence `lengths` say how much is there, and what lies beyond is never used.
Tensors of packed history are contiguous.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from vidkv_kernels.packing import unpack

WORD = 32
STORED_KINDS = ("minimum", "mean")
CENTRED_KINDS = ("mean", "centred")
OFFSET_KINDS = ("minimum", "mean", "none", "centred")
GRANULARITIES = ("per_channel", "per_token")
GROUP_SIZES = (32, 64, 128)
METADATA_CODES = 16
CENTER_CODE = 7


def pack_words(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """Pack codes of C channels of the same width, integers [..., T, C] with T a multiple of 32, to int32 words [..., T / 32, nbits * C]."""
    per_word = WORD // nbits
    digits = codes.long().unflatten(-2, (-1, nbits, per_word))
    places = 1 << (nbits * torch.arange(per_word, device=codes.device))
    words = (digits * places[:, None]).sum(-2).flatten(-2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpack_words(words: torch.Tensor, nbits: int) -> torch.Tensor:
    """Unpack int32 words [..., T / 32, nbits * C] to uint8 codes [..., T, C]; the inverse of `pack_words`."""
    shifts = nbits * torch.arange(WORD // nbits, dtype=torch.int32, device=words.device)
    digits = (words.unflatten(-1, (nbits, -1)).unsqueeze(-2) >> shifts[:, None]) & ((1 << nbits) - 1)
    return digits.to(torch.uint8).flatten(-4, -2)


@dataclass(frozen=True)
class Segment:
    """Neighbouring key channels with the same codes and the same kind of offset.

    Attributes:
        channels: how many.
        nbits: bits per code, 1 or 2.
        offset: minimum, mean, none or centred.
        is_ternary: codes of 2 bits are 0, 1 and 2.
    """

    channels: int
    nbits: int
    offset: str
    is_ternary: bool = False

    @property
    def levels(self) -> int:
        """Number of different codes."""
        return 3 if self.is_ternary else 1 << self.nbits

    @property
    def middle(self) -> float:
        """The code, in general between two codes, that means the stored offset, or 0 if none is stored."""
        return (self.levels - 1) / 2 if self.offset in CENTRED_KINDS else 0.0


def ternary_channels(segments: tuple[Segment, ...]) -> tuple[int, int]:
    """Return the first channel with ternary codes and the one behind the last; between them are no others."""
    first = sum(segment.channels for segment in itertools.takewhile(lambda segment: not segment.is_ternary, segments))
    return first, first + sum(segment.channels for segment in segments if segment.is_ternary)


def pack_key_words(segments: tuple[Segment, ...], codes: torch.Tensor) -> torch.Tensor:
    """Pack codes of all key channels, integers [..., T, C], to int32 words [..., T / 32, sum of nbits * channels]."""
    wide = sum(segment.channels for segment in segments if segment.nbits == 2)
    return torch.cat([pack_words(codes[..., :wide], 2), pack_words(codes[..., wide:], 1)], dim=-1)


@dataclass(frozen=True)
class PackedKeys:
    """Keys of the history of one layer.

    Attributes:
        segments: of C channels together. In order: bits do not grow, stored offsets come first, centred kinds come last; ternary
            segments are neighbours.
        group_size: S, 32, 64 or 128 tokens.
        codes: int32 words [B, H, T / 32, sum of nbits * channels].
        scale: float16 or float8_e4m3fn [B, H, T / S, C], or uint8 [B, H, T / S, ceil(C / 2)].
        offset: as scale, for the channels with a stored offset; None if there are none.
        scale_unit, offset_unit: float16 [B or 1, H or 1, channels of scale or offset], for metadata other than float16.
        offset_center: as offset_unit, for metadata of 4 bits.
        order: uint8 [B or 1, H or 1, D], a permutation: the channel of the query at each place; None: as they are.
        matrix: float32 [D, C], one for all sequences, heads and layers of a recipe, and never changed; None: the identity, C = D.
        center: float32 [B or 1, H or 1, D], was subtracted from keys before anything else; None: nothing was.
    """

    segments: tuple[Segment, ...]
    group_size: int
    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None = None
    scale_unit: torch.Tensor | None = None
    offset_unit: torch.Tensor | None = None
    offset_center: torch.Tensor | None = None
    order: torch.Tensor | None = None
    matrix: torch.Tensor | None = None
    center: torch.Tensor | None = None

    def __post_init__(self) -> None:
        order = [(-s.nbits, s.offset not in STORED_KINDS, s.offset in CENTRED_KINDS) for s in self.segments]
        if not self.segments or any(s.nbits not in (1, 2) or s.channels < 1 or s.offset not in OFFSET_KINDS for s in self.segments):
            raise ValueError(f"keys.segments is {self.segments}; allowed: channels above 0, nbits 1 or 2, offset {', '.join(OFFSET_KINDS)}")
        if any(now[i] > later[i] for now, later in zip(order, order[1:], strict=False) for i in range(3)):
            raise ValueError(f"keys.segments is {self.segments}; give 2 bits before 1 bit, stored offsets first, centred kinds last")
        is_ternary = [segment.is_ternary for segment in self.segments]
        if sum(now != later for now, later in itertools.pairwise([False, *is_ternary, False])) > 2:
            raise ValueError(f"keys.segments is {self.segments}; give ternary ones beside each other")
        if any(segment.is_ternary and segment.nbits != 2 for segment in self.segments):
            raise ValueError(f"keys.segments is {self.segments}; ternary codes have nbits 2")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"keys.group_size is {self.group_size}; allowed: 32, 64, 128")
        batch, heads = self.codes.shape[:2]
        words = sum(segment.nbits * segment.channels for segment in self.segments)
        check_packed("keys.codes", self.codes, (batch, heads, None, words), torch.int32, self.codes.device)
        groups = self.codes.shape[2] * WORD // self.group_size
        if self.codes.shape[2] * WORD % self.group_size:
            raise ValueError(f"keys.codes has room for {self.codes.shape[2] * WORD} tokens; give a multiple of {self.group_size}")
        _check_metadata("keys.scale", self.scale, self.scale_unit, (batch, heads, groups, self.channels), self.device)
        if self.stored_offsets:
            shape = (batch, heads, groups, self.stored_offsets)
            _check_metadata("keys.offset", self.offset, self.offset_unit, shape, self.device, self.offset_center)
        elif (self.offset, self.offset_unit, self.offset_center) != (None, None, None):
            raise ValueError("keys.offset is given, but no segment stores offsets")
        check_maps("keys.", batch, heads, self.width, self.channels, self.device, self.order, self.matrix, self.center)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def channels(self) -> int:
        """C, number of channels as stored."""
        return sum(segment.channels for segment in self.segments)

    @property
    def width(self) -> int:
        """D, number of channels of a query."""
        return self.channels if self.matrix is None else self.matrix.shape[0]

    @property
    def wide_channels(self) -> int:
        """Number of channels with 2-bit codes, which come first."""
        return sum(segment.channels for segment in self.segments if segment.nbits == 2)

    @property
    def stored_offsets(self) -> int:
        """Number of channels with a stored offset, which come first."""
        return sum(segment.channels for segment in self.segments if segment.offset in STORED_KINDS)

    @property
    def uncentred_channels(self) -> int:
        """Number of channels whose middle is 0, which come first."""
        return sum(segment.channels for segment in self.segments if segment.offset not in CENTRED_KINDS)

    def unpack(self) -> torch.Tensor:
        """Return all codes, uint8 [B, H, T, C], T being the room of the buffer."""
        wide, narrow = self.codes[..., : 2 * self.wide_channels], self.codes[..., 2 * self.wide_channels :]
        return torch.cat([unpack_words(wide, 2), unpack_words(narrow, 1)], dim=-1)

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """Return what the codes mean, before order, matrix and center are undone, [B, H, T, C] in `dtype`."""
        middles = torch.cat([torch.full((s.channels,), s.middle, dtype=dtype, device=self.device) for s in self.segments])
        scale = _metadata(self.scale, self.scale_unit, dtype).repeat_interleave(self.group_size, dim=2)
        states = (self.unpack().to(dtype) - middles) * scale
        if self.offset is not None:
            offset = _metadata(self.offset, self.offset_unit, dtype, self.offset_center).repeat_interleave(self.group_size, dim=2)
            states[..., : self.stored_offsets] += offset
        return states


@dataclass(frozen=True)
class PackedValues:
    """A run of entries of the history of one layer.

    Attributes:
        lengths: int32 [B], number of entries held.
        levels: number of different codes, 2, 3 or 4.
        offset_kind: minimum, mean, none or centred; ternary codes 0, 1, 2 for -1, 0, 1 are centred.
        granularity: per_channel or per_token.
        group_size: S; 32, 64 or 128 entries (per_channel), or a divisor of D (per_token).
        codes: int32 words [B, H, E / 32, nbits * D], or for 3 levels uint8 [B, H, E, ceil(D / 5)].
        scale: float16 or float8_e4m3fn, [B, H, E / S, D] (per_channel) or [B, H, E, D / S] (per_token), or uint8
            [B, H, E / S, ceil(D / 2)] (per_channel); None: 1.
        offset: as scale; None unless the kind stores it.
        scale_unit, offset_unit: float16 [B or 1, H or 1, D or D / S], for metadata other than float16.
        offset_center: as offset_unit, for metadata of 4 bits.
        tokens: int32 [B, E], which token an entry belongs to; None: entry t is token t. Every token of the history stands in
            one entry of one run.
        width: D.
    """

    lengths: torch.Tensor
    levels: int
    offset_kind: str
    granularity: str
    group_size: int
    width: int
    codes: torch.Tensor
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    scale_unit: torch.Tensor | None = None
    offset_unit: torch.Tensor | None = None
    offset_center: torch.Tensor | None = None
    tokens: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name, found, allowed in (
            ("levels", self.levels, (2, 3, 4)),
            ("offset_kind", self.offset_kind, OFFSET_KINDS),
            ("granularity", self.granularity, GRANULARITIES),
        ):
            if found not in allowed:
                raise ValueError(f"values.{name} is {found!r}; allowed: {', '.join(map(str, allowed))}")
        if self.granularity == "per_channel" and self.group_size not in GROUP_SIZES:
            raise ValueError(f"values.group_size is {self.group_size}; allowed: 32, 64, 128")
        if self.granularity == "per_token" and self.width % self.group_size:
            raise ValueError(f"values.group_size is {self.group_size}; allowed: divisors of {self.width}")
        batch, heads = self.codes.shape[:2]
        if self.codes.dtype == torch.uint8 and self.levels == 3:
            check_packed("values.codes", self.codes, (batch, heads, None, -(-self.width // 5)), torch.uint8, self.codes.device)
        else:
            check_packed("values.codes", self.codes, (batch, heads, None, self.nbits * self.width), torch.int32, self.codes.device)
        if self.granularity == "per_channel" and self.entries % self.group_size:
            raise ValueError(f"values.codes has room for {self.entries} entries; give a multiple of {self.group_size}")
        shape = (batch, heads, self.entries, self.width // self.group_size)
        if self.granularity == "per_channel":
            shape = (batch, heads, self.entries // self.group_size, self.width)
        if self.granularity == "per_token" and any(t is not None and t.dtype == torch.uint8 for t in (self.scale, self.offset)):
            raise ValueError("values have metadata of 4 bits per_token; allowed: per_channel")
        if self.scale is not None:
            _check_metadata("values.scale", self.scale, self.scale_unit, shape, self.device)
        if self.offset_kind in STORED_KINDS:
            if self.scale is None:
                raise ValueError(f"values.scale is None; offset_kind {self.offset_kind!r} needs one")
            _check_metadata("values.offset", self.offset, self.offset_unit, shape, self.device, self.offset_center)
        elif (self.offset, self.offset_unit, self.offset_center) != (None, None, None):
            raise ValueError(f"values.offset is given, but offset_kind is {self.offset_kind!r}")
        check_packed("values.lengths", self.lengths, (batch,), torch.int32, self.device)
        if self.tokens is not None:
            check_packed("values.tokens", self.tokens, (batch, self.entries), torch.int32, self.device)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbits(self) -> int:
        """Bits of a field in a word."""
        return 1 if self.levels == 2 else 2

    @property
    def is_bytes(self) -> bool:
        """Whether codes fill bytes, 5 each, instead of words."""
        return self.codes.dtype == torch.uint8

    @property
    def entries(self) -> int:
        """E, the room of the buffer."""
        return self.codes.shape[2] * (1 if self.is_bytes else WORD)

    @property
    def middle(self) -> float:
        """The code, in general between two codes, that means the stored offset, or 0 if none is stored."""
        return (self.levels - 1) / 2 if self.offset_kind in CENTRED_KINDS else 0.0

    def unpack(self) -> torch.Tensor:
        """Return all codes, uint8 [B, H, E, D]."""
        return unpack(self.codes, 3, self.width) if self.is_bytes else unpack_words(self.codes, self.nbits)

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """Return what the codes mean, [B, H, E, D] in `dtype`, entry after entry."""
        states = self.unpack().to(dtype) - self.middle
        dim = 2 if self.granularity == "per_channel" else 3
        if self.scale is not None:
            states = states * _metadata(self.scale, self.scale_unit, dtype).repeat_interleave(self.group_size, dim=dim)
        if self.offset is not None:
            offset = _metadata(self.offset, self.offset_unit, dtype, self.offset_center)
            states = states + offset.repeat_interleave(self.group_size, dim=dim)
        return states


@dataclass(frozen=True)
class FullPrecision:
    """Tokens in full precision: the residual, or a prefix that is never quantized.

    Attributes:
        keys, values: [B, H, R, D] in the dtype of the query; need not be contiguous, except in the last dimension.
        lengths: int32 [B], number of tokens held.
    """

    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor

    def __post_init__(self) -> None:
        check("full_precision.keys", self.keys, (None,) * 4, (torch.float16, torch.bfloat16, torch.float32), self.keys.device)
        check("full_precision.values", self.values, tuple(self.keys.shape), self.keys.dtype, self.keys.device)
        check("full_precision.lengths", self.lengths, tuple(self.keys.shape[:1]), torch.int32, self.keys.device)


@dataclass(frozen=True)
class PackedLayer:
    """All that one layer's decode attention reads. The order of tokens does not matter to attention.

    Attributes:
        keys: of the history, or None if there is none.
        values: one run of entries, or two (protected tokens and the others); empty if there is no history.
        residual: newest tokens, the current one included.
        prefix: oldest tokens kept in full precision, or None.
    """

    keys: PackedKeys | None
    values: tuple[PackedValues, ...]
    residual: FullPrecision
    prefix: FullPrecision | None = None

    def __post_init__(self) -> None:
        if (self.keys is None) != (not self.values) or len(self.values) > 2:
            raise ValueError(f"layer.values has {len(self.values)} runs; allowed: 1 or 2 with keys, none without")
        batch, heads, _, width = self.residual.keys.shape
        for name, part in (("residual", self.residual), ("prefix", self.prefix)):
            if part is not None:
                check(f"layer.{name}.keys", part.keys, (batch, heads, None, width), self.residual.keys.dtype, self.device)
        if self.keys is None:
            return
        check("keys.codes", self.keys.codes, (batch, heads, None, None), torch.int32, self.device)
        if self.keys.width != width:
            raise ValueError(f"keys are for queries of {self.keys.width} channels; the residual has {width}")
        for run in self.values:
            check("values.codes", run.codes, (batch, heads, None, None), run.codes.dtype, self.device)
            if run.width != width:
                raise ValueError(f"values have {run.width} channels; the residual has {width}")
            if run.tokens is None and (len(self.values) > 1 or run.entries > self.keys.codes.shape[2] * WORD):
                raise ValueError("values.tokens is None; that needs a single run of entries, and keys with room for as many tokens")

    @property
    def device(self) -> torch.device:
        return self.residual.keys.device


def check(
    name: str,
    tensor: torch.Tensor | None,
    shape: tuple[int | tuple[int, ...] | None, ...],
    dtype: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Hold a tensor to what a kernel takes, before anything is launched.

    Args:
        shape: for each dimension a size, several allowed sizes, or None for any.
        dtype: one or several allowed.
    Raises:
        ValueError: another shape, dtype or device, or a last dimension with gaps.
    """
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} is {tensor!r}; give a tensor")
    sizes = [(size,) if isinstance(size, int) else size for size in shape]
    if tensor.dim() != len(sizes) or any(size and found not in size for found, size in zip(tensor.shape, sizes, strict=True)):
        wanted = ", ".join("any" if size is None else " or ".join(map(str, dict.fromkeys(size))) for size in sizes)
        raise ValueError(f"{name} has shape {list(tensor.shape)}; allowed: [{wanted}]")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; allowed: {', '.join(map(str, dtypes))}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; allowed: {device}, where the other tensors are")
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; allowed: 1, as after .contiguous()")


def check_packed(name: str, tensor: torch.Tensor | None, shape: tuple, dtype: object, device: torch.device) -> None:
    """As `check`, for tensors whose memory has no gaps, so that their shape gives all strides."""
    check(name, tensor, shape, dtype, device)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()} for shape {list(tensor.shape)}; make it .contiguous()")


def check_maps(
    prefix: str,
    batch: int,
    heads: int,
    width: int,
    channels: int,
    device: torch.device,
    order: torch.Tensor | None,
    matrix: torch.Tensor | None,
    center: torch.Tensor | None,
) -> None:
    """Hold what stands between a query of `width` channels and stored keys of `channels` to the shapes in `PackedKeys`."""
    if matrix is not None:
        check_packed(f"{prefix}matrix", matrix, (width, channels), torch.float32, device)
    elif channels != width:
        raise ValueError(f"keys have {channels} channels and queries {width}; give a {prefix}matrix")
    if order is not None:
        check_packed(f"{prefix}order", order, ((batch, 1), (heads, 1), width), torch.uint8, device)
    if center is not None:
        check_packed(f"{prefix}center", center, ((batch, 1), (heads, 1), width), torch.float32, device)


def _check_metadata(
    name: str,
    tensor: torch.Tensor | None,
    unit: torch.Tensor | None,
    shape: tuple,
    device: torch.device,
    center: torch.Tensor | None = None,
) -> None:
    """Hold scales, or offsets with their center, to `shape`, which is that of their values."""
    is_packed = tensor is not None and tensor.dtype == torch.uint8
    stored = (*shape[:3], -(-shape[3] // 2)) if is_packed else shape
    check_packed(name, tensor, stored, (torch.float16, torch.float8_e4m3fn, torch.uint8), device)
    if (tensor.dtype != torch.float16) != (unit is not None):
        found = "missing" if unit is None else "given"
        raise ValueError(f"{name} is {tensor.dtype} and its unit is {found}; float8 and uint8 need a unit, float16 none")
    if unit is not None:
        check_packed(f"{name}_unit", unit, ((shape[0], 1), (shape[1], 1), shape[3]), torch.float16, device)
    if is_packed and name.endswith("offset"):
        check_packed(f"{name}_center", center, tuple(unit.shape), torch.float16, device)
    elif center is not None:
        raise ValueError(f"{name}_center is given and {name} is {tensor.dtype}; offsets in uint8 have a center")


def _metadata(tensor: torch.Tensor, unit: torch.Tensor | None, dtype: torch.dtype, center: torch.Tensor | None = None) -> torch.Tensor:
    if unit is None:
        return tensor.to(dtype)
    unit = unit.to(dtype).unsqueeze(2)
    if tensor.dtype != torch.uint8:
        return tensor.to(dtype) * unit
    codes = unpack(tensor, METADATA_CODES, unit.shape[-1]).to(dtype)
    return codes * unit if center is None else (codes - CENTER_CODE) * unit + center.to(dtype).unsqueeze(2)
