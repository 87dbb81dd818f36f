"""Uniform codes with one range per channel for all tokens that are given at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidkv_eval.quant.base import QuantizedStates, Quantizer, impossible
from vidkv_eval.quant.metadata import to_half
from vidkv_kernels.packing import pack, unpack


@dataclass(frozen=True)
class Segment(Quantizer):
    """Uniform levels between `shrink` times the minimum and `shrink` times the maximum of a channel of a head.

    The segment is all tokens of the first call. Tokens appended later are coded in its range, so that metadata does not grow.
    Source: CalibQuant, arXiv:2502.14882v2, which uses it for visual tokens. As there, a range shrinks towards zero and not
    towards its middle, so that a channel far from zero is read back smaller than it was.

    Attributes:
        nbits: bits per code: 1, 2, 4 or 8, which fill bytes.
        shrink: above 0 to 1. In the source 0.5 for keys and 0.3 for values at 1 bit, else 1.
    """

    nbits: int
    shrink: float = 1.0

    def __post_init__(self) -> None:
        if type(self.nbits) is not int or self.nbits not in (1, 2, 4, 8):
            raise impossible(self, "nbits", self.nbits, "1, 2, 4, 8")
        if type(self.shrink) not in (int, float) or not 0 < self.shrink <= 1:
            raise impossible(self, "shrink", self.shrink, "numbers above 0 to 1")

    @property
    def block(self) -> int:
        return 1

    @property
    def nominal_bits(self) -> float:
        return float(self.nbits)

    def quantize(self, states: torch.Tensor, like: QuantizedStates | None = None) -> QuantizedStates:
        states = states.float()
        channel_range = like.static if like else self._measure(states)
        minimum, scale = (channel_range[name].float().unsqueeze(2) for name in ("minimum", "scale"))
        # A scale of zero makes every code worth the minimum, so any divisor will do.
        codes = ((states - minimum) / torch.where(scale > 0, scale, 1)).round_().clamp_(0, 2**self.nbits - 1)
        packed = pack(codes.to(torch.uint8), 2**self.nbits)
        return QuantizedStates(states.shape[2], states.shape[3], {"codes": packed}, channel_range)

    def dequantize(self, quantized: QuantizedStates, dtype: torch.dtype) -> torch.Tensor:
        codes = unpack(quantized.tensors["codes"], 2**self.nbits, quantized.channels)
        minimum, scale = (quantized.static[name].float().unsqueeze(2) for name in ("minimum", "scale"))
        return (codes * scale + minimum).to(dtype)

    def _measure(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return minimum and scale of each channel, [B, H, C]."""
        low, high = (self.shrink * bound for bound in states.aminmax(dim=2))
        return {"minimum": to_half(low), "scale": to_half((high - low) / (2**self.nbits - 1))}
