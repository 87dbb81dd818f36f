"""1-bit codes whose two levels are quantiles of a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vidkv_eval.quant.base import impossible
from vidkv_eval.quant.grouped import GroupedQuantizer
from vidkv_eval.quant.grouping import Granularity
from vidkv_eval.quant.metadata import Metadata, MetadataWriter


@dataclass(frozen=True)
class Quantile(GroupedQuantizer):
    """One bit per element: the nearer of the group's `tau` and 1 - `tau` quantiles, the lower one where both are as near.

    Inferred: of arXiv:2502.14882v1 only the abstract is public, which speaks of group-specific and quantile-based 1-bit codes
    and gives neither levels nor sizes. Quantiles lie between sorted elements by linear interpolation.

    Attributes:
        tau: from 0 (levels at minimum and maximum) to below 0.5. For normal values levels with the least squared error are the
            quantiles of 0.21.
    """

    tau: float
    granularity: Granularity
    group_size: int
    layout: str = "capacity"
    metadata: Metadata = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.tau) not in (int, float) or not 0 <= self.tau < 0.5:
            raise impossible(self, "tau", self.tau, "numbers from 0 to below 0.5")

    @property
    def nominal_bits(self) -> float:
        return 1.0

    @property
    def code_count(self) -> int:
        return 2

    def encode(self, groups: torch.Tensor, write: MetadataWriter) -> torch.Tensor:
        ascending = groups.sort(dim=-1).values
        low = write("low", self._quantile(ascending))
        high = write("high", self._quantile(ascending.flip(-1)))
        return (groups - high).abs() < (groups - low).abs()

    def decode(self, codes: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.where(codes > 0, metadata["high"], metadata["low"])

    def _quantile(self, ordered: torch.Tensor) -> torch.Tensor:
        """Return the element a share `tau` of the way from the first to the last, [..., S] to [...]."""
        place = self.tau * (self.group_size - 1)
        before = int(place)
        after = min(before + 1, self.group_size - 1)
        return torch.lerp(ordered[..., before], ordered[..., after], place - before)
