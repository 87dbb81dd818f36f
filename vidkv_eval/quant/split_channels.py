"""The widest channels to one quantizer, the others to another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from vidkv_eval.quant.base import QuantizedStates, Quantizer, impossible

Select = Literal["range", "variance", "outlier"]


@dataclass(frozen=True)
class SplitChannels(Quantizer):
    """Mixed precision by channel.

    One set of wide channels per sequence, shared by its heads, or one per head; chosen over the tokens of the sequence or
    head, and kept when later tokens are appended. Source: arXiv:2503.16257, section on mixed-precision keys; its code chooses
    over the batch.

    Attributes:
        wide: quantizer of the int(C * fraction) widest channels, taken in ascending order.
        normal: quantizer of the others, in ascending order; None only if fraction is 1.
        fraction: share of wide channels, 0 to 1.
        select: how the width of a channel is measured:
            range: largest minus smallest value;
            variance: variance over tokens (and heads);
            outlier: number of values larger than `outlier_factor` times the mean of |x| over all channels. This is one
            reading of the paper, which says "above M times the mean" without saying which mean.
        outlier_factor: see `select`; M = 3 in the paper.
        per_head: each head has a channel set of its own.
    """

    wide: Quantizer
    normal: Quantizer | None
    fraction: float
    select: Select = "range"
    outlier_factor: float = 3.0
    per_head: bool = False

    def __post_init__(self) -> None:
        if type(self.fraction) not in (int, float) or not 0 <= self.fraction <= 1:
            raise impossible(self, "fraction", self.fraction, "numbers from 0 to 1")
        if not isinstance(self.wide, Quantizer):
            raise impossible(self, "wide", self.wide, "a quantizer")
        if not (isinstance(self.normal, Quantizer) or (self.normal is None and self.fraction == 1)):
            raise impossible(self, "normal", self.normal, "a quantizer, or null if fraction is 1")
        if self.select not in get_args(Select):
            raise impossible(self, "select", self.select, ", ".join(get_args(Select)))
        if type(self.outlier_factor) not in (int, float) or not 0 < self.outlier_factor < math.inf:
            raise impossible(self, "outlier_factor", self.outlier_factor, "numbers above 0")
        if type(self.per_head) is not bool:
            raise impossible(self, "per_head", self.per_head, "true, false")

    @property
    def block(self) -> int:
        return math.lcm(self.wide.block, self.normal.block if self.normal else 1)

    @property
    def nominal_bits(self) -> float:
        normal_bits = self.normal.nominal_bits if self.normal else 0.0
        return (1 - self.fraction) * normal_bits + self.fraction * self.wide.nominal_bits

    @property
    def is_scaled(self) -> bool:
        return self.wide.is_scaled and (self.normal is None or self.normal.is_scaled)

    def quantize(self, states: torch.Tensor, like: QuantizedStates | None = None) -> QuantizedStates:
        wide_channels = like.static["wide_channels"] if like else self.choose(states)
        split = wide_channels.shape[-1]
        ordered = _take_channels(states, _order(wide_channels, states.shape[-1]))
        parts = {}
        for name, part in (("wide", ordered[..., :split]), ("normal", ordered[..., split:])):
            if part.shape[-1]:
                parts[name] = getattr(self, name).quantize(part, like and like.parts[name])
        return QuantizedStates(states.shape[2], states.shape[3], static={"wide_channels": wide_channels}, parts=parts)

    def dequantize(self, quantized: QuantizedStates, dtype: torch.dtype) -> torch.Tensor:
        ordered = torch.cat([getattr(self, name).dequantize(part, dtype) for name, part in quantized.parts.items()], dim=-1)
        order = _order(quantized.static["wide_channels"], quantized.channels)
        return _take_channels(ordered, order.argsort(dim=-1))

    def choose(self, states: torch.Tensor) -> torch.Tensor:
        """Return the ascending indices of the wide channels, [B, int(C * fraction)], or [B, H, int(C * fraction)] per head."""
        channels = states.shape[-1]
        width = self._width(states.float())
        # A stable sort, so that equal widths are taken in channel order on every device.
        widest = width.sort(dim=-1, descending=True, stable=True).indices[..., : int(channels * self.fraction)]
        return widest.sort(dim=-1).values.to(torch.uint8 if channels <= 256 else torch.int16)

    def _width(self, states: torch.Tensor) -> torch.Tensor:
        """Measure channels: [B, H, T, C] to [B, C], or [B, H, C] per head."""
        shared = (2,) if self.per_head else (1, 2)
        if self.select == "range":
            return states.amax(dim=shared) - states.amin(dim=shared)
        if self.select == "variance":
            return states.var(dim=shared, correction=0)
        sizes = states.abs()
        return (sizes > self.outlier_factor * sizes.mean(dim=(*shared, 3), keepdim=True)).sum(dim=shared)


def _order(wide_channels: torch.Tensor, channels: int) -> torch.Tensor:
    """Return all channels, wide ones first and both kinds ascending: [..., wide] to [..., C]."""
    is_normal = torch.ones(*wide_channels.shape[:-1], channels, dtype=torch.uint8, device=wide_channels.device)
    return is_normal.scatter_(-1, wide_channels.long(), 0).argsort(dim=-1, stable=True)


def _take_channels(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return states [B, H, T, C] with channels in the order [B, C] or [B, H, C]."""
    heads = order if order.dim() == 3 else order.unsqueeze(1)
    return states.gather(-1, heads.unsqueeze(2).expand(states.shape))
