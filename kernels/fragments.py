"""Packed history in the order in which matrix fragments want it, for the kernels of `attend_cuda.cu`.

What codes and metadata mean is defined in `packed`. Here they lie in records: a record holds the keys, or the values, of S
consecutive tokens of one key/value head, and records of one head follow each other. This file is the layout in plain torch; the
kernels in `pack_cuda.cu` write the same bytes.

A fragment covers 32 tokens x 16 channels. A lane of 32 holds 16 of these elements, in four registers of two; lane 4 g + t:
    keys    tokens 16 m + 8 rr + g,           channels 8 kh + 2 t + e
    values  tokens 16 m + 8 kh + 2 t + e,     channels of `value_channels`
A field for each (m, rr, kh, e) lies at bit 16 e + 8 m + 4 rr + 2 kh of a word; 1-bit codes of two fragments share a word, those of
the second one bit higher. An odd last fragment of 1-bit keys fills halves of words, bit 8 e + m + 4 rr + 2 kh.

Keys of a record:   for each 32 tokens: words of 2-bit fragments, then of 1-bit fragments; then scales, then stored offsets.
Values of a record: for each 32 tokens: words; then scales, then stored offsets.
The 16 channels of a fragment have the same width, so some 1-bit channels may lie in 2-bit fields; missing key channels are zero.

Protected tokens have values in records of their own, as form `Form.protected`; records of values then hold S tokens of one kind, which
need not be consecutive. Keys lie as ever. `protected_values` has the bits that say which token is of which kind.

Metadata of 4 bits: scale (upper half) and offset of a channel share a byte; offsets that are not stored are zero. The word of a lane:
    keys    channels 16 step + 8 kh + 2 t + e in byte 2 e + kh, a word for each fragment
    values  channels of tile 2 j + parity in byte 2 rr + parity, a word for each j
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from vidkv_kernels.packed import CENTRED_KINDS, STORED_KINDS, PackedKeys, PackedValues, Segment, ternary_channels

TOKENS = 32
STEP = 16
TOKEN_GROUP = 32
OFFSET_ROWS_OF_UNITS = {"offset_unit": 1, "offset_center": 2}


class UnsupportedForm(ValueError):
    """A form of packed history that these kernels do not read; the message says which, and what they do read."""


@dataclass(frozen=True)
class Form:
    """Everything about a packed history but its tensors: what the kernels are compiled for.

    Attributes:
        width: D, channels of a query and of a value, 64 or 128.
        segments: of the key channels, as in `packed.PackedKeys`.
        group_size: S, tokens that share metadata, of keys and of values per channel: 32, 64 or 128.
        levels: of values, 2, 3 or 4.
        offset_kind: of values: minimum, mean, none or centred.
        granularity: of values: per_channel, or per_token in groups of 32 channels.
        is_scaled: whether values have scales; without, the scale is 1.
        metadata_bits: of scales and offsets, 16 or 4.
        is_protected: whether some tokens have values of form `protected` instead.
    """

    width: int
    segments: tuple[Segment, ...]
    group_size: int = 32
    levels: int = 3
    offset_kind: str = "centred"
    granularity: str = "per_channel"
    is_scaled: bool = True
    metadata_bits: int = 16
    is_protected: bool = False

    def __post_init__(self) -> None:
        if self.width not in (64, 128):
            raise UnsupportedForm(f"heads have {self.width} channels; the CUDA kernels read 64 and 128")
        if self.channels > 2 * self.width:
            raise UnsupportedForm(f"keys have {self.channels} channels; the CUDA kernels read {2 * self.width} at most with this query")
        if not self.is_scaled and self.offset_kind in STORED_KINDS:
            raise UnsupportedForm(f"values without a scale have offset_kind {self.offset_kind!r}; the CUDA kernels read none and centred")
        if self.is_protected and self.metadata_bits == 4:
            raise UnsupportedForm("protected tokens beside metadata of 4 bits; the CUDA kernels read float16 there")

    @classmethod
    def of(cls, keys: PackedKeys, values: tuple[PackedValues, ...]) -> Form:
        """Return the form of a packed history.

        Args:
            values: one run, token after token, or two.
        Raises:
            UnsupportedForm: it has float8 metadata or different ones, groups that differ between keys and values, or two runs none of
                which can be that of protected tokens.
        """
        if len(values) == 1 and values[0].tokens is not None:
            raise UnsupportedForm("a single run of values that names its tokens: of what form the other run will be must be said")
        forms = [cls._of_run(keys, run) for run in values]
        if len(forms) == 1:
            return forms[0]
        protected = forms[0].protected
        if protected not in forms:
            raise UnsupportedForm(f"protected tokens in none of the forms {forms}; the CUDA kernels read {protected}")
        return replace(forms[1 - forms.index(protected)], is_protected=True)

    @classmethod
    def _of_run(cls, keys: PackedKeys, run: PackedValues) -> Form:
        found = {tensor.dtype for tensor in (keys.scale, keys.offset, run.scale, run.offset) if tensor is not None}
        if found not in ({torch.float16}, {torch.uint8}):
            raise UnsupportedForm(f"metadata in {', '.join(map(str, found))}; the CUDA kernels read float16, or codes of 4 bits")
        has_metadata = run.scale is not None or run.offset is not None
        wanted = TOKEN_GROUP if run.granularity == "per_token" else keys.group_size
        if has_metadata and run.group_size != wanted:
            raise UnsupportedForm(f"values {run.granularity} in groups of {run.group_size}; the CUDA kernels read {wanted} with these keys")
        granularity = run.granularity if has_metadata else "per_channel"
        metadata_bits = 4 if found == {torch.uint8} else 16
        is_scaled = run.scale is not None
        return cls(run.width, keys.segments, keys.group_size, run.levels, run.offset_kind, granularity, is_scaled, metadata_bits)

    @property
    def plain(self) -> Form:
        """The same without protected tokens: the form of keys, and of the values of all other tokens."""
        return replace(self, is_protected=False) if self.is_protected else self

    @property
    def protected(self) -> Form:
        """The form of protected tokens: 2 bits with a scale and a minimum per channel."""
        return Form(self.width, self.segments, self.group_size, 4, "minimum")

    def runs(self, keys: PackedKeys, values: tuple[PackedValues, ...]) -> tuple[PackedValues | None, PackedValues | None]:
        """Return the runs of protected tokens and of all others; None where there is no such run.

        Raises:
            UnsupportedForm: the kernels do not read this form at all.
            ValueError: they do, but it is not this one.
        """
        if not self.is_protected:
            found = self.of(keys, values)
            if found != self:
                raise ValueError(f"appended tokens have form {found}; allowed: that of what is held, {self}")
            return None, values[0]
        found = [self._of_run(keys, run) for run in values]
        protected, other = self.protected, self.plain
        for forms, runs in (
            ([protected, other], values),
            ([other, protected], values[::-1]),
            ([other], (None, *values)),
            ([protected], (*values, None)),
        ):
            if found == forms:
                return runs
        raise ValueError(f"appended tokens have form {found}; allowed: those of what is held, {protected} and {other}")

    @property
    def channels(self) -> int:
        """C, key channels as stored."""
        return sum(segment.channels for segment in self.segments)

    @property
    def wide_channels(self) -> int:
        """Key channels with 2-bit fields, the first ones."""
        return sum(segment.channels for segment in self.segments if segment.nbits == 2)

    @property
    def offset_rows(self) -> int:
        """Rows of 32 quads that offsets of scores are computed with.

        For 4 bits a row for each fragment; else for each pair of fragments with stored offsets, and with channels that have a middle.
        """
        if self.metadata_bits == 4:
            return self.key_steps
        factors = -(-self.key_steps // 2) - self.centred_from // (2 * STEP) if self.centred_from < self.channels else 0
        return -(-self.stored_steps // 2) + factors

    @property
    def chunks(self) -> int:
        """Blocks of 32 tokens in a record."""
        return self.group_size // TOKENS

    @property
    def key_steps(self) -> int:
        """Fragments of 16 key channels."""
        return -(-self.channels // STEP)

    @property
    def wide_steps(self) -> int:
        """Those with 2-bit fields, the first ones."""
        return -(-self.wide_channels // STEP)

    @property
    def stored_offsets(self) -> int:
        """Key channels with a stored offset, the first ones."""
        return sum(segment.channels for segment in self.segments if segment.offset in STORED_KINDS)

    @property
    def stored_steps(self) -> int:
        """Fragments with a stored offset, the first ones."""
        return -(-self.stored_offsets // STEP)

    @property
    def centred_from(self) -> int:
        """First key channel with a middle that is not zero; C if there is none."""
        return sum(segment.channels for segment in self.segments if segment.offset not in CENTRED_KINDS)

    @property
    def value_bits(self) -> int:
        return 1 if self.levels == 2 else 2

    @property
    def value_centre(self) -> int:
        """Twice the middle code of values."""
        return self.levels - 1 if self.offset_kind in CENTRED_KINDS else 0

    @property
    def is_value_offset_stored(self) -> bool:
        return self.offset_kind in STORED_KINDS

    @property
    def key_codes_bytes(self) -> int:
        """Of 32 tokens."""
        return 128 * self.wide_steps + 64 * (self.key_steps - self.wide_steps)

    @property
    def key_record_bytes(self) -> int:
        metadata = 64 * -(-self.key_steps // 2) + 32 * self.stored_steps if self.metadata_bits == 16 else STEP * self.key_steps
        return self.chunks * self.key_codes_bytes + metadata

    @property
    def value_codes_bytes(self) -> int:
        """Of 32 tokens."""
        return TOKENS * self.width * self.value_bits // 8

    @property
    def value_metadata_bytes(self) -> int:
        """Of the scales of a record, and again of its stored offsets; of 4 bits: of both together."""
        if not self.is_scaled:
            return 0
        if self.metadata_bits == 4:
            return self.width
        return 2 * self.width * (self.chunks if self.granularity == "per_token" else 1)

    @property
    def value_record_bytes(self) -> int:
        parts = 2 if self.is_value_offset_stored and self.metadata_bits == 16 else 1
        return self.chunks * self.value_codes_bytes + self.value_metadata_bytes * parts

    def constants(self) -> dict[str, int]:
        """The macros that describe this form to the kernels."""
        ternary, ternary_end = ternary_channels(self.segments)
        return {
            "WIDTH": self.width,
            "KEY_STEPS": self.key_steps,
            "WIDE_STEPS": self.wide_steps,
            "STORED_STEPS": self.stored_steps,
            "CHANNELS": self.channels,
            "WIDE_CHANNELS": self.wide_channels,
            "CENTRED_FROM": self.centred_from,
            "TERNARY_FROM": ternary,
            "TERNARY_TO": ternary_end,
            "METADATA_BITS": self.metadata_bits,
            "CHUNKS": self.chunks,
            "VALUE_BITS": self.value_bits,
            "VALUE_CENTRE": self.value_centre,
            "VALUE_STORED": int(self.is_value_offset_stored),
            "VALUE_SCALE": 0 if not self.is_scaled else 2 if self.granularity == "per_token" else 1,
            "PROTECTED": int(self.is_protected),
        }


def pack_keys(form: Form, codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """Pack keys of whole groups.

    Args:
        codes: uint8 [B, H, T, C], T a multiple of S.
        scale: float16 [B, H, T / S, C], or its codes of 4 bits in uint8.
        offset: as scale, [B, H, T / S, stored offsets], or None if none are stored.
    Returns:
        uint8 [B, H, T / S, key_record_bytes].
    """
    missing = form.key_steps * STEP - form.channels
    # [B, H, G, chunk, m, rr, g, step, kh, t, e] to [B, H, G, chunk, step, g, t, m, rr, kh, e]
    fields = torch.nn.functional.pad(codes, (0, missing)).unflatten(3, (-1, 2, 4, 2)).unflatten(2, (-1, form.chunks, 2, 2, 8))
    fields = fields.permute(0, 1, 2, 3, 7, 6, 9, 4, 5, 8, 10)
    words = [_pack_fields(fields[:, :, :, :, : form.wide_steps], 2), _pack_fields(fields[:, :, :, :, form.wide_steps :], 1)]
    parts = [torch.cat(words, dim=-1).flatten(3)]
    if form.metadata_bits == 4:
        parts.append(_pack_key_nibbles(scale, offset, form.key_steps))
    else:
        parts.append(_pack_key_metadata(scale, form.key_steps + form.key_steps % 2))
        if offset is not None:
            parts.append(_pack_key_metadata(offset, form.stored_steps))
    return torch.cat(parts, dim=-1)


def unpack_keys(form: Form, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return codes, scale and offset of records; the inverse of `pack_keys`."""
    code_bytes, wide_bytes = form.chunks * form.key_codes_bytes, 128 * form.wide_steps
    raw = records[..., :code_bytes].unflatten(-1, (form.chunks, -1))
    wide = _unpack_fields(raw[..., :wide_bytes], form.wide_steps, 2)
    fields = torch.cat([wide, _unpack_fields(raw[..., wide_bytes:], form.key_steps - form.wide_steps, 1)], dim=4)
    codes = fields.permute(0, 1, 2, 3, 7, 8, 5, 4, 9, 6, 10).flatten(7).flatten(2, 6)[..., : form.channels]
    metadata = records[..., code_bytes:]
    if form.metadata_bits == 4:
        shared = _unpack_key_nibbles(metadata, form.key_steps)
        return codes, shared[..., : form.channels] >> 4, shared[..., : form.stored_offsets] & 15 if form.stored_offsets else None
    scale_bytes = 64 * -(-form.key_steps // 2)
    scale = _unpack_key_metadata(metadata[..., :scale_bytes])[..., : form.channels]
    offset = _unpack_key_metadata(metadata[..., scale_bytes:])[..., : form.stored_offsets] if form.stored_steps else None
    return codes, scale, offset


@functools.lru_cache(maxsize=64)
def matrix_fragments(form: Form, matrix: torch.Tensor) -> torch.Tensor:
    """Bring a map of the query, float32 [D, C], to fragments in float16, uint8 [bytes]; once for all who share that tensor."""
    padded = torch.nn.functional.pad(matrix, (0, form.key_steps * STEP - form.channels)).half()
    # [k, kh, t, e, step, rr, g] to [step, k, g, t, kh, rr, e]
    fields = padded.unflatten(1, (-1, 2, 8)).unflatten(0, (-1, 2, 4, 2))
    return fields.permute(4, 0, 6, 2, 1, 5, 3).contiguous().flatten().view(torch.uint8)


@functools.cache
def identity_fragments(form: Form, device: torch.device) -> torch.Tensor:
    """Return the fragments of a map that changes nothing."""
    return matrix_fragments(form, torch.eye(form.width, device=device))


def pack_values(form: Form, codes: torch.Tensor, scale: torch.Tensor | None, offset: torch.Tensor | None) -> torch.Tensor:
    """Pack values of whole groups.

    Args:
        codes: uint8 [B, H, T, D], T a multiple of S.
        scale: float16, [B, H, T / S, D] (per_channel) or [B, H, T, D / 32] (per_token), or codes of 4 bits in uint8; None if values
            have none.
        offset: as scale, None if none are stored.
    Returns:
        uint8 [B, H, T / S, value_record_bytes].
    """
    # [B, H, G, chunk, m, kh, t, e, j, g_high, tile, rr, g_low] to [B, H, G, chunk, (j, tile), g, t, m, rr, kh, e]
    fields = codes.unflatten(3, (-1, 4, 2, 2, 2)).unflatten(2, (-1, form.chunks, 2, 2, 4, 2))
    fields = fields.permute(0, 1, 2, 3, 8, 10, 9, 12, 6, 4, 11, 5, 7).flatten(6, 7).flatten(4, 5)
    parts = [_pack_fields(fields, form.value_bits).flatten(3)]
    if form.metadata_bits == 4 and scale is not None:
        shared = scale * 16 if offset is None else scale * 16 + offset
        # [.., j, g_high, tile, rr, g_low] to [.., g_high, g_low, j, rr, tile]
        parts.append(shared.unflatten(3, (-1, 4, 2, 2, 2)).permute(0, 1, 2, 4, 7, 3, 6, 5).flatten(3))
        scale = offset = None
    for metadata in (scale, offset):
        if metadata is None:
            continue
        if form.granularity == "per_token":
            # [B, H, G, chunk, m, kh, t, e, group] to [.., chunk, group, t, m, kh, e]
            ordered = metadata.unflatten(2, (-1, form.chunks, 2, 2, 4, 2)).permute(0, 1, 2, 3, 8, 6, 4, 5, 7)
        else:
            ordered = _value_lanes(metadata)
        parts.append(ordered.contiguous().flatten(3).view(torch.uint8))
    return torch.cat(parts, dim=-1)


def unpack_values(form: Form, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return codes, scale and offset of records; the inverse of `pack_values`."""
    code_bytes = form.chunks * form.value_codes_bytes
    fields = _unpack_fields(records[..., :code_bytes].unflatten(-1, (form.chunks, -1)), form.width // STEP, form.value_bits)
    # [B, H, G, chunk, j, tile, g_high, g_low, t, m, rr, kh, e] to [.., chunk, m, kh, t, e, j, g_high, tile, rr, g_low]
    fields = fields.unflatten(5, (4, 2)).unflatten(4, (-1, 2))
    codes = fields.permute(0, 1, 2, 3, 9, 11, 8, 12, 4, 6, 5, 10, 7).flatten(8).flatten(2, 7)
    if form.metadata_bits == 4 and form.is_scaled:
        shared = records[..., code_bytes:].unflatten(-1, (4, 2, -1, 2, 2)).permute(0, 1, 2, 5, 3, 7, 6, 4).flatten(3)
        return codes, shared >> 4, shared & 15 if form.is_value_offset_stored else None
    metadata: list[torch.Tensor | None] = []
    for raw in records[..., code_bytes:].split(form.value_metadata_bytes, dim=-1) if form.is_scaled else ():
        halves = raw.contiguous().view(torch.float16)
        if form.granularity == "per_token":
            metadata.append(halves.unflatten(-1, (form.chunks, -1, 4, 2, 2, 2)).permute(0, 1, 2, 3, 6, 7, 5, 8, 4).flatten(2, 7))
        else:
            metadata.append(_from_value_lanes(halves))
    scale, offset = (*metadata, None, None)[:2]
    return codes, scale, offset


def pack_units(form: Form, keys: PackedKeys, run: PackedValues) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return what metadata of 4 bits is counted in, as the kernels read it: unit of scales, unit and center of offsets.

    Returns:
        Of keys, float16 [B, H, 3, 16 * key_steps], and of values, float16 [B, H, 3, D] lane by lane; zeros where there are none.
        None for metadata of 16 bits.
    Raises:
        ValueError: a unit of value scales that is not above zero, which kernels divide by.
    """
    if form.metadata_bits == 16:
        return None
    if run.scale_unit is not None and not (run.scale_unit > 0).all():
        raise ValueError("values.scale_unit has elements that are not above 0; allowed: positive ones")
    stacked = []
    for part, width in ((keys, STEP * form.key_steps), (run, form.width)):
        units = torch.zeros(*part.codes.shape[:2], 3, width, dtype=torch.float16, device=part.device)
        for index, unit in enumerate((part.scale_unit, part.offset_unit, part.offset_center)):
            if unit is not None:
                units[:, :, index, : unit.shape[-1]] = unit
        stacked.append(units)
    return stacked[0], lay_value_units(stacked[1])


def lay_value_units(units: torch.Tensor) -> torch.Tensor:
    """Bring units of value channels, [B, H, 3, D], into the order in which the kernels read them."""
    return _value_lanes(units).contiguous().flatten(3)


def read_value_units(units: torch.Tensor) -> torch.Tensor:
    """The inverse of `lay_value_units`."""
    return _from_value_lanes(units)


def unpack_units(form: Form, units: tuple[torch.Tensor, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return units and centers of keys and of values by their names in `packed`; the inverse of `pack_units`."""
    key_units, value_units = units[0], read_value_units(units[1])
    keys = {"scale_unit": key_units[:, :, 0, : form.channels].contiguous()}
    if form.stored_offsets:
        keys |= {name: key_units[:, :, row, : form.stored_offsets].contiguous() for name, row in OFFSET_ROWS_OF_UNITS.items()}
    values = {"scale_unit": value_units[:, :, 0].contiguous()} if form.is_scaled else {}
    if form.is_value_offset_stored:
        values |= {name: value_units[:, :, row].contiguous() for name, row in OFFSET_ROWS_OF_UNITS.items()}
    return keys, values


def _value_lanes(metadata: torch.Tensor) -> torch.Tensor:
    """Bring metadata of value channels [B, H, G, D], D being (j, g_high, tile, rr, g_low), to [.., g_high, g_low, j, tile, rr]."""
    return metadata.unflatten(3, (-1, 4, 2, 2, 2)).permute(0, 1, 2, 4, 7, 3, 5, 6)


def _from_value_lanes(metadata: torch.Tensor) -> torch.Tensor:
    return metadata.unflatten(-1, (4, 2, -1, 2, 2)).permute(0, 1, 2, 5, 3, 6, 7, 4).flatten(3)


def _pack_fields(fields: torch.Tensor, nbits: int) -> torch.Tensor:
    """Pack fragments, codes [..., N, g, t, m, rr, kh, e], to bytes [..., bytes]."""
    if nbits == 2:
        return _lanes(_sum(fields, 8, 4, 2, 16))
    pairs = fields[..., : fields.shape[-7] // 2 * 2, :, :, :, :, :, :].unflatten(-7, (-1, 2))
    raw = _lanes(_sum(pairs.select(-7, 0), 8, 4, 2, 16) + 2 * _sum(pairs.select(-7, 1), 8, 4, 2, 16))
    if fields.shape[-7] % 2:
        last = _sum(fields[..., -1, :, :, :, :, :, :], 1, 4, 2, 8)
        raw = torch.cat([raw, _as_signed(last, 16).to(torch.int16).flatten(-2).contiguous().view(torch.uint8)], dim=-1)
    return raw


def _unpack_fields(raw: torch.Tensor, steps: int, nbits: int) -> torch.Tensor:
    """Unpack bytes [..., bytes] to fragments, codes [..., N, g, t, m, rr, kh, e]; the inverse of `_pack_fields`."""
    if nbits == 2:
        return _separate(_from_lanes(raw, steps), 3, 8, 4, 2, 16)
    words = _from_lanes(raw[..., : 128 * (steps // 2)], steps // 2)
    fields = torch.stack([_separate(words >> parity, 1, 8, 4, 2, 16) for parity in range(2)], dim=-7).flatten(-8, -7)
    if steps % 2:
        halves = raw[..., -64:].contiguous().view(torch.int16).int().unflatten(-1, (1, 8, 4))
        fields = torch.cat([fields, _separate(halves, 1, 1, 4, 2, 8)], dim=-7)
    return fields


def _shifts(device: torch.device, *places: int) -> torch.Tensor:
    """Return the position of each of the 16 fields of a lane, [m, rr, kh, e], given the distances between them."""
    bit = torch.arange(2, device=device)
    m, rr, kh, e = (place * bit.view([-1 if axis == own else 1 for axis in range(4)]) for own, place in enumerate(places))
    return m + rr + kh + e


def _sum(fields: torch.Tensor, *places: int) -> torch.Tensor:
    return (fields.long() << _shifts(fields.device, *places)).sum((-4, -3, -2, -1))


def _separate(words: torch.Tensor, mask: int, *places: int) -> torch.Tensor:
    return (words[..., None, None, None, None] >> _shifts(words.device, *places).int() & mask).to(torch.uint8)


def _as_signed(words: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.where(words >= 1 << (bits - 1), words - (1 << bits), words)


def _lanes(words: torch.Tensor) -> torch.Tensor:
    """Lay words [..., N, g, t] out so that a lane's words of four fragments, then of two, then of one, are neighbours."""
    lanes = _as_signed(words, 32).int().flatten(-2)
    pieces = [lanes[..., start : start + count, :].transpose(-1, -2).flatten(-2) for start, count in _pieces(lanes.shape[-2])]
    return torch.cat([lanes[..., :0, 0], *pieces], dim=-1).contiguous().view(torch.uint8)


def _from_lanes(raw: torch.Tensor, steps: int) -> torch.Tensor:
    words = raw.contiguous().view(torch.int32)
    parts = [words[..., :0].unflatten(-1, (0, 32))]
    for start, count in _pieces(steps):
        parts.append(words[..., 32 * start : 32 * (start + count)].unflatten(-1, (32, count)).transpose(-1, -2))
    return torch.cat(parts, dim=-2).unflatten(-1, (8, 4))


def _pieces(steps: int) -> list[tuple[int, int]]:
    """Cut `steps` into fours, a two and a one: first of each piece, and size."""
    pieces, start = [], 0
    while start < steps:
        size = next(size for size in (4, 2, 1) if size <= steps - start)
        pieces.append((start, size))
        start += size
    return pieces


def _pack_key_metadata(metadata: torch.Tensor, steps: int) -> torch.Tensor:
    """Lay metadata of key channels [..., c] out by pairs of fragments, [.., pair, t, step, kh, e], a single one last, as bytes."""
    channels = torch.nn.functional.pad(metadata, (0, steps * STEP - metadata.shape[-1])).unflatten(-1, (-1, 2, 4, 2))
    pairs = steps // 2
    paired = channels[..., : 2 * pairs, :, :, :].unflatten(-4, (pairs, 2)).transpose(-4, -2).transpose(-3, -2)
    last = channels[..., 2 * pairs :, :, :, :].transpose(-3, -2)
    return torch.cat([paired.flatten(-5), last.flatten(-4)], dim=-1).contiguous().view(torch.uint8)


def _unpack_key_metadata(raw: torch.Tensor) -> torch.Tensor:
    halves = raw.contiguous().view(torch.float16)
    pairs = halves.shape[-1] // 32
    paired = halves[..., : 32 * pairs].unflatten(-1, (pairs, 4, 2, 2, 2)).transpose(-3, -2).transpose(-4, -2)
    last = halves[..., 32 * pairs :].unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2)
    return torch.cat([paired.flatten(-5), last.flatten(-4)], dim=-1)


def _pack_key_nibbles(scale: torch.Tensor, offset: torch.Tensor | None, steps: int) -> torch.Tensor:
    """Lay scale and offset codes of key channels [..., c] out so that the words of four fragments are neighbours, then of two, of one."""
    shared = torch.nn.functional.pad(scale * 16, (0, steps * STEP - scale.shape[-1]))
    if offset is not None:
        shared = shared + torch.nn.functional.pad(offset, (0, steps * STEP - offset.shape[-1]))
    # [.., step, kh, t, e] to [.., t, step, e, kh], for each piece
    words = shared.unflatten(-1, (steps, 2, 4, 2)).movedim(-2, -4).transpose(-1, -2)
    return torch.cat([words[..., start : start + count, :, :].flatten(-4) for start, count in _pieces(steps)], dim=-1)


def _unpack_key_nibbles(raw: torch.Tensor, steps: int) -> torch.Tensor:
    parts = [raw[..., STEP * start : STEP * (start + count)].unflatten(-1, (4, count, 2, 2)) for start, count in _pieces(steps)]
    return torch.cat(parts, dim=-3).transpose(-1, -2).movedim(-4, -2).flatten(-4)
