"""Growable packed history of one layer, in fragment order: what a cache fills and `attend_cuda` reads.

    history = FragmentHistory(form, batch=1, heads=4, capacity=8192, device=device, order=order, matrix=matrix)
    history.append(keys, values)                    # `packed.PackedKeys` and `packed.PackedValues` of the new tokens
    history.quantize(key_states, value_states)      # or the tokens as they are, float [B, H, T, D]
    out = attend_cuda.attend(query, history, residual, scaling)

Both write in place at each sequence's own length and wait for nothing, so that a decode step can be captured as a CUDA graph
while the buffers have room. `reserve` gives them more, by copying, and must stay outside of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vidkv_kernels import pack_cuda, quantize_cuda
from vidkv_kernels.choose_channels import choose_channels_reference
from vidkv_kernels.fragments import (
    TOKEN_GROUP,
    Form,
    UnsupportedForm,
    identity_fragments,
    matrix_fragments,
    pack_keys,
    pack_units,
    pack_values,
    unpack_keys,
    unpack_units,
    unpack_values,
)
from vidkv_kernels.packed import METADATA_CODES, PackedKeys, PackedValues, check, check_maps, check_packed, pack_key_words, pack_words
from vidkv_kernels.packing import pack, unpack
from vidkv_kernels.protected_values import ProtectedValues
from vidkv_kernels.quantize_keys import make_keys, quantize_keys_reference
from vidkv_kernels.quantize_values import make_values, quantize_values_reference
from vidkv_kernels.span import Span

KEY_STATES, KEY_METADATA, VALUE_STATES, VALUE_METADATA = 1, 2, 4, 8
"""Bits of `FragmentHistory.faults`: states are NaN or infinite, or need metadata beyond float16."""


class FragmentHistory:
    """Packed keys and values of one layer.

    Attributes:
        form: what codes and metadata mean.
        keys: uint8 [B, H, capacity / S, key_record_bytes].
        values: uint8 [B, H, capacity / S, value_record_bytes].
        lengths: int32 [B], tokens held by each sequence; what lies beyond is never used.
        held: upper bounds of `lengths`, known without asking the device: exactly these, unless sequences grew by an unknown number.
        key_scale_max, value_scale_max: float32 [B, H], no scale held is larger in size; for the range of half precision. Zero for
            metadata of 4 bits, whose range is known.
        faults: int32 [1], what `quantize` has met so far; not 0: what is held is not what was given. To be looked at when waiting for
            the device does no harm.
        order, matrix, center: as in `packed.PackedKeys`.
        scratch: int32 [B, 2 D + 1], zeros whenever no order is being chosen; None without an order.
        matrix_fragments: the matrix for the kernel, uint8 [bytes], shared like the matrix itself.
        units: what metadata of 4 bits is counted in, keys and values, as `fragments.pack_units` gives it; None for float16.
        protected: values of the tokens that are not among `values`, where the others lie token after token; None: there are none.
        version: changes whenever a buffer moves.
    """

    def __init__(
        self,
        form: Form,
        *,
        batch: int,
        heads: int,
        capacity: int,
        device: torch.device | str,
        order: torch.Tensor | None = None,
        matrix: torch.Tensor | None = None,
        center: torch.Tensor | None = None,
        units: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        device = torch.empty(0, device=device).device
        check_maps("", batch, heads, form.width, form.channels, device, order, matrix, center)
        if (units is None) != (form.metadata_bits == 16):
            found = "missing" if units is None else "given"
            raise ValueError(f"units are {found} and metadata has {form.metadata_bits} bits; allowed: units with 4 bits only")
        if units is not None:
            for name, unit, columns in zip(("key", "value"), units, (16 * form.key_steps, form.width), strict=True):
                check_packed(f"{name} units", unit, (batch, heads, 3, columns), torch.float16, device)
        self.form = form
        records = -(-capacity // form.group_size)
        self.keys = torch.empty(batch, heads, records, form.key_record_bytes, dtype=torch.uint8, device=device)
        self.values = torch.empty(batch, heads, records, form.value_record_bytes, dtype=torch.uint8, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.held = [0] * batch
        self.key_scale_max = torch.zeros(batch, heads, device=device)
        self.value_scale_max = torch.zeros(batch, heads, device=device)
        self.faults = torch.zeros(1, dtype=torch.int32, device=device)
        self.order = order
        self.scratch = None if order is None else torch.zeros(batch, 2 * form.width + 1, dtype=torch.int32, device=device)
        self.matrix = matrix
        self.matrix_fragments = None if matrix is None else matrix_fragments(form, matrix)
        if matrix is None and form.metadata_bits == 4:
            # The kernel multiplies the query with units where it maps it.
            self.matrix_fragments = identity_fragments(form, device)
        self.center = center
        self.units = units
        blocks = records * form.chunks
        self.protected = ProtectedValues(form.protected, batch, heads, blocks, device) if form.is_protected else None
        self.version = 0

    @classmethod
    def from_packed(
        cls, keys: PackedKeys, values: tuple[PackedValues, ...], capacity: int = 0, form: Form | None = None
    ) -> FragmentHistory:
        """Copy packed history from the portable layout.

        Args:
            capacity: tokens to have room for, at least those of the source.
            form: as in `like`.
        Raises:
            UnsupportedForm: the kernels do not read this form.
        """
        form = Form.of(keys, values) if form is None else form
        history = cls.like(keys, values, max(_room(form, keys, values), capacity), form)
        history.append(keys, values)
        return history

    @classmethod
    def like(cls, keys: PackedKeys, values: tuple[PackedValues, ...], capacity: int, form: Form | None = None) -> FragmentHistory:
        """Make an empty history of the form of packed tokens, with their map of the query.

        Args:
            form: of all tokens to come, some of which may be protected; None: these show it.
        Raises:
            UnsupportedForm: the kernels do not read this form.
        """
        batch, heads = keys.codes.shape[:2]
        form = Form.of(keys, values) if form is None else form
        maps = {"order": keys.order, "matrix": keys.matrix, "center": keys.center, "units": pack_units(form, keys, values[0])}
        return cls(form, batch=batch, heads=heads, capacity=capacity, device=keys.device, **maps)

    @property
    def capacity(self) -> int:
        """Tokens that the buffers have room for."""
        return self.keys.shape[2] * self.form.group_size

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def max_length(self) -> int:
        """An upper bound of the tokens of any sequence."""
        return max(self.held)

    @property
    def nbytes(self) -> int:
        """Bytes of what is held: records, order and center; not the shared matrix, nor the spare room of the buffers."""
        units = () if self.units is None else self.units[:1]
        others = (self.lengths, self.key_scale_max, self.order, self.center, *units)
        records = self._count_records([0] * len(self.held))
        return records * self.form.key_record_bytes + self.value_nbytes + sum(t.nbytes for t in others if t is not None)

    @property
    def value_nbytes(self) -> int:
        """The part of `nbytes` that values take."""
        units = self.units[1].nbytes if self.units else 0
        protected = self.protected.nbytes(self.held) if self.protected else 0
        others = self._count_records(self.protected.held if self.protected else [0] * len(self.held))
        return others * self.form.value_record_bytes + self.value_scale_max.nbytes + units + protected

    def _count_records(self, missing: list[int]) -> int:
        """Return the number of records of all heads of all sequences, where so many tokens of each have none."""
        pairs = zip(self.held, missing, strict=True)
        return self.keys.shape[1] * sum(-(-(length - less) // self.form.group_size) for length, less in pairs)

    def reserve(self, capacity: int) -> None:
        """Make room for so many tokens in each sequence, if there is less; what is held is copied."""
        records = -(-capacity // self.form.group_size)
        if records <= self.keys.shape[2]:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            grown = old.new_empty(*old.shape[:2], records, old.shape[3])
            grown[:, :, : old.shape[2]] = old
            setattr(self, name, grown)
        if self.protected:
            self.protected.reserve_blocks(records * self.form.chunks)
        self.version += 1

    def append(
        self, keys: PackedKeys, values: tuple[PackedValues, ...], held: Sequence[int] | None = None, begun: Sequence[int] = ()
    ) -> None:
        """Append tokens in place, behind what each sequence holds, which must be whole groups.

        Args:
            keys, values: the new tokens in the portable layout, as quantizers make them; the lengths of `values` say how many tokens
                each sequence takes, zero for none. Two runs have their tokens in ascending order. A run of protected tokens is waited
                for, and may move the buffer of their values.
            held: tokens of each sequence afterwards, for a caller who knows them; otherwise each is taken to get all that the source
                has room for. Not checked, since lengths are on the device.
            begun: sequences that get their first tokens. What a sequence has once, such as the order of its channels and the units of
                its metadata, is taken with them.
        Raises:
            UnsupportedForm: the kernels do not read this form.
            ValueError: another form than what is held, or the buffers are full: call `reserve` first.
        """
        protected, run = self.form.runs(keys, values)
        batch, heads = self.keys.shape[:2]
        check("keys.codes", keys.codes, (batch, heads, None, None), torch.int32, self.device)
        for part in values:
            check("values.codes", part.codes, (batch, heads, None, None), (torch.int32, torch.uint8), self.device)
        tokens = _room(self.form, keys, values)
        held = self._held_afterwards(tokens, held)
        if begun and self.order is not None and self.order.shape[0] > 1:
            self.order[list(begun)] = keys.order[list(begun)]
        if begun and self.units is not None:
            for own, new in zip(self.units, pack_units(self.form, keys, run), strict=True):
                own[list(begun)] = new[list(begun)]
        counts, places = values[0].lengths, self.value_places
        if len(values) > 1:
            counts = counts + values[1].lengths
        if protected is not None:
            for part in values:
                self.protected.check_tokens(part)
            self.version += self.protected.reserve(protected)
        if self.device.type == "cuda" and not any(part.is_bytes for part in values):
            write_keys, write_values = pack_cuda.write_keys, pack_cuda.write_values
        else:
            write_keys, write_values = _write_keys, _write_values
        write_keys(self.form, keys, self.keys, self.key_scale_max, self.lengths, counts, tokens)
        if run is not None:
            write_values(self.form, run, self.values, self.value_scale_max, places, _entries(self.form, run, tokens))
        if protected is not None:
            own = self.protected
            write_values(own.form, protected, own.values, self.value_scale_max, own.lengths, _entries(own.form, protected, tokens))
            own.mark(protected)
        self.lengths += counts
        self.held = held

    def _held_afterwards(self, tokens: int, held: Sequence[int] | None) -> list[int]:
        """Return how many tokens each sequence holds when so many have been appended, if the caller does not know better."""
        held = [length + tokens for length in self.held] if held is None else list(held)
        if max(held) > self.capacity:
            raise ValueError(f"{max(held)} tokens do not fit into {self.capacity}; call reserve first")
        return held

    def append_codes(
        self,
        keys: tuple[torch.Tensor, torch.Tensor],
        values: tuple[torch.Tensor, torch.Tensor],
        *,
        count: torch.Tensor | None = None,
        held: Sequence[int] | None = None,
    ) -> None:
        """Append tokens in place whose codes are known, with metadata of 4 bits; units are those of this history.

        Args:
            keys: codes, uint8 [B, H, T, C], and metadata, uint8 [B, H, T / S, C]: the code of the scale in the upper half, of the offset
                in the lower one, 0 where none is stored. T in whole groups.
            values: likewise, [B, H, T, D] and [B, H, T / S, D].
            count, held: as in `quantize`; counts in whole groups.
        Raises:
            UnsupportedForm: metadata of this history is not of 4 bits.
            ValueError: tensors of another shape or dtype, or the buffers are full: call `reserve` first.
        """
        form = self.form
        if form.metadata_bits != 4 or not form.is_scaled:
            raise UnsupportedForm(f"metadata has {form.metadata_bits} bits; tokens can be appended as codes with scales of 4 bits")
        batch, heads = self.keys.shape[:2]
        tokens = keys[0].shape[2] // form.group_size * form.group_size
        for name, pair, channels in (("keys", keys, form.channels), ("values", values, form.width)):
            check_packed(f"{name}, codes", pair[0], (batch, heads, tokens, channels), torch.uint8, self.device)
            groups = (batch, heads, tokens // form.group_size, channels)
            check_packed(f"{name}, metadata", pair[1], groups, torch.uint8, self.device)
        held = self._held_afterwards(tokens, held)
        counts = torch.full_like(self.lengths, tokens) if count is None else count
        check_packed("count", counts, (batch,), torch.int32, self.device)
        write = pack_cuda.write_bytes if self.device.type == "cuda" else _write_bytes
        for which, pair, records in ((0, keys, self.keys), (1, values, self.values)):
            write(form, which, *pair, records, self.lengths, counts)
        self.lengths += counts
        self.held = held

    @property
    def value_places(self) -> torch.Tensor:
        """Where the next values that are not protected go: int32 [B], entries held of these."""
        return self.lengths - self.protected.lengths if self.protected else self.lengths

    def choose_order(self, keys: torch.Tensor, *, begin: torch.Tensor | None = None, count: torch.Tensor | None = None) -> None:
        """Choose the order of channels of each sequence, in place, as `choose_channels` does; before anything is held.

        Args:
            keys, begin, count: as in `quantize`.
        """
        self._check_states("keys", keys, begin, count)
        check("order", self.order, (keys.shape[0], 1, self.form.width), torch.uint8, self.device)
        if self.device.type == "cuda":
            quantize_cuda.choose_order(self, keys, begin, count)
        else:
            order = choose_channels_reference(keys, _span(keys, begin, count), self.form.wide_channels)
            self.order.copy_(order.unsqueeze(1))

    def quantize(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        threshold: float = 0.0,
        *,
        begin: torch.Tensor | None = None,
        count: torch.Tensor | None = None,
        held: Sequence[int] | None = None,
    ) -> None:
        """Quantize tokens in place, behind what each sequence holds, which must be whole groups.

        Order and matrix are those of this history; the rules are those of `quantize_keys` and `quantize_values`. None of the tokens is
        protected.

        Args:
            keys, values: [B, H, T, D], float16, bfloat16 or float32, keys after rotary embedding.
            threshold: of ternary values, in units of the mean size of a group.
            begin, count: int32 [B], which tokens of each sequence to take, begin + count at most T. Counts are rounded down to whole
                groups. None: from the first one on, and all.
            held: as in `append`.
        Raises:
            UnsupportedForm: states are not quantized to this form.
            ValueError: states of another shape, dtype or device, or the buffers are full: call `reserve` first.
        """
        self._check_states("keys", keys, begin, count)
        check("values", values, tuple(keys.shape), keys.dtype, self.device)
        quantize_cuda.check_form(self.form.plain)
        if self.center is not None:
            raise UnsupportedForm("keys of this history lie around a center; states are quantized as they are")
        size = self.form.group_size
        tokens = keys.shape[2] // size * size
        held = self._held_afterwards(tokens, held)
        if self.device.type == "cuda":
            quantize_cuda.append(self, keys, values, threshold, begin, count)
        elif tokens:
            self._quantize_plain(keys, values, threshold, _span(keys, begin, count))
        self.lengths += tokens if count is None else count - count % size
        self.held = held

    def _check_states(self, name: str, states: torch.Tensor, begin: torch.Tensor | None, count: torch.Tensor | None) -> None:
        batch, heads = self.keys.shape[:2]
        check(name, states, (batch, heads, None, self.form.width), quantize_cuda.DTYPES, self.device)
        for bound, tensor in (("begin", begin), ("count", count)):
            if tensor is not None:
                check_packed(bound, tensor, (batch,), torch.int32, self.device)

    def _quantize_plain(self, keys: torch.Tensor, values: torch.Tensor, threshold: float, span: Span) -> None:
        """What `quantize_cuda.append` does, in torch."""
        form, device = self.form.plain, self.device
        batch, heads, tokens, width = keys.shape
        tokens = tokens // form.group_size * form.group_size
        span = Span(span.begin, span.count - span.count % form.group_size, span.start)
        group_size = TOKEN_GROUP if form.granularity == "per_token" else form.group_size
        packed = make_keys(batch, heads, tokens, form.segments, form.group_size, device)
        run = make_values(
            batch, heads, tokens, width, device, levels=form.levels, offset_kind=form.offset_kind, granularity=form.granularity,
            group_size=group_size, is_scaled=form.is_scaled,
        )  # fmt: skip
        metadata = {KEY_METADATA: (packed.scale, packed.offset), VALUE_METADATA: (run.scale, run.offset)}
        for tensor in (*metadata[KEY_METADATA], *metadata[VALUE_METADATA]):
            if tensor is not None:
                tensor.zero_()
        order = torch.arange(width, device=device).expand(batch, 1, width) if self.order is None else self.order
        if order.shape[1] != 1:
            raise UnsupportedForm("channels have an order for each head; plain torch quantizes with one for all heads")
        transform = None if self.matrix is None else self.matrix[form.wide_channels :, form.wide_channels :].contiguous()
        order = order[:, 0].int().expand(batch, -1).contiguous()
        quantize_keys_reference(keys, span, order, transform, packed)
        quantize_values_reference(values, span, threshold, run)
        run.lengths.copy_(span.count)
        is_taken = torch.arange(keys.shape[2], device=device) - span.begin[:, None]
        is_taken = ((is_taken >= 0) & (is_taken < span.count[:, None]))[:, None, :, None]
        for bit, states in ((KEY_STATES, keys), (VALUE_STATES, values)):
            self.faults |= bit * (is_taken & ~states.isfinite()).any()
        for bit, tensors in metadata.items():
            for tensor in tensors:
                if tensor is not None:
                    self.faults |= bit * (~tensor.isfinite()).any()
        self._append_plain(packed, run, tokens)

    def _append_plain(self, keys: PackedKeys, run: PackedValues, tokens: int) -> None:
        """What kernels do with a single run, in torch."""
        _write_keys(self.form, keys, self.keys, self.key_scale_max, self.lengths, run.lengths, tokens)
        _write_values(self.form, run, self.values, self.value_scale_max, self.value_places, tokens)

    def unpack(self) -> tuple[PackedKeys, tuple[PackedValues, ...]]:
        """Return a copy in the portable layout, with room for `max_length` tokens: for another backend, or to dequantize."""
        form = self.form
        records = -(-self.max_length // form.group_size)
        key_units, value_units = unpack_units(form, self.units) if self.units else ({}, {})
        codes, scale, offset = unpack_keys(form, self.keys[:, :, :records])
        keys = PackedKeys(
            form.segments, form.group_size, pack_key_words(form.segments, codes), _stored(form, scale), _stored(form, offset),
            **key_units, order=self.order, matrix=self.matrix, center=self.center,
        )  # fmt: skip
        values = self.values[:, :, :records]
        if not self.protected:
            return keys, (_read_values(form, values, self.lengths.clone(), **value_units),)
        own = self.protected
        tokens, other_tokens = own.tokens(self.lengths, records * form.group_size)
        protected = _read_values(own.form, own.values, own.lengths.clone(), tokens=tokens)
        return keys, (protected, _read_values(form, values, self.lengths - own.lengths, tokens=other_tokens))

    def select_batch(self, indices: torch.Tensor) -> FragmentHistory:
        """Return a copy of the sequences `indices` (integers, which may repeat), in that order."""
        order, center = (t if t is None or t.shape[0] == 1 else t[indices] for t in (self.order, self.center))
        units = None if self.units is None else tuple(unit[indices] for unit in self.units)
        maps = {"order": order, "matrix": self.matrix, "center": center, "units": units}
        chosen = FragmentHistory(self.form, batch=len(indices), heads=self.keys.shape[1], capacity=0, device=self.device, **maps)
        for name in ("keys", "values", "lengths", "key_scale_max", "value_scale_max"):
            setattr(chosen, name, getattr(self, name)[indices])
        chosen.faults = self.faults.clone()
        chosen.held = [self.held[index] for index in indices.tolist()]
        if self.protected:
            chosen.protected = self.protected.select_batch(indices)
        return chosen


def _span(states: torch.Tensor, begin: torch.Tensor | None, count: torch.Tensor | None) -> Span:
    nothing = torch.zeros(states.shape[0], dtype=torch.int32, device=states.device)
    return Span(nothing if begin is None else begin, nothing + states.shape[2] if count is None else count, nothing)


def _room(form: Form, keys: PackedKeys, values: tuple[PackedValues, ...]) -> int:
    """Tokens that both keys and values have room for, in whole groups."""
    return min(sum(run.entries for run in values), keys.codes.shape[2] * 32) // form.group_size * form.group_size


def _entries(form: Form, run: PackedValues, tokens: int) -> int:
    """Entries of a run of so many tokens at most, in whole groups."""
    return min(run.entries, tokens) // form.group_size * form.group_size


def _write_keys(
    form: Form, keys: PackedKeys, records: torch.Tensor, scale_max: torch.Tensor, starts: torch.Tensor, counts: torch.Tensor, tokens: int
) -> None:
    """What `pack_cuda.write_keys` does, in torch."""
    groups = tokens // form.group_size
    is_new = torch.arange(0, tokens, form.group_size, device=records.device) < counts[:, None]
    scale, offset = (_cut(tensor, groups, is_new) for tensor in (keys.scale, keys.offset))
    if form.metadata_bits == 4:
        scale, offset = _nibbles(scale, form.channels), _nibbles(offset, form.stored_offsets)
    else:
        scale_max.copy_(torch.maximum(scale_max, scale.abs().amax(dim=(2, 3)).float()))
    row, group = is_new.nonzero(as_tuple=True)
    target = starts.long()[row] // form.group_size + group
    records[row, :, target] = pack_keys(form, keys.unpack()[:, :, :tokens], scale, offset)[row, :, group]


def _write_values(
    form: Form, run: PackedValues, records: torch.Tensor, scale_max: torch.Tensor, starts: torch.Tensor, entries: int
) -> None:
    """What `pack_cuda.write_values` does, in torch."""
    groups = entries // form.group_size
    is_new = torch.arange(entries, device=records.device) < run.lengths[:, None]
    is_new_group = is_new[:, :: form.group_size]
    rows, is_held = (entries, is_new) if form.granularity == "per_token" else (groups, is_new_group)
    scale, offset = (_cut(tensor, rows, is_held) for tensor in (run.scale, run.offset))
    if form.metadata_bits == 4:
        scale, offset = _nibbles(scale, form.width), _nibbles(offset, form.width)
    elif scale is not None:
        scale_max.copy_(torch.maximum(scale_max, scale.abs().amax(dim=(2, 3)).float()))
    row, group = is_new_group.nonzero(as_tuple=True)
    target = starts.long()[row] // form.group_size + group
    records[row, :, target] = pack_values(form, run.unpack()[:, :, :entries], scale, offset)[row, :, group]


def _write_bytes(
    form: Form, which: int, codes: torch.Tensor, metadata: torch.Tensor, records: torch.Tensor, starts: torch.Tensor, counts: torch.Tensor
) -> None:
    """What `pack_cuda.write_bytes` does, in torch."""
    is_new = torch.arange(0, codes.shape[2], form.group_size, device=records.device) < counts[:, None]
    row, group = is_new.nonzero(as_tuple=True)
    scale, offset = metadata >> 4, metadata & 15
    if which == 0:
        packed = pack_keys(form, codes, scale, offset[..., : form.stored_offsets] if form.stored_offsets else None)
    else:
        packed = pack_values(form, codes, scale, offset if form.is_value_offset_stored else None)
    records[row, :, starts.long()[row] // form.group_size + group] = packed[row, :, group]


def _cut(metadata: torch.Tensor | None, count: int, is_held: torch.Tensor) -> torch.Tensor | None:
    """Return the first `count` of metadata. What lies beyond the lengths may be NaN; in the record of a new token it must be finite."""
    return None if metadata is None else torch.where(is_held[:, None, :, None], metadata[:, :, :count], 0)


def _read_values(form: Form, records: torch.Tensor, lengths: torch.Tensor, **others: torch.Tensor) -> PackedValues:
    """Return the entries of records in the portable layout, with other tensors as they are given."""
    codes, scale, offset = unpack_values(form, records)
    group_size = TOKEN_GROUP if form.granularity == "per_token" else form.group_size
    return PackedValues(
        lengths, form.levels, form.offset_kind, form.granularity, group_size, form.width,
        pack_words(codes, form.value_bits), _stored(form, scale), _stored(form, offset), **others,
    )  # fmt: skip


def _nibbles(metadata: torch.Tensor | None, channels: int) -> torch.Tensor | None:
    return None if metadata is None else unpack(metadata, METADATA_CODES, channels)


def _stored(form: Form, metadata: torch.Tensor | None) -> torch.Tensor | None:
    """Bring metadata out of records to how `packed` stores it."""
    if metadata is None:
        return None
    return pack(metadata, METADATA_CODES) if form.metadata_bits == 4 else metadata.contiguous()
