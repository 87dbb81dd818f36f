"""Growable packed history of one layer, in fragment order: what a cache fills and `attend_cuda` reads.

    history = FragmentHistory(form, batch=1, heads=4, capacity=8192, device=device, rotation=rotation)
    history.append(keys, values)                    # `packed.PackedKeys` and `packed.PackedValues` of the new tokens
    out = attend_cuda.attend(query, history, residual, scaling)

Appending writes in place at each sequence's own length and waits for nothing, so that a decode step can be captured as a CUDA graph
while the buffers have room. `reserve` gives them more, by copying, and must stay outside of a graph.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vidkv_kernels import pack_cuda
from vidkv_kernels.fragments import TOKEN_GROUP, Form, pack_keys, pack_rotation, pack_values, unpack_keys, unpack_values
from vidkv_kernels.packed import PackedKeys, PackedValues, check, check_packed, pack_words
from vidkv_kernels.protected_values import ProtectedValues


class FragmentHistory:
    """Packed keys and values of one layer.

    Attributes:
        form: what codes and metadata mean.
        keys: uint8 [B, H, capacity / S, key_record_bytes].
        values: uint8 [B, H, capacity / S, value_record_bytes].
        lengths: int32 [B], tokens held by each sequence; what lies beyond is never used.
        max_length: an upper bound of `lengths` known without asking the device.
        key_scale_max, value_scale_max: float32 [B, H], no scale held is larger in size; for the range of half precision.
        rotation: float32 [B or 1, H or 1, D, C]; a stored key k scores (q @ rotation) . k. None: the identity, C = D.
        rotation_fragments: the same for the kernel, uint8 [B or 1, H or 1, bytes].
        center: float32 [B or 1, H or 1, D], was subtracted from keys before rotation. None: nothing was.
        protected: values of tokens that have others than `values`, which lie there token after token without them; None: all are alike.
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
        rotation: torch.Tensor | None = None,
        center: torch.Tensor | None = None,
    ):
        device = torch.empty(0, device=device).device
        if rotation is not None:
            check_packed("rotation", rotation, ((batch, 1), (heads, 1), form.width, form.channels), torch.float32, device)
        elif form.channels != form.width:
            raise ValueError(f"keys have {form.channels} channels and queries {form.width}; give a rotation")
        if center is not None:
            check_packed("center", center, ((batch, 1), (heads, 1), form.width), torch.float32, device)
        self.form = form
        records = -(-capacity // form.group_size)
        self.keys = torch.empty(batch, heads, records, form.key_record_bytes, dtype=torch.uint8, device=device)
        self.values = torch.empty(batch, heads, records, form.value_record_bytes, dtype=torch.uint8, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.max_length = 0
        self.key_scale_max = torch.zeros(batch, heads, device=device)
        self.value_scale_max = torch.zeros(batch, heads, device=device)
        self.rotation = rotation
        self.rotation_fragments = None if rotation is None else pack_rotation(form, rotation)
        self.center = center
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
            form: of all tokens to come; None: these show it.
        Raises:
            UnsupportedForm: the kernels do not read this form.
        """
        form = Form.of(keys, values) if form is None else form
        batch, heads = keys.codes.shape[:2]
        room = max(_room(form, keys, values), capacity)
        history = cls(form, batch=batch, heads=heads, capacity=room, device=keys.device, rotation=keys.rotation, center=keys.center)
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
        """Bytes of what is held: records of `max_length` tokens, rotation and center; not the spare room of the buffers."""
        batch, heads = self.keys.shape[:2]
        own = batch * heads * -(-self.max_length // self.form.group_size) * self.form.key_record_bytes
        others = (self.lengths, self.key_scale_max, self.rotation_fragments, self.center)
        return own + self.value_nbytes + sum(tensor.nbytes for tensor in others if tensor is not None)

    @property
    def value_nbytes(self) -> int:
        """The part of `nbytes` that values take."""
        batch, heads = self.values.shape[:2]
        lengths = [self.max_length] * batch
        own = self.value_scale_max.nbytes
        if self.protected:
            own += self.protected.nbytes(lengths)
            lengths = [length - protected for length, protected in zip(lengths, self.protected.held, strict=True)]
        records = sum(-(-length // self.form.group_size) for length in lengths)
        return own + heads * records * self.form.value_record_bytes

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

    def append(self, keys: PackedKeys, values: tuple[PackedValues, ...], max_length: int | None = None) -> None:
        """Append tokens in place, behind what each sequence holds, which must be whole groups.

        Args:
            keys, values: the new tokens in the portable layout, as quantizers make them; the lengths of `values` say how many tokens
                each sequence takes, zero for none. Runs have their tokens in ascending order. A run of protected tokens makes this
                wait for the device, to see whether there is room.
            max_length: upper bound of the lengths afterwards, for a caller who knows a smaller one than `self.max_length` and the
                source's tokens together: sequences that grow in turn. Not checked, since lengths are on the device.
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
        if max_length is None:
            max_length = self.max_length + tokens
        if max_length > self.capacity:
            raise ValueError(f"{max_length} tokens do not fit into {self.capacity}; call reserve first")
        counts, places = values[0].lengths, self.lengths
        if len(values) > 1:
            counts = counts + values[1].lengths
        if self.protected:
            places = places - self.protected.lengths
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
        self.max_length = max_length

    def unpack(self) -> tuple[PackedKeys, tuple[PackedValues, ...]]:
        """Return a copy in the portable layout, with room for `max_length` tokens: for another backend, or to dequantize."""
        form = self.form
        records = -(-self.max_length // form.group_size)
        codes, scale, offset = unpack_keys(form, self.keys[:, :, :records])
        words, start = [], 0
        for segment in form.segments:
            words.append(pack_words(codes[..., start : start + segment.channels], segment.nbits))
            start += segment.channels
        keys = PackedKeys(
            form.segments, form.group_size, torch.cat(words, dim=-1), scale.contiguous(), None if offset is None else offset.contiguous(),
            rotation=self.rotation, center=self.center,
        )  # fmt: skip
        if not self.protected:
            return keys, (_read_values(form, self.values[:, :, :records], self.lengths.clone()),)
        own = self.protected
        tokens, other_tokens = own.tokens(self.lengths, records * form.group_size)
        protected = replace(_read_values(own.form, own.values, own.lengths.clone()), tokens=tokens)
        others = _read_values(form, self.values[:, :, :records], self.lengths - own.lengths)
        return keys, (protected, replace(others, tokens=other_tokens))

    def select_batch(self, indices: torch.Tensor) -> FragmentHistory:
        """Return a copy of the sequences `indices` (integers, which may repeat), in that order."""
        rotation, center = (t if t is None or t.shape[0] == 1 else t[indices] for t in (self.rotation, self.center))
        batch = len(indices)
        chosen = FragmentHistory(
            self.form, batch=batch, heads=self.keys.shape[1], capacity=0, device=self.device, rotation=rotation, center=center
        )
        for name in ("keys", "values", "lengths", "key_scale_max", "value_scale_max"):
            setattr(chosen, name, getattr(self, name)[indices])
        chosen.max_length = self.max_length
        if self.protected:
            chosen.protected = self.protected.select_batch(indices)
        return chosen


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
    if scale is not None:
        scale_max.copy_(torch.maximum(scale_max, scale.abs().amax(dim=(2, 3)).float()))
    row, group = is_new_group.nonzero(as_tuple=True)
    target = starts.long()[row] // form.group_size + group
    records[row, :, target] = pack_values(form, run.unpack()[:, :, :entries], scale, offset)[row, :, group]


def _cut(metadata: torch.Tensor | None, count: int, is_held: torch.Tensor) -> torch.Tensor | None:
    """Return the first `count` of metadata. What lies beyond the lengths may be NaN; in the record of a new token it must be finite."""
    return None if metadata is None else torch.where(is_held[:, None, :, None], metadata[:, :, :count], 0)


def _read_values(form: Form, records: torch.Tensor, lengths: torch.Tensor) -> PackedValues:
    """Return the entries of records in the portable layout."""
    codes, scale, offset = unpack_values(form, records)
    group_size = TOKEN_GROUP if form.granularity == "per_token" else form.group_size
    return PackedValues(
        lengths, form.levels, form.offset_kind, form.granularity, group_size, form.width, pack_words(codes, form.value_bits), scale, offset
    )
