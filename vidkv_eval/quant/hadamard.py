"""Hadamard transform over the channels of each token, around another quantizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidkv_eval.quant.base import QuantizedStates, Quantizer
from vidkv_eval.quant.wrapper import Wrapper


@dataclass(frozen=True)
class Hadamard(Wrapper):
    """Quantizes states times the orthonormal Hadamard matrix of Sylvester's construction, which spreads wide channels over all.

    Source: arXiv:2404.00456 (QuaRot), for key and value caches. The number of channels must be a power of two.

    Attributes:
        inner: quantizer of the transformed channels.
    """

    inner: Quantizer

    def quantize(self, states: torch.Tensor, like: QuantizedStates | None = None) -> QuantizedStates:
        inner = self.inner.quantize(_transform(states.float()), like and like.parts["inner"])
        return QuantizedStates(states.shape[2], states.shape[3], parts={"inner": inner})

    def dequantize(self, quantized: QuantizedStates, dtype: torch.dtype) -> torch.Tensor:
        # The matrix is symmetric and orthonormal: its own inverse.
        return _transform(self.inner.dequantize(quantized.parts["inner"], torch.float32)).to(dtype)


def _transform(states: torch.Tensor) -> torch.Tensor:
    channels = states.shape[-1]
    if channels & (channels - 1):
        raise ValueError(f"a Hadamard transform of {channels} channels; allowed: powers of two")
    width = 1
    while width < channels:
        left, right = states.unflatten(-1, (-1, 2, width)).unbind(-2)
        states = torch.stack([left + right, left - right], dim=-2).flatten(-3)
        width *= 2
    return states * channels**-0.5
