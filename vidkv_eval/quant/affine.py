"""n-bit codes between the minimum and the maximum of a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vidkv_eval.quant.base import impossible
from vidkv_eval.quant.grouped import GroupedQuantizer
from vidkv_eval.quant.grouping import Granularity
from vidkv_eval.quant.metadata import Metadata, MetadataWriter


@dataclass(frozen=True)
class Affine(GroupedQuantizer):
    """Asymmetric min-max quantization: value = minimum + scale * code, codes rounded half to even.

    Source: arXiv:2402.02750 (KIVI); arXiv:2503.16257, "Preliminary".

    Attributes:
        nbits: bits per code: 1, 2, 4 or 8, which fill bytes.
    """

    nbits: int
    granularity: Granularity
    group_size: int
    layout: str = "capacity"
    metadata: Metadata = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.nbits) is not int or self.nbits not in (1, 2, 4, 8):
            raise impossible(self, "nbits", self.nbits, "1, 2, 4, 8")

    @property
    def nominal_bits(self) -> float:
        return float(self.nbits)

    @property
    def code_count(self) -> int:
        return 2**self.nbits

    def encode(self, groups: torch.Tensor, write: MetadataWriter) -> torch.Tensor:
        low, high = groups.aminmax(dim=-1)
        scale = write("scale", (high - low) / (self.code_count - 1))
        minimum = write("minimum", low)
        # A scale of zero (constant group, or too narrow for its dtype) makes every code worth the minimum, so any divisor will do.
        divisor = torch.where(scale > 0, scale, 1)
        return ((groups - minimum) / divisor).round_().clamp_(0, self.code_count - 1)

    def decode(self, codes: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return codes * metadata["scale"] + metadata["minimum"]
