"""The quantizers of VidKV's released code, number for number.

Source: https://github.com/KD-TAO/VidKV, commit 0e55c39. That code runs on float16 models only and rounds every elementwise
operation to float16, and so do these, whatever the dtype of the states; only means and Fourier transforms are computed in
float32 and then rounded once. What it stores is stored and counted here too, used or not: codes fill whole bits (1, 2, 4 or
8), and every group has a scale and a minimum.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vidkv_eval.quant.base import QuantizedStates, Quantizer, impossible
from vidkv_eval.quant.grouping import GRANULARITIES, Granularity, group, ungroup
from vidkv_kernels.packing import pack, unpack

THRESHOLD = 0.5
FEWEST_WIDE_CHANNELS = 32


class HalfGrouped(Quantizer):
    """A quantizer that codes groups independently of each other, in float16 arithmetic.

    Unlike elsewhere, a per_token block is a single token: the released code cuts each token into groups of channels.

    Attributes:
        granularity: per_channel (axis -1 of the released code) or per_token (axis 0).
        group_size: elements that share a scale and a minimum, S.
    """

    granularity: Granularity
    group_size: int

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise impossible(self, "granularity", self.granularity, ", ".join(GRANULARITIES))
        _check_group_size(self)

    @property
    def block(self) -> int:
        return self.group_size if self.granularity == "per_channel" else 1

    @property
    @abstractmethod
    def code_count(self) -> int:
        """Number of codes that a stored field can hold."""

    @abstractmethod
    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return codes [B, H, G, M, S], scales and minima, float16 [B, H, G, M], of float16 groups [B, H, G, M, S]."""

    @abstractmethod
    def decode(self, codes: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the values of float16 codes [B, H, G, M, S], given metadata as float16 [B, H, G, M, 1]."""

    def quantize(self, states: torch.Tensor, like: QuantizedStates | None = None) -> QuantizedStates:
        codes, scale, minimum = self.encode(self._group(to_half(states)).contiguous())
        if not torch.isfinite(scale).all():
            raise OverflowError("a group needs a scale that float16 metadata cannot hold, which holds at most 65504")
        packed = pack(codes.to(torch.uint8).flatten(3), self.code_count)
        return QuantizedStates(states.shape[2], states.shape[3], {"codes": packed, "scale": scale, "minimum": minimum})

    def dequantize(self, quantized: QuantizedStates, dtype: torch.dtype) -> torch.Tensor:
        metadata = {name: quantized.tensors[name].unsqueeze(-1) for name in ("scale", "minimum")}
        return self._ungroup(self.decode(self._unpack(quantized).half(), metadata)).to(dtype)

    def codes(self, quantized: QuantizedStates) -> torch.Tensor:
        """Return the stored codes, uint8 [B, H, T, C]."""
        return self._ungroup(self._unpack(quantized))

    def _unpack(self, quantized: QuantizedStates) -> torch.Tensor:
        groups = quantized.channels if self.granularity == "per_channel" else quantized.channels // self.group_size
        codes = unpack(quantized.tensors["codes"], self.code_count, groups * self.group_size)
        return codes.unflatten(-1, (groups, self.group_size))

    def _group(self, states: torch.Tensor) -> torch.Tensor:
        if self.granularity == "per_channel":
            return group(states, self.granularity, self.group_size)
        if states.shape[-1] % self.group_size:
            raise ValueError(
                f"{states.shape[-1]} channels cannot be cut into groups of {self.group_size}; "
                "per_token needs a group_size that divides the channels"
            )
        return states.unflatten(-1, (-1, self.group_size))

    def _ungroup(self, groups: torch.Tensor) -> torch.Tensor:
        return ungroup(groups, self.granularity) if self.granularity == "per_channel" else groups.flatten(3)


@dataclass(frozen=True)
class ReleasedAffine(HalfGrouped):
    """Asymmetric min-max codes: value = minimum + scale * code.

    Attributes:
        nbits: bits per code: 2, 4 or 8.
    """

    nbits: int
    granularity: Granularity
    group_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.nbits) is not int or self.nbits not in (2, 4, 8):
            raise impossible(self, "nbits", self.nbits, "2, 4, 8")

    @property
    def nominal_bits(self) -> float:
        return float(self.nbits)

    @property
    def code_count(self) -> int:
        return 2**self.nbits

    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        minimum, maximum = groups.amin(-1), groups.amax(-1)
        scale = (maximum - minimum) / (self.code_count - 1)
        # In a constant group the released code divides zero by zero; every code then stands for the minimum.
        divisor = torch.where(scale > 0, scale, 1).unsqueeze(-1)
        codes = ((groups - minimum.unsqueeze(-1)) / divisor).clamp_(0, self.code_count - 1).round_()
        return codes, scale, minimum

    def decode(self, codes: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return codes * metadata["scale"] + metadata["minimum"]


@dataclass(frozen=True)
class ReleasedSign(HalfGrouped):
    """One bit per element: at least zero reads back as s = mean of |x|, below zero as zero. The minimum stored is zero."""

    granularity: Granularity
    group_size: int

    @property
    def nominal_bits(self) -> float:
        return 1.0

    @property
    def code_count(self) -> int:
        return 2

    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale = _mean_size(groups)
        return groups >= 0, scale, torch.zeros_like(scale)

    def decode(self, codes: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return codes * metadata["scale"] + metadata["minimum"]


@dataclass(frozen=True)
class ReleasedTernary(HalfGrouped):
    """Codes -1, 0, +1 by a threshold of half the mean of |x|, read back without a scale.

    Codes fill fields of 2 bits. The mean is stored as scale and -1 as minimum; reading back uses neither.
    """

    granularity: Granularity
    group_size: int

    @property
    def nominal_bits(self) -> float:
        return 1.58

    @property
    def code_count(self) -> int:
        return 4

    @property
    def is_scaled(self) -> bool:
        return False

    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale = _mean_size(groups)
        codes = 1 + torch.sign(groups) * (groups.abs() > (THRESHOLD * scale).unsqueeze(-1))
        return codes, scale, torch.full_like(scale, -1)

    def decode(self, codes: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return codes - 1


@dataclass(frozen=True)
class ReleasedKeys(Quantizer):
    """Wide channels in 2 bits; the full complex Fourier transform over the other channels of each token in signs.

    The int(C * (nbits - 1)) channels of largest range are wide, or 32 if that is none although nbits is above 1. The range
    is taken over all sequences of the batch, heads and tokens together. The n other channels become 2 n series: the real
    and the imaginary part of each frequency side by side, so that they take 2 bits each, before metadata.

    Attributes:
        nbits: nominal bits, 1 to 2.
        group_size: tokens of a channel that share a scale and a minimum, S.
    """

    nbits: float
    group_size: int

    def __post_init__(self) -> None:
        if type(self.nbits) not in (int, float) or not 1 <= self.nbits <= 2:
            raise impossible(self, "nbits", self.nbits, "numbers from 1 to 2")
        _check_group_size(self)

    @property
    def wide(self) -> ReleasedAffine:
        """Quantizer of the wide channels."""
        return ReleasedAffine(2, "per_channel", self.group_size)

    @property
    def normal(self) -> ReleasedSign:
        """Quantizer of the spectrum of the other channels."""
        return ReleasedSign("per_channel", self.group_size)

    @property
    def block(self) -> int:
        return self.group_size

    @property
    def nominal_bits(self) -> float:
        return float(self.nbits)

    @property
    def is_batch_independent(self) -> bool:
        return False

    def quantize(self, states: torch.Tensor, like: QuantizedStates | None = None) -> QuantizedStates:
        states = to_half(states)
        static = dict(like.static) if like else self._choose(states)
        parts = {}
        if static["wide_channels"].shape[-1]:
            parts["wide"] = self.wide.quantize(states.gather(-1, _index(static["wide_channels"], states)))
        if static["normal_channels"].shape[-1]:
            parts["normal"] = self.normal.quantize(_to_spectrum(states.gather(-1, _index(static["normal_channels"], states))))
        return QuantizedStates(states.shape[2], states.shape[3], static=static, parts=parts)

    def dequantize(self, quantized: QuantizedStates, dtype: torch.dtype) -> torch.Tensor:
        read = {}
        if "wide" in quantized.parts:
            read["wide_channels"] = self.wide.dequantize(quantized.parts["wide"], torch.float16)
        if "normal" in quantized.parts:
            read["normal_channels"] = _from_spectrum(self.normal.dequantize(quantized.parts["normal"], torch.float16))
        like = next(iter(read.values()))
        states = like.new_empty(*like.shape[:3], quantized.channels)
        for name, part in read.items():
            states.scatter_(-1, _index(quantized.static[name], part), part)
        return states.to(dtype)

    def _choose(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ascending channel indices, int64 [B, wide] and [B, C - wide]: one choice, kept with each sequence."""
        channels = states.shape[-1]
        count = int(channels * (self.nbits - 1))
        if count == 0 and self.nbits > 1:
            count = min(FEWEST_WIDE_CHANNELS, channels)
        width = states.amax(dim=(0, 1, 2)) - states.amin(dim=(0, 1, 2))
        # The order of equal widths is not defined by the released code; here the first channels win, on every device.
        order = width.sort(descending=True, stable=True).indices
        chosen = {"wide_channels": order[:count], "normal_channels": order[count:]}
        return {name: indices.sort().values.repeat(states.shape[0], 1) for name, indices in chosen.items()}


def to_half(states: torch.Tensor) -> torch.Tensor:
    """Round to float16.

    Raises:
        OverflowError: a number is too large for it.
    """
    half = states.half()
    if torch.isinf(half).any():
        largest = torch.finfo(torch.float16).max
        size = states.abs().max().item()
        raise OverflowError(f"numbers of size {size:g} in a recipe that computes in float16, which holds at most {largest:g}")
    return half


def _to_spectrum(states: torch.Tensor) -> torch.Tensor:
    """Transform channels [..., n] to real and imaginary parts by turns, [..., 2 n]."""
    return to_half(torch.view_as_real(torch.fft.fft(states.float())).flatten(-2))


def _from_spectrum(spectrum: torch.Tensor) -> torch.Tensor:
    series = torch.view_as_complex(spectrum.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.fft.ifft(series).real.half()


def _mean_size(groups: torch.Tensor) -> torch.Tensor:
    return groups.abs().float().mean(-1).half()


def _index(channels: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return channels[:, None, None, :].expand(*states.shape[:3], -1)


def _check_group_size(owner: HalfGrouped | ReleasedKeys) -> None:
    if type(owner.group_size) is not int or owner.group_size < 1:
        raise impossible(owner, "group_size", owner.group_size, "integers above 0")
