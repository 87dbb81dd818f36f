"""What quantizers that code each group by itself have in common: grouping, packing, float16 metadata."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch

from vidkv_eval.quant.base import QuantizedStates, Quantizer, impossible
from vidkv_eval.quant.grouping import GRANULARITIES, Granularity, group, ungroup
from vidkv_kernels.packing import pack, unpack

METADATA_DTYPE = torch.float16


def to_metadata(values: torch.Tensor) -> torch.Tensor:
    """Round scales or minima to the dtype in which they are stored.

    Raises:
        OverflowError: a value is too large for that dtype.
    """
    stored = values.to(METADATA_DTYPE)
    if torch.isinf(stored).any():
        largest = torch.finfo(METADATA_DTYPE).max
        raise OverflowError(f"a group needs metadata of size {values.abs().max().item():g}; float16 metadata holds at most {largest:g}")
    return stored


class GroupedQuantizer(Quantizer):
    """A quantizer that codes groups independently of each other.

    Subclasses are dataclasses with the two fields below and define `code_count`, `encode` and `decode`.

    Attributes:
        granularity: per_channel (groups of tokens in a channel) or per_token (groups of channels in a token).
        group_size: elements that share metadata, S.
    """

    granularity: Granularity
    group_size: int

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise impossible(self, "granularity", self.granularity, ", ".join(GRANULARITIES))
        if type(self.group_size) is not int or self.group_size < 1:
            raise impossible(self, "group_size", self.group_size, "integers above 0")

    @property
    def block(self) -> int:
        return self.group_size

    @property
    @abstractmethod
    def code_count(self) -> int:
        """Number of different codes."""

    @abstractmethod
    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Code groups.

        Args:
            groups: float32 [B, H, G, M, S].
        Returns:
            Codes in 0 .. code_count - 1, [B, H, G, M, S], and metadata by name, each [B, H, G, M].
        """

    @abstractmethod
    def decode(self, codes: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the values of `codes`, float32 [B, H, G, M, S], given metadata as float32 [B, H, G, M, 1]."""

    def decode_odd(self, codes: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return (value of x - value of -x) / 2; see `Quantizer.dequantize_odd`."""
        return self.decode(codes, metadata)

    def quantize(self, states: torch.Tensor, like: QuantizedStates | None = None) -> QuantizedStates:
        codes, metadata = self.encode(group(states.float(), self.granularity, self.group_size))
        packed = pack(codes.to(torch.uint8).flatten(3), self.code_count)
        return QuantizedStates(states.shape[2], states.shape[3], {"codes": packed, **metadata})

    def dequantize(self, quantized: QuantizedStates, dtype: torch.dtype) -> torch.Tensor:
        return self._read(quantized, dtype, self.decode)

    def dequantize_odd(self, quantized: QuantizedStates, dtype: torch.dtype) -> torch.Tensor:
        return self._read(quantized, dtype, self.decode_odd)

    def _read(self, quantized: QuantizedStates, dtype: torch.dtype, decode: Callable[..., torch.Tensor]) -> torch.Tensor:
        codes = unpack(quantized.tensors["codes"], self.code_count, quantized.channels * self.group_size)
        codes = codes.unflatten(-1, (quantized.channels, self.group_size)).float()
        metadata = {name: tensor.float().unsqueeze(-1) for name, tensor in quantized.tensors.items() if name != "codes"}
        return ungroup(decode(codes, metadata).to(dtype), self.granularity)
