"""Equally spaced levels, fitted to a group by least squares that can put weight on its extreme elements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vidkv_eval.quant.base import impossible
from vidkv_eval.quant.grouped import GroupedQuantizer
from vidkv_eval.quant.grouping import Granularity
from vidkv_eval.quant.metadata import Metadata, MetadataWriter
from vidkv_kernels.fit import codes_for, fit, middle_for

NOMINAL_BITS = {2: 1.0, 3: 1.58, 4: 2.0, 16: 4.0}


@dataclass(frozen=True)
class Fitted(GroupedQuantizer):
    """Level of code c = middle + scale * (c - (levels - 1) / 2), with scale and middle of least weighted squared error.

    Minimum and maximum of a group (`Affine`) are the right levels for few bits only if elements crowd at both ends. The fit
    starts there and then gives up some of the range. An element weighs (its distance from the mean of the group, in standard
    deviations) ** emphasis: plain least squares, emphasis 0, reads extreme elements back too small, and in keys and values
    these are the tokens that attention looks for.

    Attributes:
        levels: number of codes: 2, 3, 4 or 16.
        emphasis: 0 or more; 0 weighs all elements alike.
    """

    levels: int
    emphasis: float
    granularity: Granularity
    group_size: int
    layout: str = "capacity"
    metadata: Metadata = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.levels) is not int or self.levels not in NOMINAL_BITS:
            raise impossible(self, "levels", self.levels, ", ".join(map(str, NOMINAL_BITS)))
        if type(self.emphasis) not in (int, float) or not 0 <= self.emphasis < float("inf"):
            raise impossible(self, "emphasis", self.emphasis, "numbers from 0")

    @property
    def nominal_bits(self) -> float:
        return NOMINAL_BITS[self.levels]

    @property
    def code_count(self) -> int:
        return self.levels

    def encode(self, groups: torch.Tensor, write: MetadataWriter) -> torch.Tensor:
        half = (self.levels - 1) / 2
        scale, middle, weights = fit(groups, half, self.emphasis, -1)
        # What is stored is coarser: each choice is made for what has been rounded before it.
        scale = write("scale", scale.squeeze(-1))
        middle = write("middle", middle_for(groups, half, scale, middle, weights, -1).squeeze(-1))
        return codes_for(groups, half, scale, middle)

    def decode(self, codes: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return metadata["middle"] + metadata["scale"] * (codes - (self.levels - 1) / 2)
