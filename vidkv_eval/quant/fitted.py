"""Equally spaced levels, fitted to a group by least squares that can put weight on its extreme elements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vidkv_eval.quant.base import impossible
from vidkv_eval.quant.grouped import GroupedQuantizer
from vidkv_eval.quant.grouping import Granularity
from vidkv_eval.quant.metadata import Metadata, MetadataWriter

NOMINAL_BITS = {2: 1.0, 3: 1.58, 4: 2.0, 16: 4.0}
# Codes and levels are improved by turns, as in Lloyd's method, this many times; more changes nothing that could be measured.
ROUNDS = 4
SMALLEST_WEIGHT = 0.05


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
        weights = self._weigh(groups)
        weights /= weights.sum(-1, keepdim=True)
        low, high = groups.aminmax(dim=-1, keepdim=True)
        middle, scale = (low + high) / 2, (high - low) / (self.levels - 1)
        mean = (weights * groups).sum(-1, keepdim=True)
        for _ in range(ROUNDS):
            steps = self._nearest(groups, middle, scale)
            mean_steps = (weights * steps).sum(-1, keepdim=True)
            spread = weights * (steps - mean_steps)
            # Zero only in a constant group, whose steps are all alike.
            size = (spread * steps).sum(-1, keepdim=True)
            scale = (spread * (groups - mean)).sum(-1, keepdim=True) / torch.where(size > 0, size, 1)
            middle = mean - scale * mean_steps
        # What is stored is coarser: each choice is made for what has been rounded before it.
        scale = write("scale", scale.squeeze(-1).clamp(min=0))
        steps = self._nearest(groups, middle, scale)
        middle = write("middle", (weights * (groups - scale * steps)).sum(-1))
        return self._nearest(groups, middle, scale) + (self.levels - 1) / 2

    def decode(self, codes: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return metadata["middle"] + metadata["scale"] * (codes - (self.levels - 1) / 2)

    def _weigh(self, groups: torch.Tensor) -> torch.Tensor:
        distances = (groups - groups.mean(-1, keepdim=True)).abs()
        typical = distances.square().mean(-1, keepdim=True).sqrt()
        return (distances / torch.where(typical > 0, typical, 1)).clamp(min=SMALLEST_WEIGHT) ** self.emphasis

    def _nearest(self, groups: torch.Tensor, middle: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the distance of the nearest level from the middle, in scales."""
        half = (self.levels - 1) / 2
        # A scale of zero makes every level the middle, so any divisor will do.
        return ((groups - middle) / torch.where(scale > 0, scale, 1) + half).round_().clamp_(0, 2 * half) - half
