"""1.58-bit codes: negative, zero, positive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vidkv_eval.quant.base import impossible
from vidkv_eval.quant.grouped import GroupedQuantizer
from vidkv_eval.quant.grouping import Granularity
from vidkv_eval.quant.metadata import Metadata, MetadataWriter


@dataclass(frozen=True)
class Ternary(GroupedQuantizer):
    """Codes -1, 0, +1 by a threshold on |x|; exactly at the threshold the code is 0.

    Source: arXiv:2503.16257, Algorithm 2.

    Attributes:
        threshold: in units of the mean of |x| in the group (0.7 in the paper, 0.5 in its code).
        scaled: True: codes are multiplied by the scale of least squared error, the mean of |x| over non-zero codes.
            False: codes are read back as they are, whatever the size of the states (the paper), and no metadata is stored.
    """

    threshold: float
    scaled: bool
    granularity: Granularity
    group_size: int
    layout: str = "capacity"
    metadata: Metadata = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.threshold) not in (int, float) or not 0 <= self.threshold < float("inf"):
            raise impossible(self, "threshold", self.threshold, "numbers from 0")
        if type(self.scaled) is not bool:
            raise impossible(self, "scaled", self.scaled, "true, false")

    @property
    def nominal_bits(self) -> float:
        return 1.58

    @property
    def code_count(self) -> int:
        return 3

    @property
    def is_scaled(self) -> bool:
        return self.scaled

    def encode(self, groups: torch.Tensor, write: MetadataWriter) -> torch.Tensor:
        sizes = groups.abs()
        non_zero = sizes > self.threshold * sizes.mean(-1, keepdim=True)
        if self.scaled:
            write("scale", (sizes * non_zero).sum(-1) / non_zero.sum(-1).clamp(min=1))
        return 1 + torch.sign(groups) * non_zero

    def decode(self, codes: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> torch.Tensor:
        signs = codes - 1
        return signs * metadata["scale"] if self.scaled else signs
