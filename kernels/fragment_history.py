"""Growable packed history of one layer, in fragment order: what a cache fills and `attend_cuda` reads.

    history = FragmentHistory(form, batch=1, heads=4, capacity=8192, device=device, rotation=rotation)
    history.append(key_codes, key_scale, key_offset, value_codes, value_scale, value_offset)
    out = attend_cuda.attend(query, history, residual, scaling)

Appending writes in place at each sequence's own length and waits for nothing, so that a decode step can be captured as a CUDA graph
while the buffers have room. `reserve` gives them more, by copying, and must stay outside of a graph.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vidkv_kernels.fragments import Form, pack_keys, pack_rotation, pack_values, unpack_keys, unpack_values
from vidkv_kernels.packed import PackedKeys, PackedValues, check, check_packed, pack_words


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

    @classmethod
    def from_packed(cls, keys: PackedKeys, values: tuple[PackedValues, ...], max_length: int | None = None) -> FragmentHistory:
        """Copy packed history from the portable layout.

        Args:
            max_length: upper bound of its lengths; None: the room of its buffers.
        Raises:
            UnsupportedForm: the kernels do not read this form.
        """
        form = Form.of(keys, values)
        run = values[0]
        capacity = min(run.entries, keys.codes.shape[2] * 32) // form.group_size * form.group_size
        if keys.offset is None and form.stored_offsets:
            raise ValueError("keys.offset is missing")
        batch, heads = keys.codes.shape[:2]
        history = cls(
            form, batch=batch, heads=heads, capacity=capacity, device=keys.device, rotation=keys.rotation, center=keys.center
        )  # fmt: skip
        metadata = (None if t is None else t[:, :, : capacity // form.group_size] for t in (keys.scale, keys.offset))
        rows = capacity if form.granularity == "per_token" else capacity // form.group_size
        value_metadata = (None if t is None else t[:, :, :rows] for t in (run.scale, run.offset))
        history._write(
            torch.zeros_like(run.lengths), keys.unpack()[:, :, :capacity], *metadata, run.unpack()[:, :, :capacity], *value_metadata, run.lengths
        )
        history.max_length = capacity if max_length is None else max_length
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
        record = self.form.key_record_bytes + self.form.value_record_bytes
        own = batch * heads * -(-self.max_length // self.form.group_size) * record
        others = (self.lengths, self.key_scale_max, self.value_scale_max, self.rotation_fragments, self.center)
        return own + sum(tensor.nbytes for tensor in others if tensor is not None)

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

    def append(
        self,
        key_codes: torch.Tensor,
        key_scale: torch.Tensor,
        key_offset: torch.Tensor | None,
        value_codes: torch.Tensor,
        value_scale: torch.Tensor | None,
        value_offset: torch.Tensor | None,
        counts: torch.Tensor | None = None,
    ) -> None:
        """Append whole groups in place, behind what each sequence holds, which must be whole groups as well.

        Args:
            key_codes: uint8 [B, H, T, C], T a multiple of S.
            key_scale: float16 [B, H, T / S, C].
            key_offset: float16 [B, H, T / S, channels with a stored offset]; None if no channel has one.
            value_codes: uint8 [B, H, T, D].
            value_scale: float16, [B, H, T / S, D] (per_channel) or [B, H, T, D / 32] (per_token); None if unscaled.
            value_offset: as value_scale; None if none is stored.
            counts: int32 [B], how many of the T tokens each sequence takes; None: all.
        Raises:
            ValueError: a tensor of another shape, dtype or device, or the buffers are full: call `reserve` first.
        """
        tokens = key_codes.shape[2]
        if self.max_length + tokens > self.capacity:
            raise ValueError(f"{tokens} more tokens after {self.max_length} do not fit into {self.capacity}; call reserve first")
        if counts is None:
            counts = torch.full_like(self.lengths, tokens)
        self._write(self.lengths.clone(), key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, counts)
        self.max_length += tokens

    def _write(
        self,
        start: torch.Tensor,
        key_codes: torch.Tensor,
        key_scale: torch.Tensor,
        key_offset: torch.Tensor | None,
        value_codes: torch.Tensor,
        value_scale: torch.Tensor | None,
        value_offset: torch.Tensor | None,
        counts: torch.Tensor,
    ) -> None:
        form, device = self.form, self.device
        batch, heads = self.keys.shape[:2]
        tokens = key_codes.shape[2]
        if tokens % form.group_size:
            raise ValueError(f"{tokens} tokens cannot be packed; give a multiple of {form.group_size}")
        groups = tokens // form.group_size
        value_shape = (batch, heads, tokens, form.width // 32) if form.granularity == "per_token" else (batch, heads, groups, form.width)
        check("key_codes", key_codes, (batch, heads, tokens, form.channels), torch.uint8, device)
        check("key_scale", key_scale, (batch, heads, groups, form.channels), torch.float16, device)
        check("value_codes", value_codes, (batch, heads, tokens, form.width), torch.uint8, device)
        check("counts", counts, (batch,), torch.int32, device)
        for name, tensor, shape, is_needed in (
            ("key_offset", key_offset, (batch, heads, groups, form.stored_offsets), form.stored_offsets > 0),
            ("value_scale", value_scale, value_shape, form.is_scaled),
            ("value_offset", value_offset, value_shape, form.is_value_offset_stored),
        ):
            if is_needed:
                check(name, tensor, shape, torch.float16, device)
            elif tensor is not None:
                raise ValueError(f"{name} is given, but this form stores none")
        place = torch.arange(tokens, device=device)
        is_new = place < counts[:, None]
        is_new_group = is_new[:, :: form.group_size]
        # What lies beyond the counts may be anything, NaN as well; in the record of a new token it must be finite.
        key_scale, key_offset = (None if t is None else torch.where(is_new_group[:, None, :, None], t, 0) for t in (key_scale, key_offset))
        is_held = is_new if form.granularity == "per_token" else is_new_group
        value_scale, value_offset = (None if t is None else torch.where(is_held[:, None, :, None], t, 0) for t in (value_scale, value_offset))
        self.key_scale_max = torch.maximum(self.key_scale_max, key_scale.abs().amax(dim=(2, 3)).float())
        if value_scale is not None:
            self.value_scale_max = torch.maximum(self.value_scale_max, value_scale.abs().amax(dim=(2, 3)).float())
        row, group = is_new_group.nonzero(as_tuple=True)
        target = start.long()[row] // form.group_size + group
        self.keys[row, :, target] = pack_keys(form, key_codes, key_scale, key_offset)[row, :, group]
        self.values[row, :, target] = pack_values(form, value_codes, value_scale, value_offset)[row, :, group]
        self.lengths = start + counts

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
        codes, scale, offset = unpack_values(form, self.values[:, :, :records])
        values = PackedValues(
            self.lengths.clone(), form.levels, form.offset_kind, form.granularity, 32 if form.granularity == "per_token" else form.group_size,
            form.width, pack_words(codes, form.value_bits), scale, offset,
        )  # fmt: skip
        return keys, (values,)

    def select_batch(self, indices: torch.Tensor) -> FragmentHistory:
        """Return a copy of the sequences `indices` (integers, which may repeat), in that order."""
        rotation, center = (t if t is None or t.shape[0] == 1 else t[indices] for t in (self.rotation, self.center))
        batch = len(indices)
        chosen = FragmentHistory(
            replace(self.form), batch=batch, heads=self.keys.shape[1], capacity=0, device=self.device, rotation=rotation, center=center
        )
        for name in ("keys", "values", "lengths", "key_scale_max", "value_scale_max"):
            setattr(chosen, name, getattr(self, name)[indices])
        chosen.max_length = self.max_length
        return chosen
