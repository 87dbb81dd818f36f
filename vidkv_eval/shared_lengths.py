"""Numbers of tokens that kernels of all layers read on the device."""

from __future__ import annotations

import torch


class SharedLengths:
    """Residual lengths of the sequences of a batch, on the device; layers that ask for the same ones share a tensor and its writing.

    A tensor keeps its place in memory while the number of sequences stays the same, so that captured graphs may read it.

    Attributes:
        changes: counted up by layers whenever they store, forget or move tokens.
    """

    def __init__(self):
        self.changes = 0
        self._shown: dict[torch.device, tuple[int, ...]] = {}
        self._tensors: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device, lengths: tuple[int, ...]) -> torch.Tensor:
        """Return int32 [B] that holds `lengths` for kernels launched from now until another call asks for other lengths."""
        shown = self._shown.get(device, ())
        if shown == lengths:
            return self._tensors[device]
        if len(shown) != len(lengths):
            self._tensors[device] = torch.tensor(lengths, dtype=torch.int32, device=device)
        elif len(set(lengths)) == 1:
            self._tensors[device].fill_(lengths[0])
        elif len(more := {now - before for now, before in zip(lengths, shown, strict=True)}) == 1:
            self._tensors[device].add_(more.pop())
        else:
            self._tensors[device].copy_(torch.tensor(lengths, dtype=torch.int32))
        self._shown[device] = lengths
        return self._tensors[device]
