"""The interface every quantizer has, and the stored form that every quantizer returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


def impossible(owner: object, field_name: str, found: object, allowed: str) -> ValueError:
    """Build the error for a field that has an impossible value."""
    return ValueError(f"{type(owner).__name__}.{field_name} is {found!r}; allowed: {allowed}")


@dataclass(frozen=True)
class QuantizedStates:
    """States in stored form: everything dequantization needs, and nothing else.

    Attributes:
        length: number of tokens T held.
        channels: number of channels C held.
        tensors: grow with the tokens. Batch is dimension 0; tokens, in equal steps, are dimension 2.
        static: do not grow (channel indices). Batch is dimension 0.
        parts: stored forms of the same tokens made by inner quantizers.
    """

    length: int
    channels: int
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    static: Mapping[str, torch.Tensor] = field(default_factory=dict)
    parts: Mapping[str, QuantizedStates] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, metadata and inner parts included."""
        own = sum(tensor.nbytes for tensor in (*self.tensors.values(), *self.static.values()))
        return own + sum(part.nbytes for part in self.parts.values())

    def select_batch(self, indices: torch.Tensor) -> QuantizedStates:
        """Return the batch items `indices` (integers, which may repeat, or a mask), in that order."""
        return QuantizedStates(
            self.length,
            self.channels,
            {name: tensor[indices] for name, tensor in self.tensors.items()},
            {name: tensor[indices] for name, tensor in self.static.items()},
            {name: part.select_batch(indices) for name, part in self.parts.items()},
        )


class Quantizer(ABC):
    """Quantization of keys or of values as a pair of pure functions.

    Implementations are frozen dataclasses: they hold settings, never states, and are equal when their settings are.
    """

    @property
    @abstractmethod
    def block(self) -> int:
        """Number of tokens quantized together; token counts must be multiples of it."""

    @property
    @abstractmethod
    def nominal_bits(self) -> float:
        """Bits per code as papers count them: no metadata, no padding."""

    @property
    def is_scaled(self) -> bool:
        """Whether scaling the states scales what is read back by the same factor."""
        return True

    @property
    def is_batch_independent(self) -> bool:
        """Whether each sequence of a batch is stored as if it were alone."""
        return True

    @abstractmethod
    def quantize(self, states: torch.Tensor, like: QuantizedStates | None = None) -> QuantizedStates:
        """Quantize states.

        Args:
            states: [B, H, T, C], T a multiple of `block`, any floating dtype. Batch items do not influence each other unless
                `is_batch_independent` is false.
            like: stored form that the result will be appended to; its choices (such as channel sets) are kept.
        """

    @abstractmethod
    def dequantize(self, quantized: QuantizedStates, dtype: torch.dtype) -> torch.Tensor:
        """Return what is read back, [B, H, T, C]. Computed in float32, then rounded once to `dtype`, unless the class says else."""

    def dequantize_odd(self, quantized: QuantizedStates, dtype: torch.dtype) -> torch.Tensor:
        """Return (read back of x - read back of -x) / 2, the odd part of the quantizer, [B, H, T, C].

        Most quantizers treat both signs alike and are odd themselves, so this is `dequantize`.
        """
        return self.dequantize(quantized, dtype)
