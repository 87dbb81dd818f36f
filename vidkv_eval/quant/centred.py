"""States minus the mean of their channel, around another quantizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidkv_eval.quant.base import QuantizedStates, Quantizer
from vidkv_eval.quant.wrapper import Wrapper


@dataclass(frozen=True)
class Centred(Wrapper):
    """Quantizes what is left of each channel after subtracting its mean over the first tokens, and adds the mean when reading.

    The mean is kept, float16 [B, H, C], for tokens appended later. Quantizers without an offset, or with one stored in few
    bits, need this where a channel lies far from zero, as biased keys do.

    Attributes:
        inner: quantizer of the differences.
    """

    inner: Quantizer

    def quantize(self, states: torch.Tensor, like: QuantizedStates | None = None) -> QuantizedStates:
        states = states.float()
        mean = like.static["mean"] if like else self._mean(states)
        inner = self.inner.quantize(states - mean.float().unsqueeze(2), like and like.parts["inner"])
        return QuantizedStates(states.shape[2], states.shape[3], static={"mean": mean}, parts={"inner": inner})

    def dequantize(self, quantized: QuantizedStates, dtype: torch.dtype) -> torch.Tensor:
        differences = self.inner.dequantize(quantized.parts["inner"], torch.float32)
        return (differences + quantized.static["mean"].float().unsqueeze(2)).to(dtype)

    def _mean(self, states: torch.Tensor) -> torch.Tensor:
        mean = states.mean(dim=2).half()
        if torch.isinf(mean).any():
            raise OverflowError(f"the mean of a channel is beyond {torch.finfo(torch.float16).max:g}, the largest float16")
        return mean
