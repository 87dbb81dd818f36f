"""1-bit codes: the sign of an element, with levels that are an argument."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from vidkv_eval.quant.base import impossible
from vidkv_eval.quant.grouped import GroupedQuantizer
from vidkv_eval.quant.grouping import Granularity
from vidkv_eval.quant.metadata import Metadata, MetadataWriter

Levels = Literal["zero_scale", "plus_minus", "mean_plus_minus"]


@dataclass(frozen=True)
class Sign(GroupedQuantizer):
    """One bit per element.

    Attributes:
        levels: the two values of a group, s being the mean of |x| (or of |x - m|) and m the mean of x:
            zero_scale: {0, s} by the sign of x, as arXiv:2503.16257 prints it (Algorithm 3) and its code does it;
            plus_minus: {-s, s} by the sign of x;
            mean_plus_minus: {m - s, m + s} by the sign of x - m.
    """

    levels: Levels
    granularity: Granularity
    group_size: int
    layout: str = "capacity"
    metadata: Metadata = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels not in get_args(Levels):
            raise impossible(self, "levels", self.levels, ", ".join(get_args(Levels)))

    @property
    def nominal_bits(self) -> float:
        return 1.0

    @property
    def code_count(self) -> int:
        return 2

    def encode(self, groups: torch.Tensor, write: MetadataWriter) -> torch.Tensor:
        if self.levels == "mean_plus_minus":
            groups = groups - write("mean", groups.mean(-1))
        write("scale", groups.abs().mean(-1))
        return groups >= 0

    def decode(self, codes: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.levels == "zero_scale":
            return codes * metadata["scale"]
        signed = (2 * codes - 1) * metadata["scale"]
        return signed if self.levels == "plus_minus" else signed + metadata["mean"]

    def decode_odd(self, codes: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.levels == "zero_scale":
            return (codes - 0.5) * metadata["scale"]
        return self.decode(codes, metadata)
