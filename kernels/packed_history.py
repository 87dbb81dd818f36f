"""Growable packed history of one layer in the portable layout of `packed`: what a cache fills and `attend` reads.

The counterpart of `fragment_history` for backends that read the layout as it is. All sequences hold equally many tokens.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from vidkv_kernels.packed import WORD, PackedKeys, PackedValues

SPARE = 8
"""A buffer that is full is replaced by one with room for an eighth more."""
KEY_TENSORS = ("codes", "scale", "offset")
VALUE_TENSORS = ("codes", "scale", "offset", "tokens")
FORM = ("levels", "offset_kind", "granularity", "group_size", "width")


class PackedHistory:
    """Packed keys and values of one layer.

    Args:
        keys, values: the first tokens, whose tensors become the first buffers: no room beyond what is held.

    Attributes:
        keys, values: as `packed.PackedLayer` takes them.
        max_length: tokens that every sequence holds.
    """

    def __init__(self, keys: PackedKeys, values: tuple[PackedValues, ...]):
        self.keys = keys
        self.values = values
        self.max_length = keys.codes.shape[2] * WORD
        self._entries = [run.entries for run in values]

    @property
    def value_nbytes(self) -> int:
        """Bytes of the values held."""
        held = (_held_bytes(run, VALUE_TENSORS, run.entries, entries) for run, entries in zip(self.values, self._entries, strict=True))
        others = (tensor for run in self.values for tensor in (run.lengths, run.scale_unit, run.offset_unit, run.offset_center))
        return sum(held) + sum(tensor.nbytes for tensor in others if tensor is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of what is held, order and center included; not the matrix, which all layers share, nor the spare room of the buffers."""
        keys = self.keys
        others = (keys.scale_unit, keys.offset_unit, keys.offset_center, keys.order, keys.center)
        own = _held_bytes(keys, KEY_TENSORS, keys.codes.shape[2] * WORD, self.max_length)
        return own + sum(tensor.nbytes for tensor in others if tensor is not None) + self.value_nbytes

    def append(self, keys: PackedKeys, values: tuple[PackedValues, ...]) -> None:
        """Write whole groups of tokens behind what is held.

        Args:
            keys: new tokens, stored like those held; order, matrix and center are those of the first tokens.
            values: one run. It goes behind a run of the same form, or becomes the second run.
        Raises:
            ValueError: tokens that are stored in another way.
        """
        held = self.keys
        if (keys.segments, keys.group_size) != (held.segments, held.group_size) or len(values) != 1:
            raise ValueError(f"appended keys have {keys.segments} in groups of {keys.group_size}; allowed: the form of those held")
        (new,) = values
        alike = [index for index, run in enumerate(self.values) if _form(run) == _form(new)]
        if not alike and (new.tokens is None or len(self.values) > 1):
            raise ValueError(f"appended values have the form {_form(new)}; allowed: {[_form(run) for run in self.values]}")
        added = keys.codes.shape[2] * WORD
        room = held.codes.shape[2] * WORD
        self.keys = replace(held, **_joined(held, keys, KEY_TENSORS, room, self.max_length, added))
        self.max_length += added
        if not alike:
            self.values += (new,)
            self._entries.append(new.entries)
            return
        index = alike[-1]
        run, entries = self.values[index], self._entries[index]
        tensors = _joined(run, new, VALUE_TENSORS, run.entries, entries, new.entries)
        grown = replace(run, **tensors, lengths=run.lengths + new.lengths)
        self.values = (*self.values[:index], grown, *self.values[index + 1 :])
        self._entries[index] = entries + new.entries

    def unpack(self) -> tuple[PackedKeys, tuple[PackedValues, ...]]:
        """Return what is held in the portable layout, which it is in; entries beyond the lengths mean nothing."""
        return self.keys, self.values

    def select_batch(self, indices: torch.Tensor) -> PackedHistory:
        """Return a copy of the sequences `indices` (integers, which may repeat), in that order."""
        batch = self.keys.codes.shape[0]
        chosen = PackedHistory(_select(self.keys, indices, batch), tuple(_select(run, indices, batch) for run in self.values))
        chosen.max_length, chosen._entries = self.max_length, list(self._entries)
        return chosen


def _form(run: PackedValues) -> tuple:
    return (*(getattr(run, name) for name in FORM), run.is_bytes, run.scale is None, run.tokens is None)


def _axis(name: str) -> int:
    """The dimension that grows."""
    return 1 if name == "tokens" else 2


def _held_bytes(part: PackedKeys | PackedValues, names: tuple[str, ...], room: int, held: int) -> int:
    tensors = (getattr(part, name) for name in names)
    return sum(tensor.nbytes * held // room for tensor in tensors if tensor is not None)


def _joined(
    held: PackedKeys | PackedValues, new: PackedKeys | PackedValues, names: tuple[str, ...], room: int, length: int, added: int
) -> dict[str, torch.Tensor]:
    """Write tensors of `new` behind those `held`, in place or, if there is no room, in larger buffers; return the buffers."""
    unit = max(WORD, held.group_size)
    total = length + added
    larger = -(-(total + total // SPARE) // unit) * unit if total > room else room
    buffers = {}
    for name in names:
        old, tail, axis = getattr(held, name), getattr(new, name), _axis(name)
        if old is None:
            continue
        start = old.shape[axis] * length // room
        buffer = old
        if larger > room:
            buffer = old.new_empty(*old.shape[:axis], old.shape[axis] * larger // room, *old.shape[axis + 1 :])
            buffer.narrow(axis, 0, start).copy_(old.narrow(axis, 0, start))
        buffer.narrow(axis, start, tail.shape[axis]).copy_(tail)
        buffers[name] = buffer
    return buffers


def _select(part: PackedKeys | PackedValues, indices: torch.Tensor, batch: int) -> PackedKeys | PackedValues:
    """Select from every tensor that has a dimension for sequences; what serves all of them alike stays."""
    tensors = {field.name: getattr(part, field.name) for field in fields(part)}
    chosen = {
        name: tensor[indices].contiguous()
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and tensor.shape[0] == batch and name != "matrix"
    }
    return replace(part, **chosen)
