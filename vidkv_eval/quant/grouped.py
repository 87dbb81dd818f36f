"""What quantizers that code each group by itself have in common: grouping, layout of codes, storage of metadata."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch

from vidkv_eval.quant.base import QuantizedStates, Quantizer, impossible
from vidkv_eval.quant.grouping import GRANULARITIES, Granularity, group, ungroup
from vidkv_eval.quant.metadata import METADATA, Metadata, MetadataWriter, read_metadata
from vidkv_kernels.layouts import LAYOUTS


class GroupedQuantizer(Quantizer):
    """A quantizer that codes groups independently of each other.

    Subclasses are dataclasses with the fields below and define `code_count`, `encode` and `decode`.

    Attributes:
        granularity: per_channel (groups of tokens in a channel) or per_token (groups of channels in a token).
        group_size: elements that share metadata, S.
        layout: where codes lie in bytes, a name of `vidkv_kernels.layouts.LAYOUTS`. It changes bytes, never what is read back.
        metadata: how scales and offsets are stored: float16, float8 or uint4, see `vidkv_eval.quant.metadata`.
    """

    granularity: Granularity
    group_size: int
    layout: str
    metadata: Metadata

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise impossible(self, "granularity", self.granularity, ", ".join(GRANULARITIES))
        if type(self.group_size) is not int or self.group_size < 1:
            raise impossible(self, "group_size", self.group_size, "integers above 0")
        if self.layout not in LAYOUTS:
            raise impossible(self, "layout", self.layout, ", ".join(LAYOUTS))
        if self.metadata not in METADATA:
            raise impossible(self, "metadata", self.metadata, ", ".join(METADATA))
        if self.metadata == "uint4" and self.granularity != "per_channel":
            raise impossible(self, "metadata", self.metadata, f"float16, float8 (uint4 goes with per_channel, not with {self.granularity})")

    @property
    def block(self) -> int:
        return self.group_size

    @property
    @abstractmethod
    def code_count(self) -> int:
        """Number of different codes."""

    @abstractmethod
    def encode(self, groups: torch.Tensor, write: MetadataWriter) -> torch.Tensor:
        """Code groups, for the metadata that reading will find.

        Args:
            groups: float32 [B, H, G, M, S].
            write: stores metadata [B, H, G, M] under a name and returns it as it will be read, float32 [B, H, G, M, 1].
        Returns:
            Codes in 0 .. code_count - 1, [B, H, G, M, S].
        """

    @abstractmethod
    def decode(self, codes: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the values of `codes`, float32 [B, H, G, M, S], given metadata as float32 [B, H, G, M, 1]."""

    def decode_odd(self, codes: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return (value of x - value of -x) / 2; see `Quantizer.dequantize_odd`."""
        return self.decode(codes, metadata)

    def quantize(self, states: torch.Tensor, like: QuantizedStates | None = None) -> QuantizedStates:
        write = MetadataWriter(self.metadata, like and like.static)
        codes = self.encode(group(states.float(), self.granularity, self.group_size), write)
        packed = LAYOUTS[self.layout].pack(codes.to(torch.uint8), self.code_count)
        return QuantizedStates(states.shape[2], states.shape[3], {"codes": packed, **write.tensors}, write.static)

    def dequantize(self, quantized: QuantizedStates, dtype: torch.dtype) -> torch.Tensor:
        return self._read(quantized, dtype, self.decode)

    def dequantize_odd(self, quantized: QuantizedStates, dtype: torch.dtype) -> torch.Tensor:
        return self._read(quantized, dtype, self.decode_odd)

    def _read(self, quantized: QuantizedStates, dtype: torch.dtype, decode: Callable[..., torch.Tensor]) -> torch.Tensor:
        codes = LAYOUTS[self.layout].unpack(quantized.tensors["codes"], self.code_count, quantized.channels, self.group_size)
        return ungroup(decode(codes.float(), read_metadata(quantized, self.metadata)).to(dtype), self.granularity)
