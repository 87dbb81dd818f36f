"""Growable packed history of one layer in the portable layout of `packed`: what a cache fills and `attend` reads.

The counterpart of `fragment_history` for backends that read the layout as it is.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

import torch

from vidkv_kernels.packed import WORD, PackedKeys, PackedValues
from vidkv_kernels.packed_rows import GROWING, OF_SEQUENCES, UNITS, form_of

Part = TypeVar("Part", PackedKeys, PackedValues)
SPARE = 8
"""A buffer that is full is replaced by one with room for an eighth more."""


class PackedHistory:
    """Packed keys and values of one layer.

    Args:
        keys, values: the first tokens, whose tensors become the first buffers: no room beyond what is held.

    Attributes:
        keys, values: as `packed.PackedLayer` takes them.
        lengths: tokens that each sequence holds.
    """

    def __init__(self, keys: PackedKeys, values: tuple[PackedValues, ...]):
        self.keys = keys
        self.values = values
        self._entries = [run.lengths.tolist() for run in values]

    @property
    def lengths(self) -> list[int]:
        return [sum(entries) for entries in zip(*self._entries, strict=True)]

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @property
    def value_nbytes(self) -> int:
        """Bytes of the values held."""
        runs = zip(self.values, self._entries, strict=True)
        held = sum(_held_bytes(run, (*GROWING, "tokens"), run.entries, entries) for run, entries in runs)
        others = (getattr(run, name) for run in self.values for name in ("lengths", *UNITS))
        return held + sum(tensor.nbytes for tensor in others if tensor is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of what is held, order and center included; not the matrix, which all layers share, nor the spare room of the buffers."""
        keys = self.keys
        others = (getattr(keys, name) for name in OF_SEQUENCES)
        own = _held_bytes(keys, GROWING, keys.codes.shape[2] * WORD, self.lengths)
        return own + sum(tensor.nbytes for tensor in others if tensor is not None) + self.value_nbytes

    def append(self, keys: PackedKeys, values: tuple[PackedValues, ...]) -> None:
        """Write whole groups of tokens behind what each sequence holds.

        Args:
            keys: new tokens, stored like those held. What a sequence has once is taken with its first tokens.
            values: runs of new entries; their lengths say how many each sequence gets. A run goes behind the run of the same form,
                or becomes a further one.
        Raises:
            ValueError: tokens that are stored in another way.
        """
        held = self.keys
        if (keys.segments, keys.group_size) != (held.segments, held.group_size):
            raise ValueError(f"appended keys have {keys.segments} in groups of {keys.group_size}; allowed: the form of those held")
        counts = [run.lengths.tolist() for run in values]
        forms = [form_of(run) for run in self.values]
        further = [run for run in values if form_of(run) not in forms]
        if further and (len(forms) + len(further) > 2 or any(run.tokens is None for run in (*self.values, *further))):
            raise ValueError(f"appended values have the form {form_of(further[0])}; allowed: {forms}")
        added = [sum(entries) for entries in zip(*counts, strict=True)]
        begun = [row for row, length in enumerate(self.lengths) if not length and added[row]]
        _take_over(held, keys, OF_SEQUENCES, begun)
        self.keys = replace(held, **_joined(held, keys, GROWING, held.codes.shape[2] * WORD, self.lengths, added))
        runs = list(self.values)
        for run, count in zip(values, counts, strict=True):
            if form_of(run) not in forms:
                runs.append(run)
                self._entries.append(count)
                continue
            index = forms.index(form_of(run))
            begun = [row for row, entries in enumerate(self._entries[index]) if not entries and count[row]]
            _take_over(runs[index], run, UNITS, begun)
            tensors = _joined(runs[index], run, (*GROWING, "tokens"), runs[index].entries, self._entries[index], count)
            runs[index] = replace(runs[index], **tensors, lengths=runs[index].lengths + run.lengths)
            self._entries[index] = [entries + more for entries, more in zip(self._entries[index], count, strict=True)]
        self.values = tuple(runs)

    def unpack(self) -> tuple[PackedKeys, tuple[PackedValues, ...]]:
        """Return what is held in the portable layout, which it is in; entries beyond the lengths mean nothing."""
        return self.keys, self.values

    def select_batch(self, indices: torch.Tensor) -> PackedHistory:
        """Return a copy of the sequences `indices` (integers, which may repeat), in that order."""
        return PackedHistory(select_sequences(self.keys, indices), tuple(select_sequences(run, indices) for run in self.values))


def _take_over(held: Part, new: Part, names: tuple[str, ...], begun: list[int]) -> None:
    """Copy what sequences have once for those that get their first tokens."""
    for name in names:
        own = getattr(held, name)
        if own is not None and own.shape[0] > 1:
            own[begun] = getattr(new, name)[begun]


def select_sequences(part: Part, indices: torch.Tensor) -> Part:
    """Select from every tensor that has a dimension for sequences; what serves all of them alike stays."""
    batch = part.codes.shape[0]
    tensors = {field.name: getattr(part, field.name) for field in fields(part)}
    chosen = {
        name: tensor[indices].contiguous()
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and tensor.shape[0] == batch and name != "matrix"
    }
    return replace(part, **chosen)


def _held_bytes(part: PackedKeys | PackedValues, names: tuple[str, ...], room: int, held: list[int]) -> int:
    tensors = (getattr(part, name) for name in names)
    return sum(tensor.nbytes * sum(held) // (len(held) * room) for tensor in tensors if tensor is not None)


def _joined(
    held: PackedKeys | PackedValues, new: PackedKeys | PackedValues, names: tuple[str, ...], room: int, lengths: list[int], added: list[int]
) -> dict[str, torch.Tensor]:
    """Write tensors of `new` behind those `held`, in place or, if there is no room, in larger buffers; return the buffers."""
    unit = max(WORD, held.group_size)
    total = max(length + more for length, more in zip(lengths, added, strict=True))
    larger = -(-(total + total // SPARE) // unit) * unit if total > room else room
    # Sequences of the same length are written at once.
    rows: dict[tuple[int, int], list[int]] = {}
    for row, pair in enumerate(zip(lengths, added, strict=True)):
        rows.setdefault(pair, []).append(row)
    buffers = {}
    for name in names:
        old, tail, axis = getattr(held, name), getattr(new, name), 1 if name == "tokens" else 2
        if old is None:
            continue
        buffer = old
        if larger > room:
            buffer = old.new_empty(*old.shape[:axis], old.shape[axis] * larger // room, *old.shape[axis + 1 :])
            buffer.narrow(axis, 0, old.shape[axis]).copy_(old)
        for (length, more), alike in rows.items():
            start, stop = (buffer.shape[axis] * tokens // larger for tokens in (length, length + more))
            place = slice(None) if len(rows) == 1 else alike
            buffer.narrow(axis, start, stop - start)[place] = tail.narrow(axis, 0, stop - start)[place]
        buffers[name] = buffer
    return buffers
