"""Growable packed history of one layer, in fragment order: what a cache fills and `attend_cuda` reads.

    history = FragmentHistory(form, batch=1, heads=4, capacity=8192, device=device, order=order, matrix=matrix)
    history.append(keys, values)                    # `packed.PackedKeys` and `packed.PackedValues` of the new tokens
    out = attend_cuda.attend(query, history, residual, scaling)

Appending writes in place at each sequence's own length and waits for nothing, so that a decode step can be captured as a CUDA graph
while the buffers have room. `reserve` gives them more, by copying, and must stay outside of a graph.
"""

from __future__ import annotations

import torch

from vidkv_kernels import pack_cuda
from vidkv_kernels.fragments import (
    TOKEN_GROUP,
    Form,
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


class FragmentHistory:
    """Packed keys and values of one layer.

    Attributes:
        form: what codes and metadata mean.
        keys: uint8 [B, H, capacity / S, key_record_bytes].
        values: uint8 [B, H, capacity / S, value_record_bytes].
        lengths: int32 [B], tokens held by each sequence; what lies beyond is never used.
        max_length: an upper bound of `lengths` known without asking the device.
        key_scale_max, value_scale_max: float32 [B, H], no scale held is larger in size; for the range of half precision. Zero for
            metadata of 4 bits, whose range is known.
        order, matrix, center: as in `packed.PackedKeys`.
        matrix_fragments: the matrix for the kernel, uint8 [bytes], shared like the matrix itself.
        units: what metadata of 4 bits is counted in, keys and values, as `fragments.pack_units` gives it; None for float16.
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
        self.max_length = 0
        self.key_scale_max = torch.zeros(batch, heads, device=device)
        self.value_scale_max = torch.zeros(batch, heads, device=device)
        self.order = order
        self.matrix = matrix
        self.matrix_fragments = None if matrix is None else matrix_fragments(form, matrix)
        if matrix is None and form.metadata_bits == 4:
            # The kernel multiplies the query with units where it maps it.
            self.matrix_fragments = identity_fragments(form, device)
        self.center = center
        self.units = units

    @classmethod
    def from_packed(cls, keys: PackedKeys, values: tuple[PackedValues, ...], capacity: int = 0) -> FragmentHistory:
        """Copy packed history from the portable layout.

        Args:
            capacity: tokens to have room for, at least those of the source.
        Raises:
            UnsupportedForm: the kernels do not read this form.
        """
        form = Form.of(keys, values)
        batch, heads = keys.codes.shape[:2]
        room = max(_room(form, keys, values[0]), capacity)
        maps = {"order": keys.order, "matrix": keys.matrix, "center": keys.center}
        units = pack_units(form, keys, values[0])
        history = cls(form, batch=batch, heads=heads, capacity=room, device=keys.device, units=units, **maps)
        history.append(keys, values)
        return history

    @property
    def capacity(self) -> int:
        """Tokens that the buffers have room for."""
        return self.keys.shape[2] * self.form.group_size

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def nbytes(self) -> int:
        """Bytes of what is held: records of `max_length` tokens, order and center; not the shared matrix, nor the spare room of buffers."""
        batch, heads = self.keys.shape[:2]
        record = self.form.key_record_bytes + self.form.value_record_bytes
        own = batch * heads * -(-self.max_length // self.form.group_size) * record
        others = (self.lengths, self.key_scale_max, self.value_scale_max, self.order, self.center, *(self.units or ()))
        return own + sum(tensor.nbytes for tensor in others if tensor is not None)

    @property
    def value_nbytes(self) -> int:
        """The part of `nbytes` that values take."""
        batch, heads = self.values.shape[:2]
        records = -(-self.max_length // self.form.group_size)
        units = self.units[1].nbytes if self.units else 0
        return batch * heads * records * self.form.value_record_bytes + self.value_scale_max.nbytes + units

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

    def append(self, keys: PackedKeys, values: tuple[PackedValues, ...], max_length: int | None = None) -> None:
        """Append tokens in place, behind what each sequence holds, which must be whole groups.

        Args:
            keys, values: the new tokens in the portable layout, as quantizers make them; `values[0].lengths` says how many tokens
                each sequence takes, zero for none. Units and centers of their metadata are those of the first tokens.
            max_length: upper bound of the lengths afterwards, for a caller who knows a smaller one than `self.max_length` and the
                source's tokens together: sequences that grow in turn. Not checked, since lengths are on the device.
        Raises:
            UnsupportedForm: the kernels do not read this form.
            ValueError: another form than what is held, or the buffers are full: call `reserve` first.
        """
        found = Form.of(keys, values)
        if found != self.form:
            raise ValueError(f"appended tokens have form {found}; allowed: that of what is held, {self.form}")
        run = values[0]
        batch, heads = self.keys.shape[:2]
        check("keys.codes", keys.codes, (batch, heads, None, None), torch.int32, self.device)
        check("values.codes", run.codes, (batch, heads, None, None), (torch.int32, torch.uint8), self.device)
        tokens = _room(self.form, keys, run)
        if max_length is None:
            max_length = self.max_length + tokens
        if max_length > self.capacity:
            raise ValueError(f"{max_length} tokens do not fit into {self.capacity}; call reserve first")
        if self.device.type == "cuda" and not run.is_bytes:
            pack_cuda.append(self, keys, run, tokens)
        else:
            self._append_plain(keys, run, tokens)
        self.lengths += run.lengths
        self.max_length = max_length

    def _append_plain(self, keys: PackedKeys, run: PackedValues, tokens: int) -> None:
        """What `pack_cuda.append` does, in torch."""
        form, groups = self.form, tokens // self.form.group_size
        is_new = torch.arange(tokens, device=self.device) < run.lengths[:, None]
        is_new_group = is_new[:, :: form.group_size]
        rows, is_held = (tokens, is_new) if form.granularity == "per_token" else (groups, is_new_group)

        # What lies beyond the lengths may be anything, NaN as well; in the record of a new token it must be finite.
        def cut(metadata: torch.Tensor | None, count: int, held: torch.Tensor) -> torch.Tensor | None:
            return None if metadata is None else torch.where(held[:, None, :, None], metadata[:, :, :count], 0)

        key_scale, key_offset = (cut(tensor, groups, is_new_group) for tensor in (keys.scale, keys.offset))
        value_scale, value_offset = (cut(tensor, rows, is_held) for tensor in (run.scale, run.offset))
        if form.metadata_bits == 4:
            key_scale, key_offset = _nibbles(key_scale, form.channels), _nibbles(key_offset, form.stored_offsets)
            value_scale, value_offset = _nibbles(value_scale, form.width), _nibbles(value_offset, form.width)
        else:
            self.key_scale_max.copy_(torch.maximum(self.key_scale_max, key_scale.abs().amax(dim=(2, 3)).float()))
        if value_scale is not None and form.metadata_bits == 16:
            self.value_scale_max.copy_(torch.maximum(self.value_scale_max, value_scale.abs().amax(dim=(2, 3)).float()))
        row, group = is_new_group.nonzero(as_tuple=True)
        target = self.lengths.long()[row] // form.group_size + group
        self.keys[row, :, target] = pack_keys(form, keys.unpack()[:, :, :tokens], key_scale, key_offset)[row, :, group]
        self.values[row, :, target] = pack_values(form, run.unpack()[:, :, :tokens], value_scale, value_offset)[row, :, group]

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
        codes, scale, offset = unpack_values(form, self.values[:, :, :records])
        group_size = TOKEN_GROUP if form.granularity == "per_token" else form.group_size
        values = PackedValues(
            self.lengths.clone(), form.levels, form.offset_kind, form.granularity, group_size, form.width,
            pack_words(codes, form.value_bits), _stored(form, scale), _stored(form, offset), **value_units,
        )  # fmt: skip
        return keys, (values,)

    def select_batch(self, indices: torch.Tensor) -> FragmentHistory:
        """Return a copy of the sequences `indices` (integers, which may repeat), in that order."""
        order, center = (t if t is None or t.shape[0] == 1 else t[indices] for t in (self.order, self.center))
        units = None if self.units is None else tuple(unit[indices] for unit in self.units)
        maps = {"order": order, "matrix": self.matrix, "center": center, "units": units}
        chosen = FragmentHistory(self.form, batch=len(indices), heads=self.keys.shape[1], capacity=0, device=self.device, **maps)
        for name in ("keys", "values", "lengths", "key_scale_max", "value_scale_max"):
            setattr(chosen, name, getattr(self, name)[indices])
        chosen.max_length = self.max_length
        return chosen


def _room(form: Form, keys: PackedKeys, run: PackedValues) -> int:
    """Tokens that both keys and values have room for, in whole groups."""
    return min(run.entries, keys.codes.shape[2] * 32) // form.group_size * form.group_size


def _nibbles(metadata: torch.Tensor | None, channels: int) -> torch.Tensor | None:
    return None if metadata is None else unpack(metadata, METADATA_CODES, channels)


def _stored(form: Form, metadata: torch.Tensor | None) -> torch.Tensor | None:
    """Bring metadata out of records to how `packed` stores it."""
    if metadata is None:
        return None
    return pack(metadata, METADATA_CODES) if form.metadata_bits == 4 else metadata.contiguous()
