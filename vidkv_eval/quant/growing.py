"""Stored form with room to grow: later tokens are written behind earlier ones, which stay where they are."""

from __future__ import annotations

import torch

from vidkv_eval.quant.base import QuantizedStates

SPARE = 8
"""A buffer that is full is replaced by one with room for an eighth more."""


class GrowingStates:
    """Quantized states in buffers that grow geometrically.

    Args:
        first: stored form to begin with; its tensors become the first buffers.
    """

    def __init__(self, first: QuantizedStates):
        self._length = first.length
        self._channels = first.channels
        self._buffers = dict(first.tensors)
        self._used = {name: tensor.shape[2] for name, tensor in first.tensors.items()}
        self._static = first.static
        self._parts = {name: GrowingStates(part) for name, part in first.parts.items()}

    @property
    def states(self) -> QuantizedStates:
        """What is stored, as views of the buffers."""
        tensors = {name: buffer[:, :, : self._used[name]] for name, buffer in self._buffers.items()}
        return QuantizedStates(
            self._length, self._channels, tensors, self._static, {name: part.states for name, part in self._parts.items()}
        )

    def append(self, new: QuantizedStates) -> None:
        """Write the stored form of further tokens behind what is stored; a part that `new` lacks stays as it is.

        Raises:
            ValueError: `new` was not quantized with `like=` these states.
        """
        self._check(new)
        self._append(new)

    def _check(self, new: QuantizedStates) -> None:
        same_static = self._static.keys() == new.static.keys() and all(
            tensor is new.static[name] or torch.equal(tensor, new.static[name]) for name, tensor in self._static.items()
        )
        if not (same_static and self._buffers.keys() == new.tensors.keys() and self._channels == new.channels):
            raise ValueError("appended states were quantized in another way; quantize them with `like=` the states they are appended to")
        for name, part in new.parts.items():
            if name in self._parts:
                self._parts[name]._check(part)

    def _append(self, new: QuantizedStates) -> None:
        for name, tensor in new.tensors.items():
            start = self._used[name]
            stop = start + tensor.shape[2]
            if stop > self._buffers[name].shape[2]:
                self._grow(name, stop + stop // SPARE + 1)
            self._buffers[name][:, :, start:stop] = tensor
            self._used[name] = stop
        for name, part in new.parts.items():
            if name in self._parts:
                self._parts[name]._append(part)
            else:
                self._parts[name] = GrowingStates(part)
        self._length += new.length

    def _grow(self, name: str, capacity: int) -> None:
        old, used = self._buffers[name], self._used[name]
        buffer = old.new_empty(*old.shape[:2], capacity, *old.shape[3:])
        buffer[:, :, :used] = old[:, :, :used]
        self._buffers[name] = buffer
