"""Full precision, through the same code path as every other quantizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidkv_eval.quant.base import QuantizedStates, Quantizer


@dataclass(frozen=True)
class Identity(Quantizer):
    """Keeps states as they are."""

    @property
    def block(self) -> int:
        return 1

    @property
    def nominal_bits(self) -> float:
        return 16.0

    def quantize(self, states: torch.Tensor, like: QuantizedStates | None = None) -> QuantizedStates:
        return QuantizedStates(states.shape[2], states.shape[3], {"states": states.clone()})

    def dequantize(self, quantized: QuantizedStates, dtype: torch.dtype) -> torch.Tensor:
        return quantized.tensors["states"].to(dtype)
